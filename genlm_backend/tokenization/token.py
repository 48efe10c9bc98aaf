"""Token: the bytes of one vocabulary entry, together with its id.

Equality and hashing. Two tokens are equal when their ids are equal; a token equals plain bytes of the same content.
Python asks that equal objects have equal hashes, so a token hashes as its bytes do: `b"hi" in {Token(5, b"hi")}` is
true, and tokens that share their bytes stay separate keys of a dictionary, because their ids differ. Within one
vocabulary an id has one byte string, so the contract holds there without exception. It cannot hold for tokens of two
vocabularies that share an id and differ in bytes: they compare equal (by id) and hash differently, as no hash could
agree with both byte strings. Equality is not transitive either: Token(5, b"hi") == b"hi" == Token(6, b"hi").
"""

from __future__ import annotations

from operator import index
from typing import SupportsIndex, TypeGuard


class Token(bytes):
    """The bytes of one vocabulary entry, with its id; `b"".join`, `len`, indexing and `decode` work as for bytes.

    Args:
        token_id: The index of the token in a row of log-probabilities; numpy integers are accepted.
        byte_string: The bytes that the token stands for.
        is_special: The token controls the model and is no text; its bytes are its name, which must never match text.
        is_hole: No token has this id; the bytes are empty. A row has there what the model says of this id, which may be
            a probability, and -inf only where the model has no logit for it.

    Raises:
        TypeError: `token_id` is no integer, or `byte_string` is not bytes.
    """

    token_id: int
    is_special: bool = False
    is_hole: bool = False

    def __new__(
        cls, token_id: SupportsIndex, byte_string: bytes, is_special: bool = False, is_hole: bool = False
    ) -> Token:
        if type(token_id) is not int:
            token_id = _plain_integer(token_id)
        if not isinstance(byte_string, bytes):
            raise TypeError(f"byte_string must be bytes, got {byte_string!r} ({type(byte_string).__name__})")
        token = super().__new__(cls, byte_string)
        token.token_id = token_id
        if is_special:
            token.is_special = True
        if is_hole:
            token.is_hole = True
        return token

    @property
    def byte_string(self) -> bytes:
        """The bytes of the token, as plain bytes."""
        return bytes(self)

    @staticmethod
    def as_bytes(x: bytes) -> bytes:
        """The plain bytes of a token; anything else is returned as it is."""
        return x.byte_string if isinstance(x, Token) else x

    @staticmethod
    def is_plain_bytes(x: object) -> TypeGuard[bytes]:
        """Whether `x` is bytes and no token."""
        return isinstance(x, bytes) and not isinstance(x, Token)

    __hash__ = bytes.__hash__

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Token):
            return self.token_id == other.token_id
        return super().__eq__(other)

    def __ne__(self, other: object) -> bool:
        if isinstance(other, Token):
            return self.token_id != other.token_id
        return super().__ne__(other)

    def __lt__(self, other: bytes) -> bool:
        return self.token_id < other.token_id if isinstance(other, Token) else super().__lt__(other)

    def __le__(self, other: bytes) -> bool:
        return self.token_id <= other.token_id if isinstance(other, Token) else super().__le__(other)

    def __gt__(self, other: bytes) -> bool:
        return self.token_id > other.token_id if isinstance(other, Token) else super().__gt__(other)

    def __ge__(self, other: bytes) -> bool:
        return self.token_id >= other.token_id if isinstance(other, Token) else super().__ge__(other)

    def __repr__(self) -> str:
        flags = ", is_special=True" * self.is_special + ", is_hole=True" * self.is_hole
        return f"Token(token_id={self.token_id}, byte_string={self.byte_string!r}{flags})"

    def __reduce__(self) -> tuple[type[Token], tuple[int, bytes, bool, bool]]:
        return type(self), (self.token_id, self.byte_string, self.is_special, self.is_hole)


def _plain_integer(token_id: SupportsIndex) -> int:
    if isinstance(token_id, bool):
        raise TypeError("token_id must be an integer, got a bool")
    try:
        return index(token_id)
    except TypeError:
        raise TypeError(f"token_id must be an integer, got {token_id!r} ({type(token_id).__name__})") from None
