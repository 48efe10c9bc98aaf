"""Grammars that only lark reads, as a rule of walks: the same text as under the same language on llguidance."""

from __future__ import annotations

import pytest

from genlm_backend.backtracking import GrammarRule, load_parser, walk
from genlm_backend.errors import UnsupportedGrammar
from genlm_backend.potentials import Grammar, GrammarVocabulary
from genlm_backend.testing import FakeEngine, fake_language_model
from genlm_backend.tokenization import Token

pytestmark = pytest.mark.thorough

LIST = 'start: _list{NUMBER}\n_list{item}: item ("," item)*\nNUMBER: /[0-9]+(\\.[0-9]+)?/\n'
SAME = r"[0-9]+(\.[0-9]+)?(,[0-9]+(\.[0-9]+)?)*"
N_VOCAB = 60  # ASCII up to the digits and beyond; 0 ends a text


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("mode", ["local", "exact"])
async def test_check_and_lookahead_draw_what_they_draw_on_llguidance(every: int, mode: str) -> None:
    async with fake_language_model(FakeEngine(n_logits=N_VOCAB), n_vocab=N_VOCAB) as llm:
        parser = load_parser(LIST)
        assert parser.engine == "lark"
        for seed in range(6):
            texts = []
            for constraint in (parser.constraint(llm), Grammar.regex(llm, SAME)):
                rule = GrammarRule(constraint, every=every)
                outcome = await walk(llm, [1], rule, max_new_tokens=3, eos=[0], mode=mode, seed=seed)
                texts.append((outcome.token_ids, outcome.reason, outcome.n_undos))
            assert texts[0] == texts[1]
            text = bytes(texts[0][0]).decode().rstrip("\0")
            assert parser.is_viable(text) and texts[0][2] > 0


async def test_a_mask_is_refused_by_name() -> None:
    async with fake_language_model(FakeEngine(n_logits=N_VOCAB), n_vocab=N_VOCAB) as llm:
        constraint = load_parser(LIST).constraint(llm)
        with pytest.raises(UnsupportedGrammar, match="no masks"):
            await walk(llm, [1], GrammarRule(constraint), max_new_tokens=3, eos=[0], mode="mask", seed=1)
        with pytest.raises(UnsupportedGrammar, match="no masks"):
            await constraint.logw_next(constraint.start())


def test_a_text_may_end_within_a_character() -> None:
    """Not finished there, but alive if the grammar has characters that begin like this."""
    vocabulary = GrammarVocabulary([Token(i, bytes([i])) for i in range(256)])
    parser = load_parser('start: _list{LETTER}\n_list{x}: x ("," x)*\nLETTER: /[é-ü]/\n')
    constraint = parser.constraint(vocabulary)
    assert parser.engine == "lark"
    lead, trail = "é".encode()
    within = constraint.state_of(b",".join([b"\xc3\xa9", bytes([lead])]))
    assert constraint.is_alive(within) and not constraint.is_complete(within)
    assert constraint.allows(within, trail) and constraint.is_complete(constraint.extend(within, trail))
    assert not constraint.allows(within, 0x80), "À is before é"
    assert not constraint.allows(within, ord(",")) and not constraint.allows(constraint.start(), 0xE2)
    dead = constraint.extend(constraint.start(), ord(","))
    assert not constraint.is_alive(dead) and not constraint.is_alive(constraint.extend(dead, lead))
    assert not constraint.is_alive(constraint.extend(constraint.start(), 999))


@pytest.mark.parametrize("text", ['{"a": [1, true], "é": null}', '["x\\n", -2.5e3]'])
def test_lark_and_llguidance_allow_the_same_bytes(text: str) -> None:
    vocabulary = GrammarVocabulary([Token(i, bytes([i])) for i in range(256)])
    parser = load_parser("json")
    one = parser.constraint(vocabulary)
    parser._grammar = None
    other = parser.constraint(vocabulary)
    data = text.encode()
    for n in (0, 1, 2, 4, 6, len(data) - 1):  # after its end llguidance reads no blank
        states = one.state_of(data[:n]), other.state_of(data[:n])
        for symbol in [*b'{}[],:"1t.e \\', 0xC3, 0xFF, 256]:
            assert one.allows(states[0], symbol) == other.allows(states[1], symbol), (data[:n], symbol)
