from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

from genlm_backend.tokenization import Token


def test_a_token_is_its_bytes_and_its_id() -> None:
    token = Token(42, b"hello")
    assert (token.token_id, token.byte_string, len(token), token[0]) == (42, b"hello", 5, 104)
    assert type(token.byte_string) is bytes
    assert b"".join([token, Token(7, b" world")]) == b"hello world"
    assert repr(token) == "Token(token_id=42, byte_string=b'hello')"
    assert not token.is_special and not token.is_hole


def test_flags_are_shown_and_kept() -> None:
    token = Token(2, b"</s>", is_special=True)
    assert token.is_special and "is_special=True" in repr(token)
    assert Token(3, b"", is_hole=True).is_hole


def test_tokens_are_equal_by_id() -> None:
    assert Token(1, b"test") == Token(1, b"test")
    assert Token(1, b"test") == Token(1, b"other")
    assert Token(1, b"test") != Token(2, b"test")
    assert not Token(1, b"test") != Token(1, b"other")


def test_a_token_equals_plain_bytes_by_content() -> None:
    token = Token(5, b"hi")
    assert token == b"hi" and b"hi" == token
    assert token != b"ho" and b"ho" != token
    assert token != "hi" and token != 5


def test_what_is_equal_hashes_equally() -> None:
    """Past defect: `b"hi" in {token}` was false although the two were equal."""
    token = Token(5, b"hi")
    assert hash(token) == hash(b"hi")
    assert b"hi" in {token} and token in {b"hi"}
    assert hash(Token(np.int64(5), b"hi")) == hash(token)


def test_tokens_that_share_bytes_are_separate_keys() -> None:
    first, second = Token(5, b"hi"), Token(6, b"hi")
    index_of = {first: 0, second: 1}
    assert (len(index_of), index_of[first], index_of[second], index_of[Token(6, b"hi")]) == (2, 0, 1, 1)
    assert index_of[b"hi"] == 0  # type: ignore[index]  # plain bytes find the first


def test_tokens_are_ordered_by_id_and_bytes_by_content() -> None:
    early, late = Token(1, b"z"), Token(2, b"a")
    assert early < late and late > early and early <= late and late >= early and early <= early
    assert sorted([late, early]) == [early, late]
    assert early > b"a" and not early < b"a" and late <= b"a" and late >= b"a"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickling_keeps_everything(protocol: int) -> None:
    for token in (Token(42, b"\xff\x00"), Token(2, b"</s>", is_special=True), Token(3, b"", is_hole=True)):
        loaded = pickle.loads(pickle.dumps(token, protocol))
        assert repr(loaded) == repr(token) and type(loaded) is Token


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_copies_keep_everything(duplicate: object) -> None:
    token = Token(2, b"</s>", is_special=True)
    copied = duplicate(token)  # type: ignore[operator]
    assert repr(copied) == repr(token) and copied == token and copied is not token


@pytest.mark.parametrize("token_id", [np.int64(7), np.uint16(7), np.array(7)[()]])
def test_numpy_integers_are_ids(token_id: np.integer) -> None:
    token = Token(token_id, b"x")
    assert type(token.token_id) is int and token == Token(7, b"x")


@pytest.mark.parametrize("token_id", ["1", 1.0, None, True, np.float64(1), b"1"])
def test_other_ids_are_type_errors(token_id: object) -> None:
    with pytest.raises(TypeError, match="token_id"):
        Token(token_id, b"x")  # type: ignore[arg-type]


@pytest.mark.parametrize("byte_string", ["x", None, 3, bytearray(b"x"), [120]])
def test_other_byte_strings_are_type_errors(byte_string: object) -> None:
    with pytest.raises(TypeError, match="byte_string"):
        Token(1, byte_string)  # type: ignore[arg-type]


def test_plain_bytes_and_tokens_are_told_apart() -> None:
    token = Token(1, b"x")
    assert Token.is_plain_bytes(b"x") and not Token.is_plain_bytes(token) and not Token.is_plain_bytes("x")
    assert type(Token.as_bytes(token)) is bytes and Token.as_bytes(b"x") == b"x"
    marker = object()
    assert Token.as_bytes(marker) is marker  # type: ignore[arg-type,comparison-overlap]
