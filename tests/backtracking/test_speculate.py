"""Guesses asked along with a prefix: the same text, fewer forward passes where it repeats itself, no harm elsewhere."""

from __future__ import annotations

import asyncio
import gc
import random
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genlm_backend.backtracking import Budget, GrammarRule, guessing, phrases, walk
from genlm_backend.backtracking.guessing import PASS_IN_ROWS, Guesses, Siblings, looked_up
from genlm_backend.backtracking.proposal import _SIBLINGS
from genlm_backend.errors import InvalidQuery
from genlm_backend.llm.hf.model import AsyncTransformer
from genlm_backend.potentials import Constraint, Grammar
from genlm_backend.testing import check_idle
from tests.backtracking import toy
from tests.backtracking.speaker import chooser, speaker

pytestmark = pytest.mark.thorough

VOCAB = [b"<p>", b"a", b"b", b"c", b"d", b"<eos>"]
CYCLE = {"otherwise": {"a": 1.0}, "a": {"b": 1.0}, "b": {"c": 1.0}, "c": {"d": 1.0}}


@given(st.lists(st.integers(0, 3), max_size=12), st.integers(0, 6))
def test_a_guess_is_what_followed_the_longest_end_that_stood_before(ids, n):
    expected = 0, []
    for width in range(min(8, len(ids) - 1) if n else 0, 0, -1):
        starts = [i for i in range(len(ids) - width) if ids[i : i + width] == ids[-width:]]
        if starts:
            known = list(ids)
            while len(known) < len(ids) + n:  # the text goes on as it did there
                known.append(known[starts[-1] + width + len(known) - len(ids)])
            expected = width, known[len(ids) :]
            break
    assert looked_up(ids, n) == expected


@pytest.mark.parametrize("mode", [pytest.param("exact", marks=pytest.mark.thorough), "local", "first", "mask", "none"])
@pytest.mark.parametrize("filters", [{}, {"top_k": 2}, {"top_p": 0.95, "temperature": 1.3}], ids=str)
def test_the_text_is_the_same(mode, filters):
    async def run(n: int) -> tuple[list, int]:
        async with toy.SMALL.model() as llm:
            rules, budget = toy.SMALL.rule(), Budget(undos=200)
            made = []
            for seed in range(10):
                one = walk(
                    llm,
                    toy.SMALL.prompt,
                    rules,
                    max_new_tokens=12,
                    eos=(),
                    mode=mode,
                    seed=seed,
                    speculate=n,
                    budget=budget,
                    **filters,
                )
                made.append(await one)
            check_idle(llm)
            return [(o.token_ids, o.logprob, o.log_q, o.log_weight, o.reason) for o in made], llm.statistics().batches

    (plain, n_plain), (guessed, n_guessed) = (asyncio.run(run(n)) for n in (0, 3))
    assert guessed == plain
    assert n_guessed < n_plain


async def batches(n: int, length: int = 24, **options) -> tuple[int, int, bytes]:
    async with speaker(VOCAB, chooser(**CYCLE)) as llm:
        said = await walk(llm, [0], max_new_tokens=length, eos=[5], temperature=0, speculate=n, **options)
        return llm.statistics().batches, said.n_prefixes, said.text.encode()


async def test_a_text_in_a_cycle_takes_a_forward_pass_for_each_guess():
    n_plain, n_prefixes, plain = await batches(0)
    n_guessed, n_prefixes_guessed, guessed = await batches(4)
    assert plain == guessed == b"abcd" * 6
    assert n_plain == n_prefixes == 24
    # five tokens before anything repeats; then up to five by each forward pass, fewer while the cycle is young
    assert n_guessed <= 5 + 6
    assert n_prefixes_guessed == 24, "no prefix beyond the longest text is asked, and none twice"


async def test_wrong_guesses_grow_fewer_and_cost_no_forward_pass():
    # what follows an "a" is never what followed the one before
    likely = {"otherwise": {"a": 1.0}, "a": {"a": 1.0}, "aa": {"b": 1.0}, "aab": {"a": 1.0}, "aaba": {"c": 1.0}}
    likely |= {"abac": {"a": 1.0}, "baca": {"d": 1.0}, "acad": {"b": 1.0}, "cadb": {"d": 1.0}}
    asked = {}
    for n in (0, 4):
        async with speaker(VOCAB, chooser(**likely)) as llm:
            said = await walk(llm, [0], max_new_tokens=10, eos=[5], temperature=0, speculate=n)
            asked[n] = said.text, llm.statistics().batches, said.n_prefixes
    assert asked[4][0] == asked[0][0]
    assert asked[4][1] <= asked[0][1]
    assert asked[0][2] < asked[4][2] < 5 * asked[0][2]


def asked_after(guesses: Guesses, ids: list[int], n_walks: int = 1, foreseen: tuple[int, ...] = ()) -> list[int]:
    return guesses.after([0], ids, foreseen, {5}, 100, n_walks)


def test_the_more_walks_the_surer_a_guess_must_be():
    said = [1, 2, 3, 4] * 3
    n_asked = [len(asked_after(Guesses(8), said, n)) for n in (1, 4, 16, 64, 10 * PASS_IN_ROWS)]
    assert n_asked[0] == 8 and n_asked[2] > 0 and n_asked[-1] == 0
    assert n_asked == sorted(n_asked, reverse=True)
    assert asked_after(Guesses(8), said, 16) == said[: n_asked[2]], "those that come first"


@pytest.mark.parametrize("is_right", [True, False])
def test_how_sure_a_guess_is_is_learned_whether_it_is_asked_or_not(is_right):
    guesses, said, foreseen = Guesses(0), [], (7, 7)
    before = len(asked_after(Guesses(0), said, 40, foreseen))
    for _ in range(40):
        asked_after(guesses, said, 10**6, foreseen)  # too many walks: nothing is asked
        said = [*said, 7 if is_right else 8]
    after = len(asked_after(guesses, said, 40, foreseen))
    assert (before, after) == (1, 2 if is_right else 0)


async def test_many_walks_ask_about_fewer_guesses_than_one():
    # an "a" is followed by anything: half of the guesses are wrong
    likely = {"otherwise": {"a": 1.0}, "a": {"a": 0.4, "b": 0.2, "c": 0.2, "d": 0.2}}
    n_guesses = {}
    for n_walks in (1, 30):
        async with speaker(VOCAB, chooser(**likely)) as llm:
            walks = (walk(llm, [0], max_new_tokens=30, eos=[5], seed=i, speculate=4) for i in range(n_walks))
            said = await asyncio.gather(*walks)
            n_guesses[n_walks] = sum(one.n_prefixes - 30 for one in said) / n_walks
    assert n_guesses[30] < n_guesses[1] / 2


async def test_what_else_runs_does_not_change_where_a_budget_ends_a_text():
    likely = {"otherwise": {"a": 1.0}, "a": {"a": 0.4, "b": 0.2, "c": 0.2, "d": 0.2}}
    texts = set()
    for n_walks in (1, 30):
        async with speaker(VOCAB, chooser(**likely)) as llm:
            options = {"max_new_tokens": 30, "eos": [5], "speculate": 4, "budget": Budget(prefixes=12)}
            said = await asyncio.gather(*(walk(llm, [0], seed=i, **options) for i in range(n_walks)))
            assert said[0].reason == "budget" and said[0].n_prefixes > 12
            texts.add(said[0].text)
    assert len(texts) == 1


def test_what_was_taken_back_teaches_nothing():
    guesses = Guesses(0)
    for _ in range(40):
        asked_after(guesses, [1, 2, 3], 10**6, (7, 7))
        asked_after(guesses, [1, 4, 4, 8], 10**6, (7, 7))
    assert guesses._n_made == Guesses(0)._n_made


def test_what_another_walk_wrote_is_looked_up_too():
    siblings = Siblings()
    first, second = Guesses(4, siblings), Guesses(4, siblings)
    asked_after(first, [1, 2, 3, 4, 1, 1, 2, 3])
    assert asked_after(second, [4, 2, 3, 4]) == [1, 1, 2, 3]  # three tokens that stand there, and what follows
    assert asked_after(second, [4, 2, 3, 4, 9, 3, 4]) == [9, 3, 4, 9]  # its own: two tokens stand nowhere else
    assert asked_after(Guesses(4), [6, 2, 3, 4]) == []  # of another prompt
    assert asked_after(Guesses(0, siblings), [6, 2, 3, 4]) == []


def test_the_longest_end_counts_whoever_wrote_it():
    siblings = Siblings()
    for text in ([6, 1, 2, 3, 7], [9, 1, 2, 3, 8], [1, 2, 3]):
        asked_after(Guesses(1, siblings), text)
    assert asked_after(Guesses(1, siblings), [6, 1, 2, 3]) == [7]
    assert asked_after(Guesses(1, siblings), [9, 1, 2, 3]) == [8]
    assert asked_after(Guesses(1, siblings), [4, 1, 2, 3]) == [8]  # the last of equals
    assert asked_after(Guesses(1, siblings), [2, 3, 4, 1, 2, 3]) == [8]  # its own was shorter


@given(st.lists(st.lists(st.integers(0, 2), max_size=9), max_size=6))
def test_texts_that_are_taken_back_stay_as_they_were_for_others(states):
    siblings, writer, known = Siblings(), object(), []
    for ids in states:
        before, was = known, list(known)
        known = siblings.tell(writer, known, ids)
        assert known == ids
        assert before[: len(was)] == was
        for tokens, places in siblings._places.items():
            assert all(tuple(place.text[place.at - 2 : place.at + 1]) == tokens for place in places)
    for at in range(3, len(known)):
        width, found = siblings.looked_up(object(), known[:at], 9)
        assert width >= 3 and len(found) >= 1
        assert siblings.looked_up(writer, known[:at], 9) == (0, [])  # nor what it wrote itself before


def test_the_oldest_are_forgotten(monkeypatch):
    monkeypatch.setattr(guessing, "_MOST_KEPT", 10)
    siblings = Siblings()
    siblings.tell(1, [], list(range(100)))
    assert len(siblings._places) == 10
    assert siblings.looked_up(2, [95, 96, 97], 2) == (3, [98, 99])
    assert siblings.looked_up(2, [5, 6, 7], 2) == (0, [])


def test_walks_in_several_threads_share_texts():
    siblings, ends = Siblings(), threading.Event()

    def write(writer: int) -> int:
        rng, known, ids, n = random.Random(writer), [], [], 0
        while not ends.is_set():
            ids = [*ids, rng.randrange(2)] if len(ids) < 50 else []
            known = siblings.tell(writer, known, ids)
            n += bool(siblings.looked_up(writer, ids, 3)[0])
        return n

    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-5)
    try:
        with ThreadPoolExecutor(3) as pool:
            written = [pool.submit(write, writer) for writer in range(3)]
            time.sleep(1.0)
            ends.set()
            assert all(one.result(timeout=30) > 0 for one in written)
    finally:
        sys.setswitchinterval(before)


async def test_walks_of_one_prompt_help_each_other_and_write_what_they_would_write_alone(monkeypatch):
    likely = {"otherwise": {"a": 0.5, "b": 0.5}, "aa": {"c": 0.5, "d": 0.5}, "aac": {"b": 1.0}, "acb": {"d": 1.0}}
    likely |= {"cbd": {"d": 1.0}, "bdd": {"c": 1.0}, "ddc": {"c": 1.0}, "dcc": {"b": 1.0}, "ccb": {"b": 1.0}}
    made, n_batches = {}, {}
    for kind in ("none", "own", "all"):
        if kind == "own":
            monkeypatch.setattr(Siblings, "looked_up", lambda *_: (0, []))
        if kind == "all":
            monkeypatch.undo()
        async with speaker(VOCAB, chooser(**likely)) as llm:
            options = {"max_new_tokens": 40, "eos": [5], "speculate": 0 if kind == "none" else 6}
            first = asyncio.ensure_future(walk(llm, [0], seed=7, **options))  # a prompt is shared while one writes
            together = await asyncio.gather(first, *(walk(llm, [0], seed=i, **options) for i in range(4)))
            made[kind], n_batches[kind] = [one.token_ids for one in together], llm.statistics().batches
    assert made["none"] == made["own"] == made["all"]
    assert n_batches["all"] < n_batches["own"] <= n_batches["none"]


async def test_texts_are_forgotten_with_their_walks():
    async with speaker(VOCAB, chooser(**CYCLE)) as llm:
        await walk(llm, [0], max_new_tokens=24, eos=[5], temperature=0, speculate=4)
        gc.collect()
        assert not _SIBLINGS[llm]


async def test_what_is_taken_back_is_looked_up_again():
    options = {"rules": phrases("cd", words=False), "seed": 3}
    likely = {"otherwise": {"a": 1.0}, "a": {"b": 1.0}, "b": {"c": 1.0}, "c": {"d": 0.9, "a": 0.1}}
    said = []
    for n in (0, 4):
        async with speaker(VOCAB, chooser(**likely)) as llm:
            said.append((await walk(llm, [0], max_new_tokens=20, eos=[5], speculate=n, **options)).token_ids)
    assert said[0] == said[1]
    assert 4 not in said[0]


async def test_no_guess_goes_past_an_end_token_or_the_length():
    likely = {"otherwise": {"a": 1.0}, "a": {"b": 1.0}, "b": {"<eos>": 1.0}}
    async with speaker(VOCAB, chooser(**likely)) as llm:
        await walk(llm, [0, 1, 2, 5, 0, 1, 2], max_new_tokens=8, eos=[5], speculate=4)
        asked = llm._service.engine.asked
    assert asked == [(0, 1, 2, 5, 0, 1, 2)]


async def test_a_guess_that_fails_harms_nobody():
    def says(text: bytes) -> dict[bytes, float]:
        if text.endswith(b"ab"):
            raise RuntimeError("no row for this one")
        return {b"c" if text.endswith(b"a") else b"a": 1.0}

    async with speaker(VOCAB, says) as llm:
        said = await walk(llm, [1, 2, 3, 1], max_new_tokens=2, eos=[5], temperature=0, speculate=3)
        assert said.text == "ca"
        check_idle(llm)


async def test_cancelled_in_the_middle_it_leaves_nothing_behind():
    async with speaker(VOCAB, chooser(**CYCLE)) as llm:
        running = asyncio.ensure_future(walk(llm, [0], max_new_tokens=500, eos=[5], speculate=4).finish())
        while llm.statistics().batches < 20:
            await asyncio.sleep(0)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        check_idle(llm)


@pytest.mark.thorough
async def test_on_packed_attention_guesses_come_true_in_fewer_forward_passes(tiny_llama, tiny_tokenizer_512):
    async with AsyncTransformer(tiny_llama, tiny_tokenizer_512) as llm:
        made = []
        for n in (0, 6):
            llm.clear_cache()
            before = llm.statistics()
            said = await walk(llm, [5, 9, 2], max_new_tokens=60, eos=(), temperature=0, speculate=n)
            after = llm.statistics()
            made.append(
                (said.token_ids, after.forwards - before.forwards, after.tokens_computed - before.tokens_computed)
            )
        assert llm.path == "packed"
    assert made[0][0] == made[1][0]
    assert made[1][1] < made[0][1] == 60
    assert made[1][2] < 2 * made[0][2], "guesses are asked only where they may come true"


SCHEMA = {
    "type": "object",
    "properties": {"first_name": {"enum": ["ab", "cd"]}, "last_name": {"enum": ["ef", "gh"]}},
    "required": ["first_name", "last_name"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.99}], ids=str)
@pytest.mark.thorough
async def test_what_a_grammar_forces_takes_no_forward_pass_of_its_own(
    tiny_llama, tiny_tokenizer_512, monkeypatch, filters
):
    async with AsyncTransformer(tiny_llama, tiny_tokenizer_512) as llm:
        rules, made = GrammarRule(Grammar.json_schema(llm, SCHEMA, whitespace=False)), []
        for _ in range(2):
            llm.clear_cache()
            before, weighs = llm.statistics().forwards, not filters
            said = await walk(llm, [5], rules, mode="mask", max_new_tokens=60, eos={0}, seed=4, weigh=weighs, **filters)
            assert rules.is_valid(said.state[0])
            made.append((said.token_ids, said.log_weight, llm.statistics().forwards - before))
            monkeypatch.setattr(Grammar, "foreseen", Constraint.foreseen)
    foreseen, plain = made
    assert foreseen[0] == plain[0]
    if not filters:
        assert foreseen[1] == pytest.approx(plain[1], abs=1e-3)
    assert plain[2] == len(plain[0])
    assert foreseen[2] < plain[2]


def test_a_negative_number_is_refused():
    with pytest.raises(InvalidQuery, match="speculate is -1; expected 0 or more"):
        walk(toy.SMALL.model(), [0], speculate=-1)
