"""Masks of one bit a token, against the bools they stand for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from genlm_backend.errors import InvalidQuery
from genlm_backend.packed_mask import PackedMask, n_words, pack, unpack


@pytest.mark.parametrize("n", [0, 1, 8, 31, 32, 33, 100])
def test_bools_come_back(n: int) -> None:
    allowed = np.random.default_rng(n).random((3, n)) < 0.5
    words = pack(allowed)
    assert words.shape == (3, n_words(n)) and words.dtype == np.uint32
    assert unpack(words, n).tolist() == allowed.tolist()
    assert unpack(words[:, :1], min(n, 32)).tolist() == allowed[:, :32].tolist()
    mask = PackedMask.of(allowed[0])
    assert mask.unpacked().tolist() == allowed[0].tolist() and mask.any() == allowed[0].any()


def test_the_bit_of_a_token_is_where_it_is_said_to_be() -> None:
    for token_id in (0, 5, 31, 32, 70):
        words = pack(np.arange(71) == token_id)
        assert [int(word) for word in words] == [1 << token_id % 32 if i == token_id // 32 else 0 for i in range(3)]


@pytest.mark.parametrize(
    "words", [[1], np.array([1]), np.zeros(2, np.uint32), np.zeros((1, 1), np.uint32), np.zeros(1, np.int32)], ids=repr
)
def test_words_that_do_not_fit_are_refused(words: Any) -> None:
    with pytest.raises(InvalidQuery, match=r"expected uint32 of shape \(1,\)"):
        PackedMask(words, 7)


def test_a_mask_is_only_itself() -> None:
    """Draws under one mask are found by its identity, and a question that holds one can be compared."""
    one, other = (PackedMask.of(np.ones(3, np.bool_)) for _ in range(2))
    assert one == one and one != other and len({one, other}) == 2
