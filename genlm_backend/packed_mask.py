"""Masks of one bit a token: an eighth of the memory to make, to copy and to read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from genlm_backend.errors import InvalidQuery

Words = npt.NDArray[np.uint32]

WORD_BITS = 32


@dataclass(frozen=True, eq=False)
class PackedMask:
    """Which tokens are allowed. Not to be changed: whoever asks about it may read it later.

    Raises:
        InvalidQuery: The words do not fit the number of tokens.

    Attributes:
        words: `(ceil(n_tokens / 32),)` uint32; bit v % 32 of word v // 32 is token v, bits beyond the last token are 0.
        n_tokens: Number of tokens.
    """

    words: Words
    n_tokens: int

    def __post_init__(self) -> None:
        is_array = isinstance(self.words, np.ndarray)
        if not is_array or self.words.dtype != np.uint32 or self.words.shape != (n_words(self.n_tokens),):
            came = f"{self.words.dtype} of shape {self.words.shape}" if is_array else type(self.words).__name__
            raise InvalidQuery(
                f"the words of a packed mask of {self.n_tokens} tokens are {came}; expected uint32 of shape "
                f"({n_words(self.n_tokens)},), as PackedMask.of(mask) makes them"
            )

    @classmethod
    def of(cls, allowed: npt.NDArray[np.bool_]) -> Self:
        """Of a `(n_tokens,)` bool mask."""
        return cls(pack(allowed), len(allowed))

    def unpacked(self) -> npt.NDArray[np.bool_]:
        """`(n_tokens,)` bool."""
        return unpack(self.words, self.n_tokens)

    def any(self) -> bool:
        """Whether a token is allowed."""
        return bool(self.words.any())


class LateMask(NamedTuple):
    """A packed mask that is made, with others, in another thread when somebody begins; who needs it waits for them.

    Attributes:
        n_tokens: Number of tokens.
        begin: Has all of them made; called again, or from another thread, it does nothing.
        made: Masks, or what was raised instead.
        place: Of this one among them.
    """

    n_tokens: int
    begin: Callable[[], None]
    made: Future[Sequence[PackedMask | Exception]]
    place: int

    def result(self, timeout_s: float | None = None) -> PackedMask:
        """The mask, when it is made.

        Raises:
            TimeoutError: It was not made in time.
            Exception: What the constraint raised.
        """
        self.begin()
        outcome = self.made.result(timeout_s)[self.place]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def allows_nothing(self) -> bool:
        """Whether it could be made, and allows no token; waits for it."""
        self.begin()
        outcome = self.made.result()[self.place]
        return isinstance(outcome, PackedMask) and not outcome.any()


def pack(allowed: npt.NDArray[np.bool_]) -> Words:
    """`(..., n)` bool as `(..., ceil(n / 32))` uint32."""
    *shape, n = allowed.shape
    octets = np.packbits(allowed, axis=-1, bitorder="little")
    padded = np.zeros((*shape, n_words(n) * 4), np.uint8)
    padded[..., : octets.shape[-1]] = octets
    return padded.view(np.uint32)


def unpack(words: Words, n: int) -> npt.NDArray[np.bool_]:
    """`(..., n)` bool from `(..., ceil(n / 32))` uint32."""
    bits = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1, count=n, bitorder="little")
    return bits.view(np.bool_)


def n_words(n: int) -> int:
    """Words that hold `n` bits."""
    return -(-n // WORD_BITS)
