"""Grammars without a lexer: every way to divide a text into terminals counts, in every segmentation into tokens."""

from __future__ import annotations

import itertools
import sys

import pytest

from genlm_backend.errors import BackendUnavailable, GrammarTooComplex, InvalidGrammar
from genlm_backend.potentials import ContextFree
from genlm_backend.testing import FakeEngine, check_potential, fake_language_model
from genlm_backend.tokenization import Token

pytest.importorskip("xgrammar", reason='needs xgrammar: pip install "genlm-backend[xgrammar]"')

BYTES = [Token(i, bytes([i])) for i in range(256)]
WORDS = [Token(i, word) for i, word in enumerate([b"a", b"b", b"ab", b"ba", b"aab", b"c"])]
ODD = [*WORDS, Token(6, b"<s>", is_special=True), Token(7, b"", is_hole=True), Token(8, b"ab"), Token(9, b"\xc3")]
PALINDROMES = 'root ::= "a" root "a" | "b" root "b" | "a" | "b" | ""\n'


@pytest.mark.parametrize(
    "grammar",
    [
        ContextFree.lark(BYTES, 'start: STEM SUFFIX\nSTEM: "list" | "listen"\nSUFFIX: "ed" | "ened"\n'),
        ContextFree.ebnf(BYTES, 'root ::= stem suffix\nstem ::= "list" | "listen"\nsuffix ::= "ed" | "ened"\n'),
    ],
    ids=["lark", "ebnf"],
)
def test_terminals_match_any_text_of_theirs(grammar: ContextFree) -> None:
    texts = [b"listed", b"listened", b"listenened", b"listenen", b"list", b"ed"]
    assert [text for text in texts if grammar.is_complete(grammar.state_of(text))] == texts[:3]


async def test_masks_are_those_of_the_language_in_every_segmentation() -> None:
    """Palindromes have no deterministic parser. Against enumeration, after each sequence of up to three tokens."""
    constraint = ContextFree.ebnf(ODD, PALINDROMES)
    for n in range(4):
        for path in itertools.product(range(len(ODD)), repeat=n):
            is_text = all(token_id in (0, 1, 2, 3, 4, 8) for token_id in path)
            prefix = b"".join(ODD[token_id].byte_string for token_id in path)
            mask = constraint.mask(constraint.state_of(path))
            # Any word of a and b is the first half of a palindrome.
            expected = [is_text and token_id in (0, 1, 2, 3, 4, 8) for token_id in range(len(ODD))]
            assert mask.tolist() == [*expected, is_text and prefix == prefix[::-1]], path
    await check_potential(constraint, [[0, 1, 0], [2, 3], [4, 8], [5], [6], [7], [9], [0, 5]])


async def test_the_laws_hold_where_a_grammar_ends() -> None:
    constraint = ContextFree.ebnf(ODD, 'root ::= "a" root "b" | ""\n')
    state = constraint.state_of([4, 1])  # aabb
    assert constraint.mask(state).nonzero()[0].tolist() == [constraint.end]
    assert constraint.forced(constraint.state_of([0, 4])) == (1, 1)
    await check_potential(constraint, [[4, 1, 1], [0, 2, 1], [0, 0, 1]])


def test_what_is_no_grammar_is_refused_by_name() -> None:
    for source in ("root ::= nope\n", "root := 3", "root ::= [z-a]\n"):
        with pytest.raises(InvalidGrammar, match="EBNF grammar"):
            ContextFree.ebnf(BYTES, source)
    with pytest.raises(InvalidGrammar, match="Lark grammar"):
        ContextFree.lark(BYTES, "start: nope\n")
    with pytest.raises(GrammarTooComplex):
        ContextFree.ebnf(BYTES, "root ::= " + "(" * 10_000 + '"a"' + ")" * 10_000)


def test_without_xgrammar_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    with pytest.raises(BackendUnavailable, match=r"genlm-backend\[xgrammar\]"):
        ContextFree.ebnf(BYTES, PALINDROMES)


def test_a_model_has_one_compiler() -> None:
    llm = fake_language_model(FakeEngine(256), 256)
    first, second = ContextFree.ebnf(llm, PALINDROMES), ContextFree.ebnf(llm, 'root ::= "x"\n')
    assert first.is_complete(first.state_of(b"abba")) and not second.is_complete(second.state_of(b"abba"))
    assert list(ContextFree._compilers) == [llm]
    llm.close()
