"""Proposals: ways to draw the next symbol of a potential, each with the weight that makes it exact.

A proposal draws a symbol y (a token id, or `potential.end`) and a weight w such that for every y

    E[w 1{symbol = y}] = exp(potential.logw_next(state)[y])

("properly weighted"): whichever is used, the particles target the same law; they differ in how many tokens they look at
and how much the weights vary.

    Direct     from the whole potential; the weight is its mass, no variance besides
    Guided     from another potential, corrected
    TopK       the k most probable tokens of a model, checked one by one; the whole row only when the draw falls outside
    AWRS       tokens in random order, checked one by one until two are allowed (file awrs.py)
"""

from __future__ import annotations

import asyncio
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from genlm_backend import sampling
from genlm_backend.errors import GenlmError, InvalidProgram, NoTokenAllowed
from genlm_backend.llm.queries import Draw
from genlm_backend.packed_mask import LateMask, PackedMask
from genlm_backend.potentials.base import Constraint, Potential, State
from genlm_backend.potentials.combinators import Product, Tempered
from genlm_backend.potentials.language_model import LanguageModel
from genlm_backend.smc.masks import Masks


class Proposed(NamedTuple):
    """A drawn value and the log of its weight, nats; -inf where nothing could be drawn."""

    value: Any
    log_weight: float


class Proposal(ABC):
    """Draws the next symbol of `potential`; the state is the potential's unless a proposal says otherwise.

    Attributes:
        potential: What is drawn from.
    """

    potential: Potential

    @abstractmethod
    async def propose(self, state: State, key: int) -> Proposed:
        """A symbol after `state` and its log-weight; a pure function of the potential's weights and the key."""

    def start(self) -> State:
        """The state of the empty sequence."""
        return self.potential.start()

    def extend(self, state: State, token_id: int) -> State:
        """The state of the sequence with one more token."""
        return self.potential.extend(state, token_id)

    async def log_end(self, state: State) -> float:
        """Log of the factor by which ending here multiplies the weight, nats."""
        return float((await self.potential.logw_tokens(state, [self.potential.end]))[0])

    async def target_row(self, state: State) -> torch.Tensor:
        """`(n_tokens + 1,)` float32, nats: the law that the weighted draws follow, unnormalised."""
        return await self.potential.logw_next(state)

    def piece(self, symbol: Any) -> bytes | None:
        """The text of a symbol, for people; None where this is not known."""
        vocab = self._byte_vocab
        return None if vocab is None or symbol == self.potential.end else bytes(vocab[symbol])

    @functools.cached_property
    def _byte_vocab(self) -> Sequence[bytes] | None:
        return byte_vocab_of(self.potential)


class Direct(Proposal):
    """Draws from the potential, normalised; the weight is its mass.

    A language model, alone or times constraints, is drawn from where its logits are: masks go to the model, and no row
    comes back. Anything else is drawn from its row. Masks that are wanted at the same time are made together, of the
    particles that draw from one `Direct`: make it once, not at each draw. Those of grammars are made while the model
    computes.

    Args:
        potential: A product of a model and constraints, usually.
        is_kept: Whether it is for many draws: a thread that makes masks is not worth starting for one.
    """

    def __init__(self, potential: Potential, *, is_kept: bool = True) -> None:
        self.potential = potential
        self._is_kept = is_kept
        self._parts = _model_and_constraints(potential)
        if self._parts is not None:
            self._masks = Masks(self._parts.constraints, self._parts.model.eos_token_ids)

    async def propose(self, state: State, key: int) -> Proposed:
        if self._parts is None:
            row = await self.potential.logw_next(state)
            return _drawn(row, row, key)
        model, states = self._parts.model, self._parts.states(state)
        late: LateMask | None = None
        allowed: PackedMask | LateMask | None = None
        if self._parts.constraints:
            if self._masks.can_be_late and self._is_kept:
                allowed = late = self._masks.late(states[1:])
            else:
                allowed = await self._masks.ask(states[1:])
                if not allowed.any():
                    return Proposed(-1, -math.inf)
        try:
            drawn = await model.llm.query(model.context(states[0]), Draw(key, 1.0, allowed), model.lora_name)
        except NoTokenAllowed:
            return Proposed(-1, -math.inf)
        except GenlmError:  # no error of the model's where there was nothing to draw
            if late is not None and late.allows_nothing():
                return Proposed(-1, -math.inf)
            raise
        symbol = model.end if drawn.token_id in model.eos_token_ids else drawn.token_id  # all of its ends stand for one
        return Proposed(symbol, drawn.logprob - drawn.log_q)


class Guided(Proposal):
    """Draws from one potential, and weighs by another: p(x) / q(x) times the mass of q.

    Args:
        potential: The target.
        proposal: What is drawn from; of positive weight wherever the target is. A state is the pair of both states.
    """

    def __init__(self, potential: Potential, proposal: Potential) -> None:
        self.potential, self.proposal = potential, proposal

    def start(self) -> State:
        return self.potential.start(), self.proposal.start()

    def extend(self, state: State, token_id: int) -> State:
        return self.potential.extend(state[0], token_id), self.proposal.extend(state[1], token_id)

    async def log_end(self, state: State) -> float:
        return float((await self.potential.logw_tokens(state[0], [self.potential.end]))[0])

    async def target_row(self, state: State) -> torch.Tensor:
        return await self.potential.logw_next(state[0])

    async def propose(self, state: State, key: int) -> Proposed:
        rows = await asyncio.gather(self.potential.logw_next(state[0]), self.proposal.logw_next(state[1]))
        return _drawn(*rows, key)


class OfModelAndConstraint(Proposal):
    """Draws from the product of two potentials that are asked apart; a state is the pair of both states.

    Args:
        model: Gives whole rows cheaply, such as a language model.
        constraint: Weighs single tokens.
    """

    def __init__(self, model: Potential, constraint: Potential) -> None:
        self.potential = Product(model, constraint)
        self.model, self.constraint = model, constraint

    def start(self) -> State:
        return self.model.start(), self.constraint.start()

    def extend(self, state: State, token_id: int) -> State:
        return self.model.extend(state[0], token_id), self.constraint.extend(state[1], token_id)

    async def log_end(self, state: State) -> float:
        pair = (self.constraint, state[1]), (self.model, state[0])
        return math.fsum([float((await each.logw_tokens(of_it, [each.end]))[0]) for each, of_it in pair])

    async def target_row(self, state: State) -> torch.Tensor:
        row = await self.model.logw_next(state[0])
        return row + (await self.constraint.logw_next(state[1])).to(row.device)


class TopK(OfModelAndConstraint):
    """Looks at the k most probable tokens of `model` first, and at all of them only when the draw falls elsewhere.

    With A the weight of the k tokens in the product and R the model's mass outside of them: with probability A / (A+R)
    a token among the k, weight A + R; else one of the others, of weight B in all, weight (A + R) B / R.

    Args:
        model: Gives whole rows cheaply, such as a language model.
        constraint: Weighs single tokens (`logw_tokens`, or `allows`); the target is the product of both.
        k: How many tokens to look at first.
    """

    def __init__(self, model: Potential, constraint: Potential, k: int = 16) -> None:
        if k < 1:
            raise InvalidProgram(f"TopK with k={k}", "look at 1 token or more")
        super().__init__(model, constraint)
        self.k = k

    async def propose(self, state: State, key: int) -> Proposed:
        model_state, constraint_state = state
        row = (await self.model.logw_next(model_state)).double().cpu()
        if not math.isfinite(float(row.logsumexp(0))):
            return nothing_drawn(row)
        top = row.topk(min(self.k, len(row)))
        symbols = top.indices.tolist()
        weighed = top.values + (await symbol_weights(self.constraint, constraint_state, symbols)).double().cpu()
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
        rest = outside + (await self.constraint.logw_next(constraint_state)).double().cpu()
        log_b = float(rest.logsumexp(0))
        if log_b == -math.inf:
            return Proposed(-1, -math.inf)
        return Proposed(_choice(rest, key), log_both + log_b - log_r)


def byte_vocab_of(potential: Potential) -> Sequence[bytes] | None:
    """The bytes of each token, from the language model in a potential; None if there is none."""
    match potential:
        case LanguageModel():
            return potential.llm.byte_vocab
        case Product():
            found = (byte_vocab_of(factor) for factor in potential.factors)
            return next((vocab for vocab in found if vocab is not None), None)
        case Tempered():
            return byte_vocab_of(potential.potential)
    return None


async def symbol_weights(potential: Potential, state: State, symbols: Sequence[int]) -> torch.Tensor:
    """`(len(symbols),)` float32, nats: the weights of these symbols only; for constraints no mask is made."""
    if isinstance(potential, Constraint):
        return torch.tensor([0.0 if potential.allows(state, symbol) else -math.inf for symbol in symbols])
    return await potential.logw_tokens(state, symbols)


class _Parts(NamedTuple):
    """A language model, then constraints; `order` is where they stand in the product, None for the model alone."""

    model: LanguageModel
    constraints: list[Constraint]
    order: list[int] | None

    def states(self, state: State) -> list[State]:
        return [state] if self.order is None else [state[i] for i in self.order]


def _model_and_constraints(potential: Potential) -> _Parts | None:
    """Whether this is one language model, at temperature 1, times any number of constraints."""
    if isinstance(potential, LanguageModel) and potential.temperature == 1.0:
        return _Parts(potential, [], None)
    if not isinstance(potential, Product):
        return None
    models = [i for i, factor in enumerate(potential.factors) if isinstance(factor, LanguageModel)]
    others = [i for i in range(len(potential.factors)) if i not in models]
    constraints = [c for i in others if isinstance(c := potential.factors[i], Constraint)]
    if len(models) != 1 or len(constraints) != len(others):
        return None
    model = potential.factors[models[0]]
    if not isinstance(model, LanguageModel) or model.temperature != 1.0:
        return None
    return _Parts(model, constraints, models + others)


def nothing_drawn(row: torch.Tensor) -> Proposed:
    """For a row that nothing can be drawn from: weight zero; or NaN, an error, where it has NaN or +inf."""
    is_wrong = bool((row.isnan() | row.isposinf()).any())
    return Proposed(-1, math.nan if is_wrong else -math.inf)


def _drawn(target: torch.Tensor, source: torch.Tensor, key: int) -> Proposed:
    (symbol,) = sampling.draw(source[None], [key]).tolist()
    if symbol < 0:
        return nothing_drawn(source)
    (log_mass,) = sampling.log_mass(source[None]).tolist()
    correction = 0.0 if target is source else float(target[symbol]) - float(source[symbol])
    return Proposed(symbol, log_mass + correction)


def _choice(log_weights: torch.Tensor, key: int) -> int:
    (index,) = sampling.draw(log_weights[None], [key]).tolist()
    return int(index)


def _uniform(key: int) -> float:
    return (key >> 11) * 2.0**-53
