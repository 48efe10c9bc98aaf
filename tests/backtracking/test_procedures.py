"""Rules that do more than forbid, as rules of walks: what they replace, and that they remember nothing themselves."""

from __future__ import annotations

import numpy as np
import pytest

from genlm_backend.backtracking import Creative, Prompt, Replace, walk
from tests.backtracking.speaker import chooser, speaker

LETTERS = [b"<p>", b"x", b" So", b" \xf0\x9f\x98", b" but", b"<eos>", b"x So", b"\xf0\x9f", b"<end>"]


async def said(rule, *pieces, end=b"<eos>"):
    """The text where these pieces are said, one after another from the first, and then the end."""
    following = dict(zip((b"<p>", *pieces), (*pieces, end), strict=True))

    def says(text):
        last = max((piece for piece in following if text.endswith(piece)), key=len, default=b"")
        return {following.get(last, b"<eos>"): 1.0}

    async with speaker(LETTERS, says, [b"<p>", b"<end>"]) as llm:
        return (await walk(llm, [0], rule, eos=[5], seed=0, max_new_tokens=9)).text


async def test_a_partial_character_after_a_phrase_repeats_nothing_before_it():
    assert await said(Replace("So", " but"), b"x", b" So", b" \xf0\x9f\x98") == "x but"
    assert await said(Replace("So", "but"), b"x So", b" \xf0\x9f\x98") == "x but"


@pytest.mark.parametrize("pieces", [(b"x So",), (b"x So", b" \xf0\x9f\x98"), (b"x So", b"\xf0\x9f")])
async def test_what_stood_before_a_phrase_in_its_token_stays(pieces):
    for end in (b"<eos>", b"<end>"):
        assert await said(Replace("So", "but"), *pieces, end=end) == "x but"


@pytest.mark.parametrize(("before", "text"), [(1, " b b b"), (3, " b b b"), (4, " b b c")])
async def test_nothing_is_replaced_beyond_the_first_tokens_where_the_text_ends_either(before, text):
    async with speaker([b"<p>", b" b", b" c", b"<eos>"], chooser(otherwise={" b": 1.0})) as llm:
        rule = Replace("b", "c", before=before, max_replacements=1, skip_tokens=2)
        assert (await walk(llm, [0], rule, eos=[3], max_new_tokens=3)).text == text


async def test_one_creative_rule_serves_models_with_other_ends():
    """The end is the most probable token, which is drawn all the same."""
    rule = Creative()
    vocab = [b"<p>", b"a", b"b", b"<c>", b"<d>"]
    models = {end: speaker(vocab, chooser(otherwise={vocab[end].decode(): 0.9, "a": 0.1})) for end in (3, 4)}
    walks = [walk(llm, [0], rule, eos=[end], max_new_tokens=40, seed=0) for end, llm in models.items()]
    assert [(await walking).reason for walking in walks] == ["eos", "eos"]
    for llm in models.values():
        await llm.aclose()


async def test_a_creative_rule_goes_on_from_the_state_of_another():
    """A fresh rule has not seen the prompt."""
    state = Creative().init(Prompt((0,), (), frozenset([3])))
    row = np.log(np.array([0.1, 0.1, 0.1, 0.7], np.float32))
    assert np.isfinite(Creative().warp(state, row)).all()
    assert np.isclose(Creative(eos_penalty=0.5).reweigh(state, row)[3], np.log(0.35))
    async with speaker([b"<p>", b"a", b"b", b"<eos>"], chooser(otherwise={"<eos>": 0.9, "a": 0.1})) as llm:
        first = await walk(llm, [0], Creative(), eos=[3], max_new_tokens=1, seed=0)
        again = walk(llm, [0], Creative(), eos=[3], max_new_tokens=40, seed=0, state=first.state)
        assert (await again).reason == "eos"
