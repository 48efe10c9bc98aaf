"""Grammars keep the laws, in every segmentation; their states fork, are forgotten and come back."""

from __future__ import annotations

import itertools
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from genlm_backend.errors import BackendUnavailable, InvalidGrammar, UnsupportedGrammar
from genlm_backend.llm import MockAsyncLM
from genlm_backend.potentials import Grammar, GrammarVocabulary, Product, grammar
from genlm_backend.testing import check_potential
from genlm_backend.tokenization import Token, decode_vocab
from tests.potentials.sampling_texts import RandomWriter

AB = [Token(i, word) for i, word in enumerate([b"a", b"b", b"ab", b"ba", b"abc", b"c"])]
ODD = [*AB, Token(6, b"<s>", is_special=True), Token(7, b"", is_hole=True), Token(8, b"ab"), Token(9, b"\xc3")]


@pytest.fixture(scope="module")
def vocabulary(tiny_tokenizer_512: PreTrainedTokenizerFast) -> GrammarVocabulary:
    return GrammarVocabulary(decode_vocab(tiny_tokenizer_512)[0])


def ids(vocabulary: GrammarVocabulary, text: str) -> list[int]:
    return vocabulary.words(text.encode())


@pytest.mark.parametrize(
    ("make", "source", "texts"),
    [
        (Grammar.json_schema, {"properties": {"name": {"type": "string"}}}, ['{"name": "é"}', "{,", "  {}"]),
        (Grammar.json_schema, True, ["[1, null]", "[1 1]"]),
        (Grammar.regex, "(abc|ab*)c?/[^\\n]", ["abbbc/x", "abc/", "b", "abcc/é"]),
        (Grammar.lark, 'start: "(" start* ")"', ["(()())", "())", ")"]),
        (Grammar.lark, "start: w+\nw: /[a-z]+/ \" \"", ["the end ", "The"]),
    ],
    ids=["object", "any JSON", "regex", "brackets", "words"],
)  # fmt: skip
@pytest.mark.thorough
async def test_the_laws_hold(vocabulary: GrammarVocabulary, make: Any, source: Any, texts: list[str]) -> None:
    constraint = make(vocabulary, source)
    sequences = [ids(vocabulary, text) for text in texts]
    await check_potential(constraint, [*sequences, [0], [sequences[0][0], 1, 2]], symbols=range(0, 512, 9))


@pytest.mark.parametrize("pattern", ["(ab|abc)*", "a?b?c", "abcabc", "(a|b)(a|b)"])
async def test_masks_are_those_of_the_language_in_every_segmentation(pattern: str) -> None:
    """Against enumeration: after each prefix, just the tokens after which some text can still be finished."""
    vocabulary = GrammarVocabulary(ODD)
    constraint = Grammar.regex(vocabulary, pattern)
    texts = {
        "".join(letters)
        for n in range(9)
        for letters in itertools.product("abc", repeat=n)
        if re.fullmatch(pattern, "".join(letters))
    }
    begun = {text[:n].encode() for text in texts for n in range(len(text) + 1)}
    for length in range(3):
        for path in itertools.product([0, 1, 2, 3, 4, 5, 8], repeat=length):
            prefix = b"".join(AB[2 if i == 8 else i].byte_string for i in path)
            if len(prefix) > 5 or prefix not in begun:
                continue
            expected = [not t.is_special and len(t) > 0 and prefix + t.byte_string in begun for t in ODD]
            mask = constraint.mask(constraint.state_of(path))
            assert mask.tolist() == [*expected, prefix.decode() in texts], (pattern, prefix)
    await check_potential(constraint, [[0, 1], [2, 5], [8], [6], [7], [9], [4, 4, 4]])


def test_forced_text_may_be_written_in_any_tokens(vocabulary: GrammarVocabulary) -> None:
    """With a tokenizer, llguidance forces the tokens it would choose; a language model gives the others mass too."""
    constraint = Grammar.regex(vocabulary, "the river (is|was) wide")
    start = constraint.start()
    assert constraint.forced_bytes(start) == b"the river "
    allowed = {vocabulary.byte_vocab[i].byte_string for i in constraint.mask(start)[:-1].nonzero()[0]}
    assert {b"t", b"th", b"the"} <= allowed and all(b"the river ".startswith(word) for word in allowed)
    assert constraint.forced(start) == (), "several tokens begin it"


def test_forced_tokens_are_the_only_ones() -> None:
    constraint = Grammar.regex(GrammarVocabulary(AB), "ccc(a|b)")
    assert constraint.forced(constraint.start()) == (5, 5, 5)
    assert constraint.forced(constraint.state_of([5, 5, 5])) == ()
    assert constraint.forced(constraint.state_of([0])) == ()
    assert constraint.forced_bytes(constraint.state_of([0])) == b""


def test_states_are_values(vocabulary: GrammarVocabulary) -> None:
    """Forks, rollbacks and forgetting change no answer."""
    constraint = Grammar.json_schema(vocabulary, {"type": "array", "items": {"enum": ["river", "island"]}})
    begun = constraint.state_of(ids(vocabulary, '["river", "'))
    before = constraint.mask(begun)
    left, right = (constraint.state_of(ids(vocabulary, f'["river", "{word}"]')) for word in ("river", "island"))
    assert constraint.is_complete(left) and constraint.is_complete(right)
    fork = constraint.extend(begun, ids(vocabulary, "i")[0])
    assert constraint.is_alive(fork) and not constraint.is_alive(constraint.extend(begun, ids(vocabulary, "x")[0]))
    assert (constraint.mask(begun) == before).all()
    assert constraint.token_ids(left) == ids(vocabulary, '["river", "river"]')


def test_parsers_are_forgotten_and_made_again(vocabulary: GrammarVocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "_KEPT_TOKENS", 40)
    constraint = Grammar.json_schema(vocabulary, True)
    states = [constraint.start()]
    for token_id in ids(vocabulary, '{"name": ["island", 17, {"deep": null}], "x": 1}'):
        states.append(constraint.extend(states[-1], token_id))
        assert constraint.is_alive(states[-1])
    kept = [state for state in states if state.parser is not None]
    assert len(kept) < 6, "most were forgotten"
    whole = Grammar.json_schema(vocabulary, True)
    for length, state in enumerate(states):
        again = whole.state_of(whole_ids := constraint.token_ids(state))
        assert len(whole_ids) == length
        assert (constraint.mask(state) == whole.mask(again)).all()


def test_a_population_is_masked_at_once(vocabulary: GrammarVocabulary) -> None:
    constraint = Grammar.json_schema(vocabulary, {"type": "array", "items": {"type": "integer"}})
    paths = [ids(vocabulary, "[1, 2, 3, 4]")[:n] for n in range(8)]
    states = [constraint.state_of(path) for path in paths]
    states += [states[3], states[3], constraint.extend(states[0], 0)]
    rows = constraint.masks(states)
    assert rows.shape == (11, constraint.n_tokens + 1)
    for state, row in zip(states, rows, strict=True):
        assert (constraint.mask(state) == row).all()
    assert not rows[-1].any()
    assert constraint.masks([]).shape == (0, constraint.n_tokens + 1)


def test_the_longest_match_decides_where_terminals_end() -> None:
    """llguidance lexes: after "liste" it is in "listen", and does not go back to "list" for "listed"."""
    vocabulary = GrammarVocabulary([Token(i, bytes([i])) for i in range(128)])

    def read(source: str) -> list[str]:
        constraint = Grammar.lark(vocabulary, source)
        texts = ("listed", "listened", "listenened")
        return [text for text in texts if constraint.is_complete(constraint.state_of(text.encode()))]

    assert read('start: STEM SUFFIX\nSTEM: "list" | "listen"\nSUFFIX: "ed" | "ened"\n') == ["listened", "listenened"]
    assert read('start: WORD\nWORD: ("list" | "listen") ("ed" | "ened")\n') == ["listed", "listened", "listenened"]
    letters = 'start: stem suffix\nstem: "l" "i" "s" "t" | "l" "i" "s" "t" "e" "n"\nsuffix: "e" "d" | "e" "n" "e" "d"\n'
    assert read(letters) == ["listed", "listened", "listenened"]


def test_grammars_multiply(vocabulary: GrammarVocabulary) -> None:
    vowels = Grammar.regex(vocabulary, "[^e]*")
    words = Grammar.regex(vocabulary, "(the|an|on) (island|river)")
    product = Product(vowels, words)
    state = product.state_of(ids(vocabulary, "an isl"))
    assert words.is_alive(state[1]) and vowels.is_alive(state[0])


def test_options_of_a_lark_grammar_stay(vocabulary: GrammarVocabulary) -> None:
    plain = 'start: "a" "b"'
    skipping = '%llguidance {\n  "allow_initial_skip": true\n}\nstart: "a" "b"\n%ignore " "'
    assert not Grammar.lark(vocabulary, plain).is_alive(Grammar.lark(vocabulary, plain).state_of(ids(vocabulary, " ")))
    loose = Grammar.lark(vocabulary, skipping)
    assert loose.is_complete(loose.state_of(ids(vocabulary, " a b")))
    with pytest.raises(InvalidGrammar, match="no JSON"):
        Grammar.lark(vocabulary, '%llguidance {"a"\nstart: "a"')


@pytest.mark.parametrize(
    "pattern", ["a/b", r"a\/b", "[/]", "a\nb", r"\\/", " a", "#", '"', "é", r"\d+\.\d", "a|b", "(?i)ab"]
)
def test_expressions_are_read_as_they_are(vocabulary: GrammarVocabulary, pattern: str) -> None:
    constraint = Grammar.regex(vocabulary, pattern)
    for text in ("a/b", "/", "a\nb", "\\/", " a", "#", '"', "é", "12.5", "a", "b", "AB", "ab"):
        expected = re.fullmatch(pattern, text) is not None
        assert constraint.is_complete(constraint.state_of(ids(vocabulary, text))) == expected, text


@pytest.mark.parametrize(
    ("make", "source", "error", "says"),
    [
        (Grammar.regex, "(", InvalidGrammar, "unclosed"),
        (Grammar.regex, "(?=a)b", UnsupportedGrammar, "look-ahead"),
        (Grammar.regex, r"\bb", UnsupportedGrammar, "look"),
        (Grammar.regex, r"(a)\1", UnsupportedGrammar, "backreferences"),
        (Grammar.lark, "start: nothing", InvalidGrammar, "nothing"),
        (Grammar.lark, 'begin: "a"', InvalidGrammar, "start"),
    ],
)
def test_what_cannot_be_read_is_refused(
    vocabulary: GrammarVocabulary, make: Any, source: str, error: Any, says: str
) -> None:
    with pytest.raises(error, match=says):
        make(vocabulary, source)


def test_a_missing_engine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(BackendUnavailable, match=r"genlm-backend\[grammar\]"):
        GrammarVocabulary(AB)


def test_a_model_has_one_vocabulary(tiny_tokenizer_512: PreTrainedTokenizerFast) -> None:
    llm = MockAsyncLM(tiny_tokenizer_512)
    assert GrammarVocabulary.of(llm) is GrammarVocabulary.of(llm)
    assert Grammar.regex(llm, "a").vocabulary is Grammar.json_schema(llm, True).vocabulary
    llm.close()


def test_random_texts_come_to_an_end(vocabulary: GrammarVocabulary) -> None:
    text = RandomWriter(vocabulary.byte_vocab, 0).write(Grammar.lark(vocabulary, 'start: "a" start "b" | "."'))
    assert text is not None and re.fullmatch(rb"a*\.b*", text)
    assert np.abs(text.count(b"a") - text.count(b"b")) == 0


def test_threads_may_ask_one_grammar_at_once(vocabulary: GrammarVocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    """As SMC does, whose masks are made beside the event loop. Parsers are forgotten meanwhile."""
    monkeypatch.setattr(grammar, "_KEPT_TOKENS", 40)
    source = {"type": "array", "items": {"enum": ["left", "right", 12]}}
    texts = ['["left", 12, "right"]', "[12, 12, 12]", '["right", "left"]', '["lef']

    def states(constraint: Grammar) -> list[Any]:
        return [constraint.state_of(ids(vocabulary, text[:end])) for text in texts for end in range(len(text))]

    alone = Grammar.json_schema(vocabulary, source)
    expected = alone.masks(states(alone))
    shared = Grammar.json_schema(vocabulary, source)
    asked = states(shared)

    def ask(i: int) -> list[bool]:
        order = np.random.default_rng(i).permutation(len(asked))
        if i % 2:
            return [np.array_equal(shared.masks([asked[j] for j in order]), expected[order])]
        return [shared.allows(asked[j], 20) == expected[j, 20] and shared.is_alive(asked[j]) for j in order.tolist()]

    with ThreadPoolExecutor(6) as pool:
        assert all(all(same) for same in pool.map(ask, range(24)))
