"""Products and powers of potentials."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence

import torch

from genlm_backend.errors import InvalidPotential
from genlm_backend.potentials.base import Constraint, Potential, State


class Product(Potential):
    """The product of the weights of its factors: log-weights add.

    A constraint is asked before anything that has to be awaited; where it allows nothing, the others are not asked.

    Args:
        *factors: Potentials over the same tokens; a product among them is taken apart.

    Attributes:
        factors: Two or more, in order; a state is the tuple of theirs.

    Raises:
        InvalidPotential: Fewer than two factors, or their vocabularies differ in size.
    """

    factors: list[Potential]

    def __init__(self, *factors: Potential) -> None:
        flat: list[Potential] = []
        for factor in factors:
            flat.extend(factor.factors if isinstance(factor, Product) else [factor])
        sizes = sorted({factor.n_tokens for factor in flat})
        if len(flat) < 2 or len(sizes) != 1:
            raise InvalidPotential(
                f"a product of {len(flat)} potentials over vocabularies of {sizes} tokens",
                "two or more potentials over one vocabulary",
            )
        self.factors = flat
        self.n_tokens = sizes[0]
        self._constraints = [i for i, factor in enumerate(flat) if isinstance(factor, Constraint)]
        self._others = [i for i, factor in enumerate(flat) if not isinstance(factor, Constraint)]

    def start(self) -> State:
        return tuple(factor.start() for factor in self.factors)

    def extend(self, state: State, token_id: int) -> State:
        return tuple([factor.extend(part, token_id) for factor, part in zip(self.factors, state, strict=True)])

    async def prefix(self, state: State) -> float:
        return await self._sum(state, lambda factor, part: factor.prefix(part))

    async def complete(self, state: State) -> float:
        return await self._sum(state, lambda factor, part: factor.complete(part))

    async def logw_next(self, state: State) -> torch.Tensor:
        return (await self.batch_logw_next([state]))[0]

    async def logw_tokens(self, state: State, symbols: Sequence[int]) -> torch.Tensor:
        total = torch.zeros(len(symbols))
        for i in self._constraints:
            total = total + await self.factors[i].logw_tokens(state[i], symbols)
        if total.isneginf().all():
            return total
        asked = [self.factors[i].logw_tokens(state[i], symbols) for i in self._others]
        for logw in await asyncio.gather(*asked):
            total = total.to(logw.device) + logw
        return total

    async def batch_logw_next(self, states: Sequence[State]) -> torch.Tensor:
        rows = torch.zeros(len(states), self.n_tokens + 1)
        for i in self._constraints:
            rows += await self.factors[i].batch_logw_next([state[i] for state in states])
        alive = [j for j, is_dead in enumerate(rows.isneginf().all(1).tolist()) if not is_dead]
        if not alive or not self._others:
            return rows
        asked = [self.factors[i].batch_logw_next([states[j][i] for j in alive]) for i in self._others]
        weights = await asyncio.gather(*asked)
        rows = rows.to(weights[0].device)
        for logw in weights:
            rows[alive] += logw
        return rows

    async def _sum(self, state: State, ask: Callable[[Potential, State], Awaitable[float]]) -> float:
        total = 0.0
        for i in self._constraints:
            total += await ask(self.factors[i], state[i])
        if total == -math.inf or not self._others:
            return total
        return total + sum(await asyncio.gather(*(ask(self.factors[i], state[i]) for i in self._others)))


class Tempered(Potential):
    """The weights of a potential to a power: log-weights times `power`. Not normalised.

    Args:
        potential: What is tempered.
        power: Finite, above 0; a temperature T is the power 1 / T.

    Raises:
        InvalidPotential: The power is not finite or not above 0.
    """

    def __init__(self, potential: Potential, power: float) -> None:
        if not (math.isfinite(power) and power > 0):
            raise InvalidPotential(f"the power {power!r}", "a finite number above 0")
        self.potential = potential
        self.power = float(power)
        self.n_tokens = potential.n_tokens

    def start(self) -> State:
        return self.potential.start()

    def extend(self, state: State, token_id: int) -> State:
        return self.potential.extend(state, token_id)

    async def prefix(self, state: State) -> float:
        return self.power * await self.potential.prefix(state)

    async def complete(self, state: State) -> float:
        return self.power * await self.potential.complete(state)

    async def logw_next(self, state: State) -> torch.Tensor:
        return self.power * await self.potential.logw_next(state)

    async def logw_tokens(self, state: State, symbols: Sequence[int]) -> torch.Tensor:
        return self.power * await self.potential.logw_tokens(state, symbols)

    async def batch_logw_next(self, states: Sequence[State]) -> torch.Tensor:
        return self.power * await self.potential.batch_logw_next(states)
