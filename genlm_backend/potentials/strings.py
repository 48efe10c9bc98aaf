"""StringSet: a finite set of texts."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from genlm_backend.llm.base import AsyncLM
from genlm_backend.potentials.base import BoolRow, Constraint, State
from genlm_backend.potentials.token_bytes import TokenBytes
from genlm_backend.tokenization import Token


class StringSet(Constraint):
    """The given texts, in every segmentation into tokens.

    A mask costs one look-up for each byte of the texts that are still possible, up to the longest token.

    Args:
        llm: The model, or its vocabulary.
        texts: Strings, as UTF-8, or bytes. None at all leaves nothing possible.
    """

    def __init__(self, llm: AsyncLM | Sequence[Token], texts: Iterable[str | bytes]) -> None:
        self._tokens = TokenBytes.of(llm)
        self.n_tokens = self._tokens.n_tokens
        encoded = {text.encode() if isinstance(text, str) else bytes(text) for text in texts}
        self.texts = sorted(encoded)

    def start(self) -> State:
        return _Range(b"", 0, len(self.texts))

    def extend(self, state: State, token_id: int) -> State:
        piece = self._tokens.text_of(token_id)
        if piece is None or state.first == state.last:
            return _NOTHING
        prefix = state.prefix + piece
        first = bisect_left(self.texts, prefix, state.first, state.last)
        after = _after(prefix)
        last = state.last if after is None else bisect_left(self.texts, after, first, state.last)
        return _Range(prefix, first, last) if first < last else _NOTHING

    def is_alive(self, state: State) -> bool:
        return bool(state.first < state.last)

    def is_complete(self, state: State) -> bool:
        return self.is_alive(state) and len(self.texts[state.first]) == len(state.prefix)

    def mask(self, state: State) -> BoolRow:
        row = np.zeros(self.n_tokens + 1, np.bool_)
        n_read, longest = len(state.prefix), self._tokens.longest
        for text in {text[n_read : n_read + longest] for text in self.texts[state.first : state.last]}:
            row[list(self._tokens.beginning(text))] = True
        row[self.end] = self.is_complete(state)
        return row


class _Range(NamedTuple):
    """The texts that begin with `prefix`: from `first` up to `last`."""

    prefix: bytes
    first: int
    last: int


_NOTHING = _Range(b"", 0, 0)


def _after(prefix: bytes) -> bytes | None:
    """The least text above all that begin with `prefix`; None if there is none."""
    kept = prefix.rstrip(b"\xff")
    return kept[:-1] + bytes([kept[-1] + 1]) if kept else None
