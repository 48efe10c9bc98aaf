"""The loop: modes, budgets, verdicts, finality, events."""

from __future__ import annotations

import asyncio
import itertools
import math
import warnings

import numpy as np
import pytest

from genlm_backend import sampling
from genlm_backend.backtracking import (
    KEEP,
    Budget,
    End,
    EntropyThreshold,
    Forced,
    Halt,
    Overlay,
    Replace,
    Retract,
    Rule,
    Splice,
    Token,
    Undo,
    all_of,
    operator_rule,
    phrases,
    rule,
    walk,
)
from genlm_backend.errors import InvalidQuery, RuleRefused, WalkExhausted
from genlm_backend.testing import FakeEngine, check_idle, fake_language_model
from tests.backtracking import toy
from tests.backtracking.speaker import chooser, speaker


@pytest.mark.parametrize("mode", ["exact", "local", "first", "mask", "none"])
def test_no_mode_lets_a_banned_phrase_through(mode: str) -> None:
    assert all(not toy.SMALL.n_matches(text) for text in toy.SMALL.counts(mode, 50))


def test_gathered_walks_are_those_one_after_another() -> None:
    rules = toy.SMALL.rule()

    async def run() -> None:
        async with toy.SMALL.model() as llm:
            walks = [
                lambda i=i: walk(llm, toy.SMALL.prompt, rules, max_new_tokens=4, eos=(), seed=i) for i in range(40)
            ]
            together = await asyncio.gather(*(make() for make in walks))
            alone = [await make() for make in walks]
            assert [o.token_ids for o in together] == [o.token_ids for o in alone]

    asyncio.run(run())


@pytest.mark.parametrize("mode", ["exact", "local", "first", "mask", "none"])
@pytest.mark.parametrize("n", [1, 2, 10])
def test_a_rule_that_always_objects_ends(mode: str, n: int) -> None:
    (outcome,) = toy.SMALL.sample(
        1, lambda llm, i: walk(llm, toy.SMALL.prompt, rule(lambda step: n), max_new_tokens=4, eos=(), mode=mode, seed=i)
    )
    assert outcome.text == "" and not outcome.is_complete
    assert outcome.reason == ("budget" if mode == "none" else "dead end")


def test_a_spent_budget_raises_where_asked() -> None:
    with pytest.raises(WalkExhausted, match="its budget is spent"):
        toy.SMALL.sample(
            1,
            lambda llm, i: walk(
                llm,
                toy.SMALL.prompt,
                rule(lambda s: 1),
                mode="none",
                budget=Budget(undos=3),
                when_exhausted="raise",
                eos=(),
            ),
        )


VOCAB = [b"<p>", b"a", b" stop", b" here", b"b stop", b"<eos>", b"b"]


async def said(rules, **options):
    likely = options.pop("likely")
    async with speaker(VOCAB, chooser(**likely)) as llm:
        return await walk(llm, [0], rules, eos=[5], **({"max_new_tokens": 4, "seed": 0} | options))


async def test_a_stop_string_that_begins_a_banned_phrase_still_stops():
    outcome = await said(phrases(" stop here"), stop=" stop", likely={"otherwise": {"a": 1.0}, "a": {" stop": 1.0}})
    assert (outcome.text, outcome.reason) == ("a", "stop")


NAMES = [b"<p>", b"hello", b" world", b"<|end|>", b"<eos>", b"."]


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("<|end|>", "hello world"),
        ("end", "hello world"),
        ("orld<|end|>", "hello w"),
        ("<|end|>.", "hello world"),
        ("world<|end|>.", "hello "),
        (["ld<|end|>.", "<|end|>."], "hello wor"),
    ],
)
async def test_a_stop_string_in_the_name_of_a_special_token_cuts_only_what_is_text(stop, text):
    likely = {"otherwise": {"hello": 1.0}, "hello": {" world": 1.0}, "world": {"<|end|>": 1.0}, "<|end|>": {".": 1.0}}
    async with speaker(NAMES, chooser(**likely), [b"<|end|>"]) as llm:
        outcome = await walk(llm, [0], stop=stop, eos=[4], seed=0)
        assert (outcome.text, outcome.reason) == (text, "stop")
        assert "".join([piece async for piece in walk(llm, [0], stop=stop, eos=[4], seed=0).text()]) == text


async def test_a_halt_that_cuts_off_more_than_there_is_leaves_nothing():
    async with speaker(VOCAB, chooser(otherwise={" stop": 1.0})) as llm:
        for cut in (5, 6, 9, 99):
            halt = rule(lambda s, cut=cut: Halt("enough", cut))
            assert (await walk(llm, [0], halt, eos=[5], seed=0)).text == ""
            assert [piece async for piece in walk(llm, [0], halt, eos=[5], seed=0).text()] == []


async def test_of_a_ban_and_a_stop_in_one_token_the_first_in_the_text_counts():
    likely = {"otherwise": {"b stop": 0.9, "a": 0.1}, "a": {"<eos>": 1.0}}
    outcome = await said(phrases("b"), stop="stop", likely=likely)
    assert (outcome.text, outcome.reason, outcome.n_undos) == ("a", "eos", 1)
    outcome = await said(phrases("stop"), stop="b", likely=likely)
    assert (outcome.text, outcome.reason, outcome.n_undos) == ("", "stop", 0)


async def test_what_is_banned_at_the_end_is_also_banned_where_another_rule_ends_the_text():
    """But not within what that rule cuts off."""
    likely = {"otherwise": {"a": 1.0}, "a": {" here": 0.9, " stop": 0.1}}
    for cut, n_undos, text in [(0, 1, "a stop"), (5, 0, "a")]:
        second = rule(lambda s, cut=cut: Halt("second", cut) if len(s.path) == 2 else None)
        outcome = await said([second, phrases("here")], likely=likely)
        assert (outcome.text, outcome.reason, outcome.n_undos) == (text, "second", n_undos)


async def test_an_async_judge_is_a_rule():
    async def judge(step):
        await asyncio.sleep(0)
        return step.piece == b"a"

    outcome = await said([rule(judge), lambda step: None], likely={"otherwise": {"a": 0.9, "b": 0.1}})
    assert outcome.text == "bbbb" and outcome.n_undos > 0


@pytest.mark.parametrize("is_cancelled", [False, True])
async def test_a_judge_that_fails_or_is_cancelled_leaves_no_other_unasked(is_cancelled):
    """Python warns of a coroutine that was made and never awaited."""
    entered = asyncio.Event()

    async def fails(step):
        entered.set()
        if is_cancelled:
            await asyncio.Event().wait()
        raise ZeroDivisionError

    async def other(step):
        return None

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        group = all_of(rule(fails), all_of(rule(other), rule(other)), rule(other))
        async with speaker(VOCAB, chooser(otherwise={"a": 1.0})) as llm:
            task = asyncio.ensure_future(walk(llm, [0], group, eos=[5]).finish())
            await entered.wait()
            if is_cancelled:
                task.cancel()
            with pytest.raises(asyncio.CancelledError if is_cancelled else ZeroDivisionError):
                await task
            del task
    assert [str(warning.message) for warning in caught] == []


@pytest.mark.parametrize("kind", [np.bool_, np.int64, bool, int])
async def test_a_function_may_answer_with_numbers_of_numpy(kind):
    outcome = await said(lambda s: kind(s.piece == b"a"), likely={"otherwise": {"a": 0.9, "b": 0.1}})
    assert outcome.text == "bbbb" and outcome.n_undos > 0


async def test_of_two_rules_on_one_token_the_one_that_reaches_further_counts():
    likely = {"otherwise": {"a": 0.5, "b": 0.5}}
    near, far = (
        rule(lambda s: Undo(1, why="near") if s.piece == b"a" else None),
        rule(lambda s: Undo(9, why="far") if s.piece == b"a" and len(s.path) > 1 else None),
    )
    outcome = await said([near, far], likely=likely, seed=3)
    whys = [(e.why, e.length) for e in outcome.events if isinstance(e, Retract)]
    assert outcome.text == "bbbb" and {("far", 0)} <= set(whys) and all(w == "far" or n == 0 for w, n in whys)


@pytest.mark.parametrize("others", [(), ("c",), ("c", "d")])
async def test_only_the_rule_that_writes_is_not_asked_about_it_wherever_the_others_are_grouped(others):
    """Where the writer is in the composition must not be read as a place in a group beside it."""
    group = all_of(*(phrases(other) for other in others), phrases("b", words=False))
    writer = Replace("a", "b", words=False)
    likely = {"otherwise": {"a": 0.9, " here": 0.1}}
    for rules in ([group, writer], [group, phrases("e"), phrases("f"), writer], [phrases("e"), writer, group]):
        outcome = await said(rules, likely=likely)
        assert outcome.text == " here" * 4, "what it would write is banned by another"


async def test_what_is_final_never_changes():
    likely = {"otherwise": {"a": 0.5, "b": 0.3, " stop": 0.2}}
    for mode in ("local", "first", "none", "exact"):
        async with speaker(VOCAB, chooser(**likely)) as llm:
            walking = walk(llm, [0], phrases(["a stop", "ba", "b stop"]), eos=[5], mode=mode, seed=2, max_new_tokens=30)
            final: list[int] = []
            async for event in walking:
                now = walking.token_ids[: event.n_final]
                assert now[: len(final)] == final
                final = now
            assert final == walking.outcome().token_ids


async def test_hold_bounds_what_is_taken_back():
    likely = {"otherwise": {"a": 0.5, "b": 0.5}}
    outcome = await said(rule(lambda s: 3 if s.piece == b"a" else 0), likely=likely, hold=1, max_new_tokens=8)
    assert max(e.n for e in outcome.events if isinstance(e, Retract)) <= 2
    assert outcome.text == "b" * 8


async def test_running_out_gives_the_longest_text_that_was_accepted():
    likely = {"otherwise": {"b": 1.0}, "bbb": {"a": 1.0}}
    no_a = rule(lambda s: 4 if s.piece == b"a" else 0)
    outcome = await said(no_a, likely=likely, mode="none", budget=Budget(undos=5), max_new_tokens=8)
    assert (outcome.text, outcome.reason, outcome.is_complete) == ("bbb", "budget", False)
    pieces = [e.piece for e in outcome.events if isinstance(e, Forced)]
    assert b"".join(pieces) == b"bbb"[: len(pieces)], "and the events lead there"
    outcome = await said(no_a, likely=likely, mode="none", budget=Budget(undos=5), when_exhausted="accept")
    assert outcome.text == "bbba"


async def test_giving_up_never_changes_what_is_final():
    """A longer text of another branch, which was left for good, is none to go back to."""
    vocab = [b"<p>", *(bytes([c]) for c in b"abcdefx"), b"<eos>"]
    steps = {a: {b: 1.0} for a, b in itertools.pairwise("abcdef")}
    streamed = set()
    async with speaker(vocab, chooser(otherwise={"a": 0.9, "x": 0.1}, x={"x": 1.0}, **steps)) as llm:
        for seed in range(5):
            ban, budget = phrases("abcdef", words=False), Budget(draws=7)
            walking = walk(llm, [0], ban, eos=[8], budget=budget, max_new_tokens=20, seed=seed)
            text = "".join([piece async for piece in walking.text()])
            assert text == walking.outcome().text
            streamed.add(text)
    assert "xx" in streamed


@pytest.mark.parametrize(
    ("judge", "n_undos", "said"),
    [
        (lambda s: Undo(2, late=1) if len(s.path) == 2 else None, 1, ""),
        (lambda s: Undo(4, late=2) if len(s.path) == 4 else None, 1, "a"),
        (lambda s: {4: Undo(1) if s.piece == b"b" else Undo(4, late=3)}.get(len(s.path)), 2, ""),
    ],
    ids=["of two tokens", "of four tokens", "after a longer text was accepted"],
)
async def test_running_out_gives_no_text_with_a_fault_that_was_found_late(judge, n_undos, said):
    async with speaker(VOCAB, chooser(otherwise={"a": 1.0}, aaa={"b": 1.0})) as llm:
        budget = Budget(undos=n_undos - 1)
        outcome = await walk(llm, [0], rule(judge), eos=[5], budget=budget, max_new_tokens=4, seed=0)
    assert (outcome.text, outcome.reason, outcome.n_undos) == (said, "budget", n_undos)


async def test_events_tell_every_token_of_a_text_that_is_weighed():
    async with speaker([b"<p>", b"a", b"<eos>"], chooser(otherwise={"a": 1.0}, a={"<eos>": 1.0})) as llm:
        outcome = await walk(llm, [0], (), mode="exact", weigh=True, eos=[2], seed=0)
    assert [e.token_id for e in outcome.events if isinstance(e, Token)] == outcome.token_ids == [1, 2]
    assert [type(e) for e in outcome.events] == [Token, Token, End]


class Takes(Rule[None]):
    """Chooses one token, always."""

    def __init__(self, token_id: int) -> None:
        self.token_id = token_id

    def step(self, state, step):
        return None, KEEP

    async def choose(self, state, choices):
        return self.token_id


async def test_a_chosen_token_has_a_probability_under_the_model_and_was_drawn_from_nothing():
    async with speaker([b"<p>", b"a", b"b"], chooser(otherwise={"a": 0.75, "b": 0.25})) as llm:
        outcome = await walk(llm, [0], Takes(2), eos=(), max_new_tokens=2)
    assert outcome.logprob == pytest.approx(2 * math.log(0.25)) and outcome.log_q is None
    assert outcome.log_weight is None
    told = [e for e in outcome.events if isinstance(e, Token)]
    assert all(e.logprob == pytest.approx(math.log(0.25)) and math.isnan(e.log_q) for e in told)


async def test_a_weight_that_cannot_be_had_is_refused_by_the_name_of_the_rule():
    async with speaker(VOCAB, chooser(otherwise={"a": 0.5, "b": 0.5})) as llm:

        def weighed(rules, mode):
            return walk(llm, [0], rules, mode=mode, weigh=True, max_new_tokens=2, eos=(), seed=0)

        late = operator_rule(EntropyThreshold(0.0))
        with pytest.raises(RuleRefused, match=r"EntropyThreshold cannot be used with weigh=True in mode 'mask'"):
            await weighed(late, "mask")
        writer = rule(lambda s: Splice(1, token_ids=(1,)))
        for mode in ("exact", "mask"):
            with pytest.raises(RuleRefused, match="no weight"):
                await weighed(writer, mode)


def test_the_budget_bounds_what_only_weighs():
    others = [(v,) for v in range(1, 20)]
    one_of_twenty = toy.Toy([[0.05] * 20] * 20, 1, others)
    outcomes = one_of_twenty.walks("mask", 60, weigh=True, budget=Budget(draws=5))
    assert max(o.n_draws for o in outcomes) == 6, "the one that is above the bound, and none after it"
    assert any(o.token_ids == [0] and o.log_weight is None for o in outcomes)


async def test_every_prefix_is_asked_once_and_counted():
    outcome = await said(phrases("b", words=False), likely={"otherwise": {"a": 0.5, "b": 0.5}}, top_k=2)
    assert outcome.n_undos > 0
    assert outcome.n_prefixes < outcome.n_draws
    free = await said((), likely={"otherwise": {"a": 0.5, "b": 0.5}})
    assert free.forwards_per_token == 1.0


async def test_cancelling_a_walk_leaves_nothing_in_the_engine():
    engine = FakeEngine(16, is_open=False)
    llm = fake_language_model(engine)
    task = asyncio.ensure_future(walk(llm, [1], phrases("x"), max_new_tokens=5, eos=(), seed=0).finish())
    await engine.entered()
    task.cancel()
    engine.open()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.to_thread(check_idle, llm)
    await llm.aclose()


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "nonsense"},
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"min_p": 2.0},
        {"hold": -1},
        {"max_new_tokens": -1},
        {"when_exhausted": "nonsense"},
        {"weigh": True},
        {"weigh": True, "mode": "exact", "when_exhausted": "accept"},
        {"overlay": Overlay()},
    ],
)
def test_settings_out_of_range_are_refused(options):
    with pytest.raises(InvalidQuery):
        walk(toy.SMALL.model(), [0], **options)


def test_a_procedure_is_refused_by_name_where_it_has_no_law():
    with pytest.raises(RuleRefused, match="Replace"):
        walk(toy.SMALL.model(), [0], Replace("a", "b"), mode="exact")


@pytest.mark.thorough
def test_noise_at_some_tokens_is_that_of_a_draw():
    rng = np.random.default_rng(0)
    ids = rng.permutation(49152)[:50]
    scores = rng.normal(size=50) * 2
    keys = [*range(200), 12345678901234567890]
    drawn = [int(sampling.draw_among(ids[None], scores[None], [key])[0]) for key in keys]
    rows = np.tile(ids, (len(keys), 1)), np.tile(scores, (len(keys), 1))
    assert sampling.draw_among(*rows, keys).tolist() == drawn
    noise = sampling.gumbel_noise(keys, 49152).numpy()[:, ids]
    assert drawn == (scores + noise).argmax(1).tolist() and len(set(drawn)) > 20
    assert sampling.draw_among(ids[None], np.full((1, 50), -np.inf), [1]).tolist() == [-1]
