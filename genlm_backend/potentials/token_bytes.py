"""TokenBytes: a vocabulary seen from its bytes, for weights of bytes that are to be weights of tokens."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import ClassVar, NamedTuple

from genlm_backend.llm.base import AsyncLM
from genlm_backend.tokenization import Token


class Node(NamedTuple):
    """What tokens begin with: the tokens of exactly these bytes, and the longer beginnings by their next byte."""

    token_ids: list[int]
    children: dict[int, Node]


class TokenBytes:
    """The tokens that are text, by their bytes; special tokens, holes and tokens without bytes are left out.

    Attributes:
        byte_vocab: Index = token id.
        ids_of: The tokens of given bytes; several where a vocabulary has them twice.
        longest: Bytes of the longest token.
    """

    _of_model: ClassVar[weakref.WeakKeyDictionary[AsyncLM, TokenBytes]] = weakref.WeakKeyDictionary()

    def __init__(self, byte_vocab: Sequence[Token]) -> None:
        self.byte_vocab = byte_vocab
        self.n_tokens = len(byte_vocab)
        self.ids_of: dict[bytes, list[int]] = {}
        for token in byte_vocab:
            if len(token) and not token.is_special and not token.is_hole:
                self.ids_of.setdefault(token.byte_string, []).append(token.token_id)
        self.longest = max(map(len, self.ids_of), default=0)

    @classmethod
    def of(cls, llm: AsyncLM | Sequence[Token]) -> TokenBytes:
        """That of a model, made at the first call, or of a vocabulary."""
        if not isinstance(llm, AsyncLM):
            return cls(llm)
        if llm not in cls._of_model:
            cls._of_model[llm] = cls(llm.byte_vocab)
        return cls._of_model[llm]

    def text_of(self, token_id: int) -> bytes | None:
        """The bytes of a token; None if it is no text."""
        if not 0 <= token_id < self.n_tokens:
            return None
        token = self.byte_vocab[token_id]
        return None if token.is_special or not len(token) else token.byte_string

    @cached_property
    def root(self) -> Node:
        """The trie of all tokens; 0.1 s for 49,152 tokens."""
        root = Node([], {})
        for text, token_ids in self.ids_of.items():
            node = root
            for byte in text:
                following = node.children.get(byte)
                if following is None:
                    following = node.children[byte] = Node([], {})
                node = following
            node.token_ids.extend(token_ids)
        return root

    def beginning(self, text: bytes) -> Iterator[int]:
        """The tokens whose bytes are a beginning of a text, or all of it."""
        for end in range(1, min(len(text), self.longest) + 1):
            yield from self.ids_of.get(text[:end], ())
