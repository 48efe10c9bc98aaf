"""BytePredicate: any Python function that says of bytes whether they may begin a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from genlm_backend.llm.base import AsyncLM
from genlm_backend.potentials.base import BoolRow, Constraint, State
from genlm_backend.potentials.token_bytes import Node, TokenBytes
from genlm_backend.tokenization import Token


class BytePredicate(Constraint):
    """Texts that a function accepts. Bytes, so that a token that ends within a character is no special case.

    `allows` asks the function once; `mask` asks it once for each beginning of tokens that it accepts, and their next
    bytes: up to 100,000 times for 49,152 tokens. Samplers that check tokens one by one suit costly functions.

    Args:
        llm: The model, or its vocabulary.
        may_begin: Whether some text may begin with these bytes. It must not accept a continuation of what it refused.
        is_text: Whether these bytes are a whole text; None: whatever `may_begin` accepts is one.
    """

    def __init__(
        self,
        llm: AsyncLM | Sequence[Token],
        may_begin: Callable[[bytes], bool],
        is_text: Callable[[bytes], bool] | None = None,
    ) -> None:
        self._tokens = TokenBytes.of(llm)
        self.n_tokens = self._tokens.n_tokens
        self._may_begin = may_begin
        self._is_text = is_text

    def start(self) -> State:
        return _Text(b"", bool(self._may_begin(b"")))

    def extend(self, state: State, token_id: int) -> State:
        piece = self._tokens.text_of(token_id)
        if piece is None or not state.is_alive:
            return _DEAD
        text = state.text + piece
        return _Text(text, True) if self._may_begin(text) else _DEAD

    def is_alive(self, state: State) -> bool:
        return bool(state.is_alive)

    def is_complete(self, state: State) -> bool:
        return self.is_alive(state) and (self._is_text is None or bool(self._is_text(state.text)))

    def mask(self, state: State) -> BoolRow:
        row = np.zeros(self.n_tokens + 1, np.bool_)
        pending: list[tuple[Node, bytes]] = [(self._tokens.root, state.text)] if state.is_alive else []
        while pending:
            node, text = pending.pop()
            row[node.token_ids] = True
            for byte, child in node.children.items():
                longer = text + bytes((byte,))
                if self._may_begin(longer):
                    pending.append((child, longer))
        row[self.end] = self.is_complete(state)
        return row


class _Text(NamedTuple):
    text: bytes
    is_alive: bool


_DEAD = _Text(b"", False)
