"""Small programs with known laws, and the check that independent runs of a sampler follow them.

The check. A run gives unbiased estimates of the unnormalised mass of anything: evidence_hat * posterior_hat(f) has mean
evidence * posterior(f), for any number of particles. Over R independent runs with fixed seeds, each of about a dozen
functionals f must be within Z_LIMIT standard errors (those of the runs). By the normal tail, |z| > 6.3 has probability
3e-10; with fewer than 3,000 numbers in all files of this folder the suite's false-alarm rate is below 1e-6.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from genlm_backend.potentials.base import Constraint, Potential
from genlm_backend.smc import Done, Particle, Result, program
from genlm_backend.smc.enumeration import Exact

Z_LIMIT = 6.3

ROW = torch.tensor([0.5, 0.3, 0.2]).log()
AFTER = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3], [0.3, 0.3, 0.4]]).log()
LIKELIHOOD = [0.2, 0.6, 1.0]


@program
async def chain(ctx, n=3, guess=False):
    """A Markov chain of up to n symbols that is weighed at each; ends early at two zeros in a row."""
    symbols: list[int] = []
    for _ in range(n):
        row = AFTER[symbols[-1]] if symbols else ROW
        symbols.append(await ctx.sample(row))
        ctx.score(math.log(LIKELIHOOD[symbols[-1]]))
        if symbols[-2:] == [0, 0]:
            break
        if guess:
            ctx.twist(0.5 * symbols[-1])
        await ctx.checkpoint()
    return tuple(symbols)


@dataclass(frozen=True)
class ChainParticle(Particle):
    """The same law as `chain(3)`, as a Particle."""

    symbols: tuple[int, ...] = ()

    async def step(self, ctx):
        row = AFTER[self.symbols[-1]] if self.symbols else ROW
        symbols = (*self.symbols, await ctx.sample(row))
        ctx.observe(torch.tensor(LIKELIHOOD).log(), symbols[-1])
        if len(symbols) == 3 or symbols[-2:] == (0, 0):
            return Done(symbols)
        return ChainParticle(symbols)


class Table(Potential):
    """A small normalised language model: the row after a sequence is noise seeded by it; ending is the last column."""

    def __init__(self, n_tokens: int = 3, seed: int = 0, spread: float = 1.0) -> None:
        self.n_tokens, self.seed, self.spread = n_tokens, seed, spread

    def start(self):
        return ()

    def extend(self, state, token_id):
        return (*state, token_id)

    def row(self, state) -> torch.Tensor:
        rng = np.random.default_rng([self.seed, len(state), *(symbol + 1 for symbol in state)])
        return torch.from_numpy(self.spread * rng.standard_normal(self.n_tokens + 1)).log_softmax(0).float()

    async def logw_next(self, state):
        return self.row(state)

    async def prefix(self, state):
        return math.fsum(float(self.row(state[:i])[symbol]) for i, symbol in enumerate(state))

    async def complete(self, state):
        return await self.prefix(state) + float(self.row(state)[self.end])


class Weigh(Table):
    """A potential that is no probability: weights of beginnings between 0.2 and 1 that move around."""

    def row(self, state):
        now, following = self._log_prefix(state), [self._log_prefix((*state, y)) for y in range(self.n_tokens)]
        return torch.tensor([*(w - now for w in following), -0.3 - now])

    def _log_prefix(self, state) -> float:
        return -1.5 * ((sum(state) + len(state)) % 3) / 3 if state else 0.0

    async def prefix(self, state):
        return self._log_prefix(state)

    async def complete(self, state):
        return -0.3


class NoRepeat(Constraint):
    """No symbol twice in a row, and at least one symbol."""

    def __init__(self, n_tokens: int = 3) -> None:
        self.n_tokens = n_tokens
        self.n_masks = 0

    def start(self):
        return ()

    def extend(self, state, token_id):
        return (*state, token_id)

    def is_alive(self, state):
        return all(a != b for a, b in itertools.pairwise(state))

    def is_complete(self, state):
        return len(state) > 0 and self.is_alive(state)

    def mask(self, state):
        self.n_masks += 1
        return np.array([*(self.is_alive((*state, y)) for y in range(self.n_tokens)), self.is_complete(state)])


async def sequence_law(potential: Potential, n_tokens: int, max_tokens: int) -> Exact:
    """The law of complete sequences, by the potential's `complete`: nothing of the sampler is used."""
    masses: dict[Any, float] = {}
    for length in range(max_tokens + 1):
        for ids in itertools.product(range(n_tokens), repeat=length):
            log_weight = await potential.complete(potential.state_of(ids))
            if log_weight > -math.inf:
                masses[ids] = math.exp(log_weight)
    total = math.fsum(masses.values())
    return Exact(math.log(total), {ids: mass / total for ids, mass in masses.items()})


Run = Callable[[int], Awaitable[Result]]


async def worst_z(run: Run, exact: Exact, n_runs: int) -> float:
    """The largest distance of a functional's mean from its law, in standard errors; inf for an impossible value."""
    functionals = _functionals(exact)
    expected = np.array([sum(p for v, p in exact.posterior.items() if f(v)) for f in functionals])
    found = np.zeros((n_runs, len(functionals)))
    for seed in range(n_runs):
        result = await run(seed)
        if result.log_evidence == -math.inf:
            continue
        for value, probability in result.posterior().items():
            if value not in exact.posterior:
                return math.inf
            found[seed] += probability * np.array([f(value) for f in functionals])
        found[seed] *= math.exp(result.log_evidence - exact.log_evidence)
    # A rare functional may by chance vary too little in few runs: no deviation is taken to be below 0.4 of a coin's.
    deviation = np.maximum(found.std(0, ddof=1), 0.4 * np.sqrt(np.maximum(expected * (1 - expected), 0.0)))
    error = deviation / math.sqrt(n_runs)
    off = np.abs(found.mean(0) - expected)
    return float(np.max(np.where(off < 1e-5, 0.0, off / np.maximum(error, 1e-12))))


def _functionals(exact: Exact) -> list[Callable[[Any], bool]]:
    """The evidence; the probable values; first and last symbols and lengths."""
    values = [v for v, p in exact.posterior.items() if p > 0.1][:5]
    found: list[Callable[[Any], bool]] = [lambda v: True]
    found += [lambda v, u=value: v == u for value in values]
    for symbol in range(5):
        found.append(lambda v, s=symbol: v[:1] == (s,))
        found.append(lambda v, s=symbol: v[-1:] == (s,))
        found.append(lambda v, s=symbol: len(v) == s + 1)
    return [f for f in found if sum(p for v, p in exact.posterior.items() if f(v)) > 0.1]


def law_distance_bound(n_outcomes: int, n: int, delta: float = 1e-9) -> float:
    """sum |p_hat - p| exceeds this with probability below delta (Weissman et al. 2003)."""
    return math.sqrt(2 * (n_outcomes * math.log(2) + math.log(1 / delta)) / n)


def law_distance(values: list[Any], exact: Exact) -> float:
    """sum |p_hat - p| of unweighted values; 2 if one is impossible."""
    counts: dict[Any, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    if any(value not in exact.posterior for value in counts):
        return 2.0
    return sum(abs(counts.get(value, 0) / len(values) - p) for value, p in exact.posterior.items())
