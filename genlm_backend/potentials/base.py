"""Potential: non-negative weights of token sequences, in logs; what samplers draw from and weigh by.

A potential gives every sequence x of tokens two weights. `complete` is that of x as a whole text. `prefix` is that of x
as a beginning: for a language model the total weight of all texts that begin with x; for a constraint 0 (log of 1)
where x can still become a text of the language, -inf where it cannot.

    logw_next(x)[y]   = prefix(x y)  - prefix(x)        for a token y, 0 <= y < n_tokens
    logw_next(x)[end] = complete(x)  - prefix(x)        end = n_tokens: the column after the last token

So a row has n_tokens + 1 columns, and drawing from it is `sampling.draw`: token `end` means the text is over. How a
model says that it ends (one end token or several) is the business of `LanguageModel`: their mass stands in column
`end`, and their own columns are -inf; a constraint need not know them. Multiplying potentials is adding rows.

Sequences are named by states. `start()` is the state of the empty sequence and `extend(state, token_id)` that of the
sequence with one more token. A state is a value: it is never changed, extending it leaves it as it was, so a fork of a
particle is the same state twice and a rollback is an older one. What a state is made of is the potential's own; only
hand it back to the potential it came from.

    state = potential.start()
    row = await potential.logw_next(state)              # (n_tokens + 1,) float32, nats
    (symbol,) = sampling.draw(row[None], [key]).tolist()
    if symbol != potential.end:
        state = potential.extend(state, symbol)

Which question is cheap depends on the potential:

- whole rows: `logw_next`, and `batch_logw_next` for a population at once (one forward; threads for a grammar);
- a few tokens: `logw_tokens(state, symbols)`; a constraint answers `allows(state, symbol)` at once, without awaiting
  and without a mask over the vocabulary (what AWRS and sample-then-check ask);
- a `Constraint` also has `mask(state)` and `masks(states)` as bools, `is_complete(state)`, and `forced(state)`: tokens
  without an alternative, which need no forward to be chosen. `Product(...).factors` are the parts of a product, so a
  sampler can find the constraints among them.

Laws, which `genlm_backend.testing.check_potential` holds a potential to: the two equations above; a dead prefix stays
dead; batch equals single; a state outlives its extensions.
"""

from __future__ import annotations

import asyncio
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, final

import numpy as np
import numpy.typing as npt
import torch

from genlm_backend.errors import InvalidQuery
from genlm_backend.packed_mask import Words, pack

State = Any
"""The potential's own; immutable."""

BoolRow = npt.NDArray[np.bool_]

_MOST_FORCED = 1024


class Potential(ABC):
    """Log-weights of token sequences; see the top of this file.

    Attributes:
        n_tokens: Token ids are 0 to `n_tokens - 1`.
    """

    n_tokens: int

    @property
    def end(self) -> int:
        """The column of a row that holds the weight of ending here."""
        return self.n_tokens

    @abstractmethod
    def start(self) -> State:
        """The state of the empty sequence."""

    @abstractmethod
    def extend(self, state: State, token_id: int) -> State:
        """The state of the sequence with one more token; `state` stays as it is. A dead state stays dead."""

    @abstractmethod
    async def prefix(self, state: State) -> float:
        """Log-weight of the sequence as a beginning, nats; -inf where nothing can follow."""

    @abstractmethod
    async def complete(self, state: State) -> float:
        """Log-weight of the sequence as a whole text, nats."""

    @abstractmethod
    async def logw_next(self, state: State) -> torch.Tensor:
        """`(n_tokens + 1,)` float32, nats: what each token, or ending, multiplies the weight by. All -inf if dead."""

    async def logw_tokens(self, state: State, symbols: Sequence[int]) -> torch.Tensor:
        """Columns of `logw_next(state)`: `(len(symbols),)` float32; `end` is a symbol too."""
        row = await self.logw_next(state)
        return row[torch.tensor(symbols, dtype=torch.int64, device=row.device)]

    async def batch_prefix(self, states: Sequence[State]) -> list[float]:
        """`prefix` of each."""
        return list(await asyncio.gather(*(self.prefix(state) for state in states)))

    async def batch_complete(self, states: Sequence[State]) -> list[float]:
        """`complete` of each."""
        return list(await asyncio.gather(*(self.complete(state) for state in states)))

    async def batch_logw_next(self, states: Sequence[State]) -> torch.Tensor:
        """`(len(states), n_tokens + 1)` float32: `logw_next` of each."""
        if not states:
            return torch.empty(0, self.n_tokens + 1)
        return torch.stack(await asyncio.gather(*(self.logw_next(state) for state in states)))

    @final
    def state_of(self, token_ids: Sequence[int]) -> State:
        """The state of a whole sequence."""
        state = self.start()
        for token_id in token_ids:
            state = self.extend(state, token_id)
        return state


class Constraint(Potential):
    """A potential whose weights are 0 or 1: a set of texts, and the beginnings that can still become one of them.

    Nothing here waits: every method but those of `Potential` is an ordinary function.

    Attributes:
        is_thread_safe: Whether its methods may be called in several threads at once, and ask no model; then SMC has its
            masks made while the model computes.
    """

    is_thread_safe: bool = False

    @abstractmethod
    def is_alive(self, state: State) -> bool:
        """Whether the sequence can still become a text of the set."""

    @abstractmethod
    def is_complete(self, state: State) -> bool:
        """Whether the sequence is a text of the set."""

    @abstractmethod
    def mask(self, state: State) -> BoolRow:
        """`(n_tokens + 1,)` bool, the caller's own: the tokens that may follow; column `end`: whether it may end."""

    def masks(self, states: Sequence[State]) -> npt.NDArray[np.bool_]:
        """`(len(states), n_tokens + 1)` bool: `mask` of each."""
        if not states:
            return np.empty((0, self.n_tokens + 1), np.bool_)
        return np.stack([self.mask(state) for state in states])

    def packed_masks(self, states: Sequence[State]) -> Words:
        """`(len(states), ceil((n_tokens + 1) / 32))` uint32, the caller's own: `masks`, as in `PackedMask`.

        Raises:
            InvalidQuery: `masks` gave something else.
        """
        masks, shape = self.masks(states), (len(states), self.n_tokens + 1)
        if masks.shape != shape or masks.dtype != np.bool_:
            raise InvalidQuery(
                f"{type(self).__name__}.masks gave {masks.dtype} of shape {masks.shape}; expected bool of shape "
                f"{shape}, a column for each token and one for ending"
            )
        return pack(masks)

    def allows(self, state: State, symbol: int) -> bool:
        """Whether this token may follow, or with `end` whether it may end: `mask(state)[symbol]`, usually cheaper."""
        if symbol == self.end:
            return self.is_complete(state)
        return self.is_alive(self.extend(state, symbol))

    def forced(self, state: State) -> tuple[int, ...]:
        """Tokens that every text of the set must go on with, one after the other; () where there is a choice.

        At most 1,024: a grammar may force text without end. Ask again after them.
        """
        tokens: list[int] = []
        while len(tokens) < _MOST_FORCED and (only := _only_choice(self.mask(state))) is not None and only != self.end:
            tokens.append(only)
            state = self.extend(state, only)
        return tuple(tokens)

    def foreseen(self, state: State) -> Sequence[int]:
        """Tokens with which every text of the set goes on, as they are likely to be cut; a guess, () where none.

        Whoever asks a model about the state asks about these along with it, so that no forward pass is made for text
        that has no alternative.
        """
        return ()

    @final
    async def prefix(self, state: State) -> float:
        return _log_of(self.is_alive(state))

    @final
    async def complete(self, state: State) -> float:
        return _log_of(self.is_complete(state))

    @final
    async def logw_next(self, state: State) -> torch.Tensor:
        return log_row(self.mask(state))

    @final
    async def logw_tokens(self, state: State, symbols: Sequence[int]) -> torch.Tensor:
        return torch.tensor([_log_of(self.allows(state, symbol)) for symbol in symbols], dtype=torch.float32)

    @final
    async def batch_logw_next(self, states: Sequence[State]) -> torch.Tensor:
        return log_row(self.masks(states))


def log_row(allowed: BoolRow) -> torch.Tensor:
    """0 where allowed and -inf elsewhere; float32, the shape of `allowed`."""
    return torch.zeros(allowed.shape).masked_fill_(torch.from_numpy(~allowed), -math.inf)


def _log_of(truth: bool) -> float:
    return 0.0 if truth else -math.inf


def _only_choice(allowed: BoolRow) -> int | None:
    return int(allowed.argmax()) if np.count_nonzero(allowed) == 1 else None
