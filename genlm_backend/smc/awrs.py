r"""AWRS: adaptive weighted rejection sampling. Exact draws from a model under a constraint that can only be asked token
by token, with a weight that estimates the allowed mass Z without bias from the few tokens that were asked about.

Tokens are drawn from the model without replacement. The first allowed one, x, follows the model kept to the allowed
set, however many were refused before it. Drawing goes on to the second allowed token, and the weight is

    w(x) = E[ p_x / (1 - exp(-p_x T)) ]                T = G_1 + ... + G_n,  G_i ~ Exponential(r_i) independent,

where n tokens were drawn up to and with the second allowed one, and r_i is the mass not yet drawn before the i-th.

Why this is proper. Drawing without replacement is an exponential race: token v arrives at an Exponential(p_v) time, the
gaps between arrivals are G_i. Given all other arrivals, x is the first allowed one exactly if it arrives before the
first of the other allowed ones, which is then the second; call its time T. That has probability 1 - exp(-p_x T), so
p_x / (1 - exp(-p_x T)) is an unbiased (Horvitz-Thompson) estimate of p_x 1{x allowed}: E[w 1{drawn = x}] = p_x for each
allowed x. Given the order, the times are not needed: their expectation is taken, which only lowers the variance.
If the first two tokens are allowed, w = 1 exactly; if x is the only allowed token, T is infinite and w = p_x = Z.

The expectation is a sum: p / (1 - exp(-p T)) = p (1 + exp(-p T) + exp(-2 p T) + ...), so

    w = p_x  sum_{k >= 0}  prod_i  r_i / (r_i + k p_x).

With a limit of K checks the race stops at the (K+1)-th arrival whichever comes first, by the same argument; then w = 0
if none of the K is allowed.

Sources: Lipkin et al. 2025, "Fast controlled generation from language models with adaptive weighted rejection
sampling", for rejection without replacement; Cohen, Kaplan 2007, "Summarizing data using bottom-k sketches", for the
estimator by the rank of the next item.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from genlm_backend import sampling
from genlm_backend.errors import InvalidProgram
from genlm_backend.potentials.base import Constraint, Potential, State
from genlm_backend.smc.proposals import OfModelAndConstraint, Proposed, nothing_drawn
from genlm_backend.smc.weights import Floats, log_sum_exp

_ONE_BY_ONE = 8  # draws by a pass over the row each; then the whole race is run at once
_CHECKS_AT_ONCE = 256
_DIRECT_TERMS = 256
_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(8)


class Checks(NamedTuple):
    """Draws so far, and the tokens that were asked about for them."""

    n_draws: int = 0
    n_checks: int = 0


class AWRS(OfModelAndConstraint):
    """Draws from the product of a model and a constraint, asking the constraint about few tokens.

    The cost grows with how far the constraint is from the model: where the model alone would be right nine times in
    ten, two or three tokens are asked about; where the allowed mass is 1e-6, most tokens of the vocabulary may be.

    Args:
        model: Gives rows cheaply, such as a language model; its row need not be normalised.
        constraint: Weights 0 or 1; asked by `allows` or `logw_tokens`, never for a row.
        max_checks: Most tokens to ask about in one draw; None asks until it has found what there is. A limit keeps the
            weights exact, but a particle that finds nothing within it dies.

    Attributes:
        checks: What was asked so far.
    """

    def __init__(self, model: Potential, constraint: Potential, max_checks: int | None = None) -> None:
        super().__init__(model, constraint)
        self.max_checks = max_checks
        self.checks = Checks()

    async def propose(self, state: State, key: int) -> Proposed:
        model_state, constraint_state = state
        row = (await self.model.logw_next(model_state)).double().cpu()
        log_total = float(row.logsumexp(0))
        if not math.isfinite(log_total):
            return nothing_drawn(row)
        masses = (row - log_total).exp().numpy()
        seen: list[int] = []
        allowed: list[int] = []
        for symbol in _race(row, masses, key):
            if len(seen) == self.max_checks:
                break
            seen.append(symbol)
            weight = await self._weight(constraint_state, symbol)
            if len(seen) % _CHECKS_AT_ONCE == 0:
                await asyncio.sleep(0)  # others need not wait for a long search
            if weight == 0.0:
                allowed.append(symbol)
            if len(allowed) == 2:
                break
        self.checks = Checks(self.checks.n_draws + 1, self.checks.n_checks + len(seen))
        if not allowed:
            return Proposed(-1, -math.inf)
        log_weight = self._log_weight(masses, seen, allowed)
        return Proposed(allowed[0], log_total + log_weight)

    async def _weight(self, state: State, symbol: int) -> float:
        if isinstance(self.constraint, Constraint):
            return 0.0 if self.constraint.allows(state, symbol) else -math.inf
        (weight,) = (await self.constraint.logw_tokens(state, [symbol])).tolist()
        if weight not in (0.0, -math.inf):
            raise InvalidProgram(
                f"AWRS asked its constraint about token {symbol} and got the log-weight {weight}",
                "its constraint must weigh 0 or 1; use Direct or TopK, or put the potential into a critic",
            )
        return float(weight)

    def _log_weight(self, masses: Floats, seen: list[int], allowed: list[int]) -> float:
        drawn = masses[seen]
        # Summed from the end: what is left may be 1e-6 of the whole, and 1 - (sum of the drawn) would not know it.
        left = masses.copy()
        left[seen] = 0.0
        tails = np.concatenate([[math.fsum(left)], drawn[::-1]]).cumsum()[::-1]
        rates = tails[:-1]
        if len(allowed) < 2:
            if tails[-1] <= 0.0:  # every token was asked about: the allowed mass is known
                return math.log(drawn[seen.index(allowed[0])])
            rates = tails  # stopped by the limit, before the next arrival
        return log_expected_estimate(float(masses[allowed[0]]), rates)


def log_expected_estimate(mass: float, rates: Floats) -> float:
    """Log of E[p / (1 - exp(-p T))], nats, T being a sum of independent exponential times.

    Args:
        mass: p, above 0.
        rates: (n,) of the times; n >= 2, the first at least p.
    """
    rates = np.asarray(rates, np.float64)
    if len(rates) == 2 and math.isclose(rates[0] - rates[1], mass, rel_tol=1e-12):
        return math.log(rates[0])  # the sum telescopes
    logs = _log_products(np.arange(_DIRECT_TERMS, dtype=np.float64) * mass, rates)
    terms = [log_sum_exp(logs)]
    if logs[-1] > terms[0] - 40.0:
        terms.append(_log_tail(mass, rates))
    return math.log(mass) + log_sum_exp(terms)


def _log_products(at: Floats, rates: Floats) -> Floats:
    """Log of prod_i r_i / (r_i + s) at each s."""
    return np.asarray(-np.log1p(at[:, None] / rates).sum(1))


def _log_tail(mass: float, rates: Floats) -> float:
    """Log of the sum of the terms from `_DIRECT_TERMS` on: Euler and Maclaurin, the integral over log s."""
    start = _DIRECT_TERMS * mass
    n_panels = math.ceil(max(0.0, math.log(float(rates[0]) / start)) + 40.0)  # beyond, the integrand falls like 1 / s
    log_s: Floats = ((_NODES + 1.0) / 2.0 + np.arange(n_panels)[:, None]).ravel()
    s: Floats = np.asarray(start * np.exp(log_s), np.float64)
    log_integral = log_sum_exp(_log_products(s, rates) + np.log(s) + np.log(np.tile(_NODE_WEIGHTS / 2.0, n_panels)))
    (log_first,) = _log_products(np.array([start]), rates)
    slope = float((1.0 / (rates + start)).sum())  # minus the derivative of the log
    return log_sum_exp([log_integral - math.log(mass), log_first + math.log(0.5 + mass * slope / 12.0)])


def _race(row: torch.Tensor, masses: Floats, key: int) -> Iterator[int]:
    """Symbols of positive mass drawn one after the other without replacement, each when it is asked for."""
    left = row.clone()
    for i in range(_ONE_BY_ONE):
        (symbol,) = sampling.draw(left[None], [sampling.draw_key(key, (), i, "race")]).tolist()
        if symbol < 0:
            return
        yield symbol
        left[symbol] = -math.inf
    (noise,) = sampling.gumbel_noise([sampling.draw_key(key, (), _ONE_BY_ONE, "race")], len(left))
    scores = (left + noise).numpy()
    n_sorted, n_possible = 0, int(np.count_nonzero(scores > -math.inf))
    order = np.empty(0, np.int64)
    for place in range(n_possible):
        if place == n_sorted:  # the next ones in order, eight times as many each time
            n_sorted = min(n_possible, max(64, 8 * n_sorted))
            best = np.argpartition(-scores, n_sorted - 1)[:n_sorted]
            order = best[np.argsort(-scores[best])]
        yield int(order[place])
