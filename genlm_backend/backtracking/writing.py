"""Text to tokens and back, as bytes: what a splice writes, what a path reads as."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Sequence

from genlm_backend.llm.base import AsyncLM

_SPELLINGS: weakref.WeakKeyDictionary[AsyncLM, dict[bytes, int]] = weakref.WeakKeyDictionary()


def bytes_of(llm: AsyncLM, token_ids: Sequence[int], eos: Collection[int] = (), cut: int = 0) -> bytes:
    """The bytes of the text of some tokens without its last `cut`; those that are no text have none."""
    vocab = llm.byte_vocab
    text = b"".join([vocab[i].byte_string for i in token_ids if i not in eos and not vocab[i].is_special])
    return text[: max(0, len(text) - cut)]


def text_of(llm: AsyncLM, token_ids: Sequence[int], eos: Collection[int] = (), cut: int = 0) -> str:
    """The text of some tokens without its last `cut` bytes; bytes that are no UTF-8 are written as U+FFFD."""
    return bytes_of(llm, token_ids, eos, cut).decode("utf-8", "replace")


def whole_characters(text: bytes) -> int:
    """How many bytes of a text belong to characters that are complete."""
    for n_last in range(1, min(4, len(text)) + 1):
        lead = text[-n_last]
        if lead & 0xC0 != 0x80:  # not a continuation byte: the last character begins here
            n_bytes = 4 if lead >= 0xF0 else 3 if lead >= 0xE0 else 2 if lead >= 0xC0 else 1
            return len(text) if n_last >= n_bytes else len(text) - n_last
    return len(text)


def write(
    llm: AsyncLM, text: bytes, before: int | None, encode: Callable[[bytes], Sequence[int]] | None = None
) -> tuple[tuple[int, ...], int]:
    """Tokens for a text, and how many bytes of them rewrite the token before it.

    A text is tokenised together with the token before it; where that would be another token (the tokenizer joins across
    the seam), the tokens given replace it.

    Args:
        llm: Whose tokens.
        text: What to write.
        before: The token before it; None if there is none, or none that may change.
        encode: The tokenizer on bytes; None takes that of the model, or, without one or where it does not give back the
            same bytes, the longest tokens that fit, from the left.
    """
    vocab = llm.byte_vocab
    if before is None or vocab[before].is_special or not vocab[before]:
        return tuple(_encoded(llm, text, encode)), 0
    old = vocab[before].byte_string
    joined = _encoded(llm, old + text, encode)
    if joined and joined[0] == before:
        return tuple(joined[1:]), 0
    return tuple(joined), len(old)


def _encoded(llm: AsyncLM, text: bytes, encode: Callable[[bytes], Sequence[int]] | None) -> list[int]:
    if encode is not None:
        return list(encode(text))
    if llm.tokenizer is not None:
        try:
            token_ids = list(llm.tokenizer.encode(text.decode(), add_special_tokens=False))
        except UnicodeDecodeError:
            token_ids = []
        if b"".join(llm.byte_vocab[i].byte_string for i in token_ids) == text:
            return token_ids
    return _longest_tokens(llm, text)


def _longest_tokens(llm: AsyncLM, text: bytes) -> list[int]:
    spellings = _SPELLINGS.get(llm)
    if spellings is None:
        spellings = {}
        for token in llm.byte_vocab:
            if not (token.is_special or token.is_hole):
                spellings.setdefault(token.byte_string, token.token_id)
        _SPELLINGS[llm] = spellings
    longest = max(map(len, spellings))
    token_ids: list[int] = []
    while text:
        n = next((n for n in range(min(longest, len(text)), 0, -1) if text[:n] in spellings), 0)
        if not n:
            raise ValueError(f"the vocabulary has no token for the byte {text[0]:#04x}")
        token_ids.append(spellings[text[:n]])
        text = text[n:]
    return token_ids
