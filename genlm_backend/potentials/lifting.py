"""Lifted: a potential over bytes as one over the tokens of a vocabulary."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from genlm_backend.errors import InvalidPotential
from genlm_backend.llm.base import AsyncLM
from genlm_backend.potentials.base import Potential, State
from genlm_backend.potentials.token_bytes import Node, TokenBytes
from genlm_backend.tokenization import Token

N_BYTES = 256


class Lifted(Potential):
    """The weight of a sequence of tokens is that of its bytes. Special tokens have none.

    A row asks the byte potential at every beginning of tokens that is possible, those of one length at once.

    Args:
        potential: Over bytes: its token `b` is the byte `b`, so it has 256.
        llm: The model, or its vocabulary.

    Raises:
        InvalidPotential: The potential is not over 256 tokens.
    """

    def __init__(self, potential: Potential, llm: AsyncLM | Sequence[Token]) -> None:
        if potential.n_tokens != N_BYTES:
            raise InvalidPotential(f"a potential over {potential.n_tokens} tokens", f"one over the {N_BYTES} bytes")
        self.potential = potential
        self._tokens = TokenBytes.of(llm)
        self.n_tokens = self._tokens.n_tokens

    def start(self) -> State:
        return self.potential.start()

    def extend(self, state: State, token_id: int) -> State:
        """None is the dead state: special tokens are no bytes."""
        piece = self._tokens.text_of(token_id)
        if state is None or piece is None:
            return None
        for byte in piece:
            state = self.potential.extend(state, byte)
        return state

    async def prefix(self, state: State) -> float:
        return -math.inf if state is None else await self.potential.prefix(state)

    async def complete(self, state: State) -> float:
        return -math.inf if state is None else await self.potential.complete(state)

    async def logw_next(self, state: State) -> torch.Tensor:
        row = torch.full((self.n_tokens + 1,), -math.inf)
        level: list[tuple[Node, State, float]] = [] if state is None else [(self._tokens.root, state, 0.0)]
        is_first = True
        while level:
            weights = await self.potential.batch_logw_next([at for _, at, _ in level])
            if is_first:
                row[self.end] = weights[0, self.potential.end]
                is_first = False
            following: list[tuple[Node, State, float]] = []
            for (node, at, logw), next_bytes in zip(level, weights.tolist(), strict=True):
                for byte, child in node.children.items():
                    total = logw + next_bytes[byte]
                    if total > -math.inf:
                        row[child.token_ids] = total
                        if child.children:
                            following.append((child, self.potential.extend(at, byte), total))
            level = following
        return row

    async def logw_tokens(self, state: State, symbols: Sequence[int]) -> torch.Tensor:
        """Asked for each symbol alone: differences of prefixes."""
        before = await self.prefix(state)
        if before == -math.inf:
            return torch.full((len(symbols),), -math.inf)
        extended = [None if symbol == self.end else self.extend(state, symbol) for symbol in symbols]
        after = [
            await (self.complete(state) if symbol == self.end else self.prefix(longer))
            for symbol, longer in zip(symbols, extended, strict=True)
        ]
        return torch.tensor([logw - before for logw in after], dtype=torch.float32)
