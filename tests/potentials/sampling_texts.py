"""Texts drawn under a constraint from random logits that like to come to an end: fast, and of every shape."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from genlm_backend.potentials import Constraint
from genlm_backend.tokenization import Token

CLOSERS = (b'"', b"}", b"]", b"@", b":", b".", b"a")  # without some of these, addresses and links have no end


class RandomWriter:
    """Noise, short tokens, and with time more and more brackets that close."""

    def __init__(self, byte_vocab: Sequence[Token], seed: int) -> None:
        self.pieces = [token.byte_string for token in byte_vocab]
        self.rng = np.random.default_rng(seed)
        self.closing = np.array([piece in CLOSERS for piece in self.pieces] + [True], float)
        blank = np.array([not piece.strip() for piece in self.pieces] + [False], float)
        self.taste = -0.2 * np.array([len(piece) for piece in self.pieces] + [1]) - 4 * blank

    def write(self, constraint: Constraint, max_tokens: int = 400) -> bytes | None:
        """A text of the constraint; None if it did not end."""
        state, text = constraint.start(), []
        for step in range(max_tokens):
            mask = constraint.mask(state)
            assert mask.any(), f"a dead end after {b''.join(text)!r}"
            score = self.taste + self.closing * step / 3 + 2 * self.rng.gumbel(size=len(mask))
            symbol = int(np.where(mask, score, -np.inf).argmax())
            if symbol == constraint.end:
                return b"".join(text)
            text.append(self.pieces[symbol])
            state = constraint.extend(state, symbol)
        return None
