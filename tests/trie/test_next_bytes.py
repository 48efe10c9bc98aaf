"""NextByteTokens: the mass of each next byte, against enumeration."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genlm_backend.errors import WeightsMismatch
from genlm_backend.tokenization import Token
from genlm_backend.trie import NextByteTokens, TokenCharacterTrie
from tests.trie.oracle import REDUCE, log_weights

flagged = st.lists(st.tuples(st.text("abc", max_size=4).map(str.encode), st.booleans()), min_size=1, max_size=12)


@settings(deadline=None, max_examples=25)
@given(flagged, st.text("abc", max_size=2).map(str.encode), st.data())
def test_next_bytes_have_the_mass_of_the_tokens_that_go_on_so(
    entries: list[tuple[bytes, bool]], prefix: bytes, data: st.DataObject
) -> None:
    vocabulary = [Token(i, word, is_special=special) for i, (word, special) in enumerate(entries)]
    row = np.array(data.draw(st.lists(log_weights, min_size=len(entries), max_size=len(entries))))

    def log_mass(is_meant: list[bool]) -> float:
        return REDUCE["logsumexp"]([float(w) for w, meant in zip(row, is_meant, strict=True) if meant])

    text = [token.startswith(prefix) and not token.is_special for token in vocabulary]
    expected = [
        log_mass(
            [
                is_text and token[len(prefix) : len(prefix) + 1] == bytes([b])
                for token, is_text in zip(vocabulary, text, strict=True)
            ]
        )
        for b in range(256)
    ]
    ends = log_mass([is_text and len(token) == len(prefix) for token, is_text in zip(vocabulary, text, strict=True)])
    no_text = log_mass([token.is_special and not prefix for token in vocabulary])
    question = NextByteTokens(TokenCharacterTrie(vocabulary), prefix)
    found = question.log_masses(row)
    np.testing.assert_allclose(found.log_masses, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose([found.log_ends, found.log_no_text], [ends, no_text], rtol=1e-12, atol=1e-12)
    for rows in (np.stack([row, row]), torch.tensor(np.stack([row, row]))):
        batch = question.log_masses(rows)
        assert type(batch.log_masses) is type(rows) and batch.log_masses.shape == (2, 256)
        np.testing.assert_allclose(np.asarray(batch.log_masses[1]), expected, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(np.asarray(batch.log_no_text), [no_text, no_text], rtol=1e-12, atol=1e-12)


def test_all_mass_is_told_once() -> None:
    vocabulary = [
        Token(0, b"<s>", is_special=True),
        Token(1, b"a"),
        Token(2, b"ab"),
        Token(3, b"", is_hole=True),
        Token(4, b"\xff"),
    ]
    row = torch.tensor([0.1, 0.2, 0.3, 0.0, 0.4]).log()
    found = NextByteTokens(TokenCharacterTrie(vocabulary)).log_masses(row)
    assert found.log_masses.dtype == torch.float32
    assert float(found.log_no_text.exp()) == pytest.approx(0.1) and float(found.log_ends) == -math.inf
    assert float(found.log_masses[ord("<")]) == -math.inf
    total = torch.cat([found.log_masses, found.log_ends[None], found.log_no_text[None]]).logsumexp(0)
    assert float(total) == pytest.approx(0, abs=1e-6)


def test_no_token_starts_with_the_prefix() -> None:
    found = NextByteTokens(TokenCharacterTrie([b"cat"]), b"dog").log_masses([[0.0], [-1.0]])
    assert np.all(found.log_masses == -np.inf) and found.log_ends.tolist() == [-math.inf, -math.inf]


def test_letters_that_are_no_bytes_are_no_text() -> None:
    end = object()
    found = NextByteTokens(TokenCharacterTrie([b"a", (end,), (256,)])).log_masses(np.log([0.5, 0.25, 0.25]))
    assert found.log_masses[ord("a")] == pytest.approx(math.log(0.5))
    assert found.log_no_text == pytest.approx(math.log(0.5)) and found.log_ends == -math.inf


def test_rows_of_another_width_are_refused() -> None:
    with pytest.raises(WeightsMismatch):
        NextByteTokens(TokenCharacterTrie([b"cat"])).log_masses(torch.zeros(2, 2))
