"""Proposals: ways to draw the next symbol of a potential, each with the weight that makes it exact.

A proposal draws a symbol y (a token id, or `potential.end`) and a weight w such that for every y

    E[w 1{symbol = y}] = exp(potential.logw_next(state)[y])

("properly weighted"): whichever is used, the particles target the same law; they differ in how many tokens they look at
and how much the weights vary.

    Direct     the whole row of the potential; the weight is its mass, no variance besides
    TopK       the k most probable tokens of a model, checked one by one; the whole row only when the draw falls outside
    AWRS       tokens in random order, checked one by one until two are allowed (file awrs.py)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from genlm_backend import sampling
from genlm_backend.errors import InvalidProgram
from genlm_backend.potentials.base import Constraint, Potential, State


class Proposed(NamedTuple):
    """A drawn value and the log of its weight, nats; -inf where nothing could be drawn."""

    value: Any
    log_weight: float


class Proposal(ABC):
    """Draws the next symbol of `potential`.

    Attributes:
        potential: What is drawn from.
    """

    potential: Potential

    @abstractmethod
    async def propose(self, state: State, key: int) -> Proposed:
        """A symbol after `state` and its log-weight; a pure function of the potential's weights and the key."""

    async def target_row(self, state: State) -> torch.Tensor:
        """`(n_tokens + 1,)` float32, nats: the law that the weighted draws follow, unnormalised."""
        return await self.potential.logw_next(state)

    def piece(self, symbol: int) -> bytes | None:
        """The text of a symbol, for people; None where this is not known."""
        return None


class Direct(Proposal):
    """Draws from the potential's row, normalised; the weight is its mass.

    Args:
        potential: A product of a model and constraints, usually.
        proposal: Draw from this potential's row instead, with a state of its own kept by the program as the second part
            of a pair `(state, proposal_state)`; the weight is corrected.
    """

    def __init__(self, potential: Potential, proposal: Potential | None = None) -> None:
        self.potential = potential
        self.proposal = proposal

    async def propose(self, state: State, key: int) -> Proposed:
        if self.proposal is None:
            row = await self.potential.logw_next(state)
            return _drawn(row, row, key)
        own, other = state
        return _drawn(await self.potential.logw_next(own), await self.proposal.logw_next(other), key)

    async def target_row(self, state: State) -> torch.Tensor:
        return await self.potential.logw_next(state if self.proposal is None else state[0])


class TopK(Proposal):
    """Looks at the k most probable tokens of `model` first, and at all of them only when the draw falls elsewhere.

    With A the weight of the k tokens in the product and R the model's mass outside of them: with probability A / (A + R)
    a token among the k, weight A + R; else one of the others, of weight B in all, weight (A + R) B / R.

    Args:
        model: Gives whole rows cheaply, such as a language model.
        constraint: Weighs single tokens (`logw_tokens`, or `allows`); the target is the product of both.
        k: How many tokens to look at first.
    """

    def __init__(self, model: Potential, constraint: Potential, k: int = 16) -> None:
        from genlm_backend.potentials.combinators import Product

        if k < 1:
            raise InvalidProgram(f"TopK with k={k}", "look at 1 token or more")
        self.potential = Product(model, constraint)
        self.model, self.constraint, self.k = model, constraint, k

    async def propose(self, state: State, key: int) -> Proposed:
        model_state, constraint_state = state
        row = (await self.model.logw_next(model_state)).double()
        top = row.topk(min(self.k, len(row)))
        symbols = top.indices.tolist()
        weighed = top.values + (await symbol_weights(self.constraint, constraint_state, symbols)).double()
        outside = row.clone()
        outside[top.indices] = -math.inf
        log_a, log_r = float(weighed.logsumexp(0)), float(outside.logsumexp(0))
        log_both = float(np.logaddexp(log_a, log_r))
        if log_both == -math.inf:
            return Proposed(-1, -math.inf)
        is_inside = _uniform(sampling.draw_key(key, (), 0, "side")) < math.exp(log_a - log_both)
        if is_inside or log_r == -math.inf:
            at = _choice(weighed, key)
            return Proposed(symbols[at], log_both)
        rest = outside + (await self.constraint.logw_next(constraint_state)).double()
        log_b = float(rest.logsumexp(0))
        if log_b == -math.inf:
            return Proposed(-1, -math.inf)
        return Proposed(_choice(rest, key), log_both + log_b - log_r)


async def symbol_weights(potential: Potential, state: State, symbols: Sequence[int]) -> torch.Tensor:
    """`(len(symbols),)` float32, nats: the weights of these symbols only; for constraints no mask is made."""
    if isinstance(potential, Constraint):
        return torch.tensor([0.0 if potential.allows(state, symbol) else -math.inf for symbol in symbols])
    return await potential.logw_tokens(state, symbols)


def _drawn(target: torch.Tensor, source: torch.Tensor, key: int) -> Proposed:
    (symbol,) = sampling.draw(source[None], [key]).tolist()
    if symbol < 0:
        return Proposed(-1, -math.inf)
    (log_mass,) = sampling.log_mass(source[None]).tolist()
    correction = 0.0 if target is source else float(target[symbol]) - float(source[symbol])
    return Proposed(symbol, log_mass + correction)


def _choice(log_weights: torch.Tensor, key: int) -> int:
    (index,) = sampling.draw(log_weights[None], [key]).tolist()
    return int(index)


def _uniform(key: int) -> float:
    return (key >> 11) * 2.0**-53
