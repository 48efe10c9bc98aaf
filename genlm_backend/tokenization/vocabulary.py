"""decode_vocab: the exact bytes, and a printable string, of every token id of a tokenizer."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from genlm_backend.errors import VocabularyError
from genlm_backend.tokenization.byte_decoders import read_vocabulary
from genlm_backend.tokenization.token import Token

FALLBACKS = ("tokenizer", "latin1", "replace")
NO_TEXT = "\N{REPLACEMENT CHARACTER}"


def decode_vocab(tokenizer: Any, byte2str_fallback: str = "tokenizer") -> tuple[list[Token], list[str]]:
    """The vocabulary of a tokenizer as bytes and as strings; both are indexed by token id.

    Both lists have largest token id + 1 entries. An id that no token has is a hole: a token with empty bytes and
    `is_hole`. Special tokens carry `is_special`; their bytes are their names, and must not be matched against text.
    Tokens that share their bytes keep their own ids. Every id is checked against the tokenizer before this returns.

    Args:
        tokenizer: A transformers or `tokenizers` tokenizer, or one of sentencepiece, tiktoken or mistral-common.
        byte2str_fallback: How a token that is no valid UTF-8 is written as a string: "tokenizer" takes the
            tokenizer's own spelling, "latin1" one character per byte, "replace" U+FFFD for what is invalid.

    Returns:
        The tokens, (vocab,), and the strings, (vocab,). No string is empty: a hole, and a token without bytes that
        has no spelling either, is written as U+FFFD.

    Raises:
        ValueError: `byte2str_fallback` is none of the three.
        VocabularyError: The bytes of some token cannot be told, or contradict what the tokenizer does.
    """
    if byte2str_fallback not in FALLBACKS:
        raise ValueError(f"Unknown byte2str_fallback: {byte2str_fallback!r}; expected one of {FALLBACKS}")
    byte_strings, pieces, special_ids = read_vocabulary(tokenizer)
    if not byte_strings:
        raise VocabularyError("it has no tokens")
    width = max(byte_strings) + 1
    with _no_collection():
        byte_vocab = [
            Token(token_id, byte_strings[token_id], token_id in special_ids)
            if token_id in byte_strings
            else Token(token_id, b"", is_hole=True)
            for token_id in range(width)
        ]
    str_vocab = [
        _text(byte_strings[token_id], pieces[token_id], byte2str_fallback) if token_id in byte_strings else NO_TEXT
        for token_id in range(width)
    ]
    return byte_vocab, str_vocab


def get_byte_vocab(tokenizer: Any) -> list[bytes]:
    """The plain bytes of every token id, (vocab,); empty for a hole.

    Raises:
        VocabularyError: As `decode_vocab`.
    """
    return [token.byte_string for token in decode_vocab(tokenizer)[0]]


def _text(byte_string: bytes, piece: str, fallback: str) -> str:
    try:
        text = byte_string.decode()
    except UnicodeDecodeError:
        if fallback == "tokenizer":
            text = piece
        else:
            text = byte_string.decode("latin1") if fallback == "latin1" else byte_string.decode(errors="replace")
    return text or piece or NO_TEXT


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage is collected meanwhile: every token is kept, and looking for garbage among them takes 0.3 s of 1 s."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
