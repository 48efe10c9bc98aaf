"""Sets of strings, predicates on bytes, and potentials over bytes as ones over tokens."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from genlm_backend.errors import InvalidPotential
from genlm_backend.llm import MockAsyncLM
from genlm_backend.potentials import BytePredicate, Constraint, Grammar, GrammarVocabulary, Lifted, StringSet, Tempered
from genlm_backend.testing import check_potential
from genlm_backend.tokenization import Token
from tests.potentials.tables import Table, log

WORDS = [b"a", b"b", b"ab", b"\xff", b"\xff\xff", b"abc", b"c", b"ab"]
VOCABULARY = [
    *(Token(i, word) for i, word in enumerate(WORDS)),
    Token(8, b"<s>", is_special=True),
    Token(9, b"", is_hole=True),
]
TEXTS = [b"ab", b"abc", b"abcab", b"\xff\xff", b"\xff\xff\xffb"]
SEQUENCES = [[0, 1], [2, 6, 7], [5, 0, 1], [4, 3, 1], [3, 3], [8], [9], [1], [0, 0]]


def begins(texts: list[bytes]) -> Any:
    return lambda text: any(whole.startswith(text) for whole in texts)


@pytest.mark.parametrize("texts", [TEXTS, [b""], [], [b"", b"a"]], ids=["some", "empty", "none", "with_empty"])
async def test_strings_keep_the_laws(texts: list[bytes]) -> None:
    strings = StringSet(VOCABULARY, texts)
    await check_potential(strings, SEQUENCES)
    predicate = BytePredicate(VOCABULARY, begins(texts), lambda text: text in texts)
    await check_potential(predicate, SEQUENCES)
    for sequence in SEQUENCES:
        for n in range(len(sequence) + 1):
            one, other = strings.state_of(sequence[:n]), predicate.state_of(sequence[:n])
            assert (strings.mask(one) == predicate.mask(other)).all()


def test_strings_are_text_or_bytes() -> None:
    strings = StringSet(VOCABULARY, ["ab", b"c", "ab"])
    assert strings.texts == [b"ab", b"c"]
    assert strings.is_complete(strings.state_of([2])) and strings.is_complete(strings.state_of([0, 1]))


async def test_a_predicate_may_be_any_function(tiny_tokenizer_512: PreTrainedTokenizerFast) -> None:
    llm = MockAsyncLM(tiny_tokenizer_512)
    even = BytePredicate(llm, lambda text: b"e" not in text, lambda text: len(text) % 2 == 0)
    await check_potential(even, [llm.tokenizer.encode("an island"), llm.tokenizer.encode("the")], symbols=range(100))
    assert not even.allows(even.start(), 1), "a special token is no text"
    llm.close()


async def test_lifting_gives_the_weight_of_the_bytes() -> None:
    weights = {tuple(text): float(i + 1) for i, text in enumerate(TEXTS)}
    over_bytes = Table(weights, 256)
    lifted = Lifted(over_bytes, VOCABULARY)
    await check_potential(lifted, SEQUENCES)
    for sequence in SEQUENCES:
        text = b"".join(WORDS[i] for i in sequence if i < 8)
        expected = -math.inf if {8, 9} & set(sequence) else log(weights.get(tuple(text), 0.0))
        assert await lifted.complete(lifted.state_of(sequence)) == pytest.approx(expected)


async def test_a_lifted_grammar_is_the_grammar() -> None:
    """The same language, lifted from bytes by ours and read from tokens by the engine."""
    over_bytes = Grammar.regex(GrammarVocabulary([Token(i, bytes([i])) for i in range(256)]), "(ab|c)*abc?")
    lifted = Tempered(Lifted(over_bytes, VOCABULARY), 2.0)
    direct = Grammar.regex(GrammarVocabulary(VOCABULARY), "(ab|c)*abc?")
    for path in itertools.chain.from_iterable(itertools.product([0, 1, 2, 5, 6, 7], repeat=n) for n in range(3)):
        rows = [await p.logw_next(p.state_of(path)) for p in (lifted, direct)]
        assert torch.equal(*rows), path


def test_only_bytes_are_lifted() -> None:
    with pytest.raises(InvalidPotential, match="256"):
        Lifted(Table({}, 3), VOCABULARY)


def test_a_costly_predicate_is_asked_once_for_a_token() -> None:
    asked: list[bytes] = []

    def may_begin(text: bytes) -> bool:
        asked.append(text)
        return True

    constraint: Constraint = BytePredicate(VOCABULARY, may_begin)
    state = constraint.start()
    asked.clear()
    assert constraint.allows(state, 5)
    assert asked == [b"abc"]


def test_parsers_can_be_predicates(tiny_tokenizer_512: PreTrainedTokenizerFast) -> None:
    """What Python can decide, such as JSON without a grammar: a text is one that `json` loads."""

    def is_json(text: bytes) -> bool:
        try:
            json.loads(text)
        except ValueError:
            return False
        return True

    llm = MockAsyncLM(tiny_tokenizer_512)
    constraint = BytePredicate(llm, lambda text: len(text) < 20, is_json)
    assert constraint.is_complete(constraint.state_of(llm.tokenizer.encode('{"a": [1]}')))
    assert not constraint.is_complete(constraint.state_of(llm.tokenizer.encode('{"a": [1]')))
    llm.close()
