"""Where one stretch of guided text ends and the next begins: stop strings, seeds, and unfinished characters."""

from __future__ import annotations

import pytest

from genlm_backend.backtracking import aguide, guide, load_parser
from genlm_backend.errors import InvalidQuery
from tests.backtracking.speaker import reciter
from tests.backtracking.test_guide import Scripted, spans

WORDS = "start: /[a-zA-Z ]+/\n"


@pytest.mark.parametrize("heals", [True, False])
async def test_a_character_is_written_whole_though_a_stretch_ends_within_it(heals: bool) -> None:
    follows = {b"x": b'"', b'x"': b"\xc3", b"\xc3": b"\xa9", b"\xa9": b'"', b'\xa9"': b"<eos>"}
    follows["\ufffd".encode()] = b'"'
    async with reciter(follows, b"x", "\ufffd".encode()) as llm:
        result = await aguide(llm, load_parser("json"), "x", max_new_tokens=2, temperature=0.0, token_healing=heals)
    assert (result.response, result.valid, result.num_grammar_corrections) == ('"é"', True, 0)


@pytest.mark.parametrize("across_the_seam", [b"\n", b"\n2"])
async def test_a_stop_string_of_the_prompt_does_not_end_the_text(across_the_seam: bytes) -> None:
    """The end of the prompt is written anew by healing; a stop string there is no part of the response."""
    follows = {
        b"<p>": b"x",
        b"x": b":",
        b":": across_the_seam,
        b":\n": b"2",
        b":\n2": b"+",
        b"+": b"1",
        b"1": b"\n",
        b"1\n": b"x",
    }
    async with reciter(follows) as llm:
        result = await aguide(llm, load_parser("arithmetic"), "x:\n", stop_at="\n", temperature=0.0)
    assert (result.response, result.valid, result.num_grammar_corrections) == ("2+1", True, 0)


@pytest.mark.parametrize("heals", [True, False])
@pytest.mark.parametrize("n_tokens", [1, 2, 3])
async def test_a_stop_string_over_two_stretches_ends_the_text(heals: bool, n_tokens: int) -> None:
    follows = {b"x": b"a", b"a": b"E", b"E": b"N", b"N": b"D", b"D": b"b"}
    async with reciter(follows, b"x") as llm:
        result = await aguide(
            llm, load_parser(WORDS), "x", stop_at=["END", "xa"], max_new_tokens=n_tokens, temperature=0.0,
            token_healing=heals, max_grammar_corrections=8,
        )  # fmt: skip
    assert (result.response, result.valid) == ("a", True)
    assert "".join(text for how, text in spans(result.html) if how != "taken back") == "a"


def test_a_stop_string_over_two_answers_ends_the_text() -> None:
    result = guide(Scripted("abcE", "NDef", "more"), load_parser(WORDS), "", stop_at="END")
    assert (result.response, result.valid) == ("abc", True)


def test_stop_strings_are_looked_for_after_the_seed() -> None:
    result = guide(Scripted("NDab", "END"), load_parser(WORDS), "", seed_str="xE", stop_at=["END", "x"])
    assert (result.response, result.valid) == ("xENDab", True)


@pytest.mark.parametrize("stop_at", ["", ["END", ""]])
async def test_an_empty_stop_string_is_refused(stop_at: str | list[str]) -> None:
    async with reciter({b"x": b"a"}) as llm:
        for model in (Scripted("abc"), llm):
            with pytest.raises(InvalidQuery, match=r"stop_at.*empty"):
                await aguide(model, load_parser(WORDS), "x", stop_at=stop_at)


def test_a_correction_keeps_the_seed() -> None:
    """The terminal at fault begins in the seed: what the grammar reads stays, and the function goes on from there."""
    model = Scripted('ver\n", 1]', '", "sea"]')
    result = guide(model, load_parser("json"), "", seed_str='["ri')
    assert (result.response, result.valid, result.num_grammar_corrections) == ('["river", "sea"]', True, 1)
    assert model.prompts == ['["ri', '["river']
    correction = result.correction_log[0]
    assert (correction.corrected_pred, correction.selected_candidate, correction.type) == ('["river', "", "taken_back")
    assert "".join(text for how, text in spans(result.html) if how != "taken back") == result.response


def test_a_candidate_that_begins_with_the_seed_is_written() -> None:
    result = guide(Scripted("LECT * FROM t;"), load_parser("sql"), "", seed_str="SEL")
    assert result.response.startswith("SELECT * FROM t") and result.correction_log[0].selected_candidate == "SELECT"
