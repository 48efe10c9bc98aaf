"""Characters: the text of a walk as whole characters, whatever bytes its tokens end with, and which token has which."""

from __future__ import annotations

from typing import Any, NamedTuple


class Characters(NamedTuple):
    """The end of a text.

    Attributes:
        tail: Its last characters.
        partial: Bytes of a character that is not complete.
        tokens: How many characters began in each token, newest first, as nested pairs (n, older); what is no text
            takes one off that it left partial.
    """

    tail: str = ""
    partial: bytes = b""
    tokens: tuple[int, Any] | None = None

    def extended(self, piece: bytes, n_kept: int, fold: bool) -> tuple[Characters, str]:
        """The text with one more token, and the characters that it completes.

        Args:
            piece: The bytes of the token.
            n_kept: Length of the tail.
            fold: Without case.
        """
        new, partial = decoded(self.partial + piece)
        if fold:
            new = new.casefold()
        tail = (self.tail + new)[-n_kept:]
        n_begun = len(new) - bool(self.partial) + bool(partial)
        return Characters(tail, partial, (n_begun, self.tokens)), new

    def broken(self) -> Characters:
        """The text after something that is no text: nothing continues across it, nor is a partial character one."""
        return Characters("", b"", (-bool(self.partial), self.tokens))

    def n_tokens(self, n_characters: int) -> int:
        """In how many of the last tokens so many last characters began, a partial one besides; at most in all."""
        n, chain = 0, self.tokens
        n_characters += bool(self.partial)
        while n_characters > 0 and chain is not None:
            n_characters -= chain[0]
            chain = chain[1]
            n += 1
        return n


def decoded(data: bytes) -> tuple[str, bytes]:
    """The characters of some UTF-8, and the bytes of one that is not complete; what is no UTF-8 becomes U+FFFD."""
    try:
        return data.decode(), b""
    except UnicodeDecodeError:
        pass
    for n in range(1, min(3, len(data)) + 1):
        lead = data[-n]
        if lead & 0xC0 != 0x80:
            needed = 4 if lead >= 0xF0 else 3 if lead >= 0xE0 else 2 if lead >= 0xC0 else 1
            if needed > n:
                return data[:-n].decode("utf-8", "replace"), data[-n:]
            break
    return data.decode("utf-8", "replace"), b""


def n_bytes_of(data: bytes, n_characters: int, fold: bool) -> int:
    """How many of the first bytes of some UTF-8 are so many characters, with `fold` those of the text without case."""
    n = 0
    while n < len(data):
        text, _ = decoded(data[:n])
        if len(text.casefold() if fold else text) >= n_characters:
            break
        n += 1
    return n


def is_word(character: str) -> bool:
    """Whether a character belongs to words: a letter, a digit, or the underscore."""
    return character.isalnum() or character == "_"
