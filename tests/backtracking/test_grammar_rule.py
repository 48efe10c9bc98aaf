"""Walks under a grammar: what they draw, against enumeration; where they end."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest

from genlm_backend.backtracking import Budget, StopStrings, walk
from genlm_backend.backtracking.distribution import Filters, from_row
from genlm_backend.backtracking.grammar_rule import GrammarRule
from genlm_backend.errors import InvalidQuery, UnsupportedGrammar
from genlm_backend.potentials import StringSet
from genlm_backend.testing import FakeEngine, fake_language_model
from tests.backtracking.toy import Toy

pytestmark = pytest.mark.thorough

# Token i is the byte i; 3 ends a text. Every text of the set has a beginning that leads out of it.
EOS = 3
TEXTS = [bytes(text) for text in ([0], [0, 1], [1, 1, 2], [1, 2, 0], [2], [2, 2, 2])]
PROMPT = [1]
KEEP_ALL = StopStrings(["never said"])
N_DRAWS = 600  # the two laws lie 0.51 apart, the bound is 0.29


async def conditional(engine: FakeEngine) -> dict[bytes, float]:
    """The model given the set, by enumeration."""
    weights = {}
    for text in TEXTS:
        path = [*text, EOS]
        weights[text] = math.exp(sum(float(engine.row([*PROMPT, *path[:i]])[t]) for i, t in enumerate(path)))
    total = sum(weights.values())
    return {text: weight / total for text, weight in weights.items()}


def locally(engine: FakeEngine) -> dict[bytes, float]:
    """Each token given that the text may still become one of the set."""
    shares = {}
    for text in TEXTS:
        share = 1.0
        for i, token in enumerate([*text, EOS]):
            row = engine.row([*PROMPT, *text[:i]]).exp()
            follows = {t[i] for t in TEXTS if t[:i] == text[:i] and len(t) > i} | (
                {EOS} if text[:i] in TEXTS else set()
            )
            share *= float(row[token] / row[sorted(follows)].sum())
        shares[text] = share
    return shares


async def drawn(mode: str, every: int, n: int = N_DRAWS) -> tuple[FakeEngine, dict[bytes, float]]:
    engine = FakeEngine(n_logits=4)
    async with fake_language_model(engine, n_vocab=4) as llm:
        rule = GrammarRule(StringSet(llm, TEXTS), every=every)
        walks = [
            walk(llm, PROMPT, rule, max_new_tokens=8, eos=[EOS], mode=mode, seed=7, lineage=(i,)) for i in range(n)
        ]
        outcomes = await asyncio.gather(*walks)
        assert all(outcome.reason == "eos" for outcome in outcomes)
        assert all(rule.is_valid(outcome.state[0]._replace(unread=())) for outcome in outcomes)
        counts = Counter(bytes(outcome.token_ids[:-1]) for outcome in outcomes)
    assert set(counts) <= set(TEXTS)
    return engine, {text: counts[text] / n for text in TEXTS}


def distance(one: dict[bytes, float], other: dict[bytes, float]) -> float:
    return sum(abs(one[text] - other[text]) for text in TEXTS)


# sum |p_hat - p| over 6 outcomes; false-alarm rate 1e-9 (Weissman et al. 2003)
BOUND = math.sqrt(2 * (len(TEXTS) * math.log(2) + 9 * math.log(10)) / N_DRAWS)


@pytest.mark.parametrize(("mode", "every"), [("mask", 1), ("local", 1)])
async def test_masking_and_checking_draw_the_same(mode: str, every: int) -> None:
    engine, shares = await drawn(mode, every)
    assert distance(shares, locally(engine)) <= BOUND
    assert distance(shares, await conditional(engine)) > BOUND, "the bound tells the two laws apart"


@pytest.mark.parametrize("every", [1, 3])
async def test_exact_walks_draw_from_the_model_given_the_grammar(every: int) -> None:
    engine, shares = await drawn("exact", every)
    assert distance(shares, await conditional(engine)) <= BOUND
    assert distance(shares, locally(engine)) > BOUND


async def test_looking_ahead_takes_back_to_the_longest_part_that_is_read() -> None:
    engine = FakeEngine(n_logits=4)
    async with fake_language_model(engine, n_vocab=4) as llm:
        rule = GrammarRule(StringSet(llm, [b"\x00\x01\x02\x00\x01\x02"]), every=3)
        outcome = await walk(llm, PROMPT, rule, max_new_tokens=6, eos=[], seed=1)
        assert bytes(outcome.token_ids) == b"\x00\x01\x02\x00\x01\x02"
        assert rule.is_valid(outcome.state[0])


@pytest.mark.parametrize(
    ("stop", "texts"),
    [(b"\2", [b"\0\0\2", b"\0\1\2", b"\1\1\2"]), (b"\1\2", [b"\0\0\2\3", b"\0\1\2", b"\1\1\2", b"\1\2"])],
)
@pytest.mark.parametrize("order", [1, -1])
async def test_a_stop_string_ends_only_what_the_grammar_reads(stop: bytes, texts: list[bytes], order: int) -> None:
    """However far it looks ahead. Of a stop string of two tokens the second is cut off, and cannot be at fault."""
    async with fake_language_model(FakeEngine(n_logits=4), n_vocab=4) as llm:
        for every in (1, 2, 3, 8):
            rule = GrammarRule(StringSet(llm, [b"\0\0\2", b"\0\1\2", b"\1\1\2"]), every=every)
            rules = [rule, StopStrings([stop])][::order]
            options: dict[str, Any] = {"max_new_tokens": 8, "eos": [EOS], "temperature": 20.0}  # all texts come up
            walks = [walk(llm, PROMPT, rules, seed=seed, **options) for seed in range(60)]
            assert {bytes(outcome.token_ids) for outcome in await asyncio.gather(*walks)} == set(texts)


async def test_text_without_room_is_unfinished_not_wrong() -> None:
    engine = FakeEngine(n_logits=4)
    async with fake_language_model(engine, n_vocab=4) as llm:
        rule = GrammarRule(StringSet(llm, [b"\x00\x01\x02\x00\x01\x02"]))
        outcome = await walk(llm, PROMPT, rule, max_new_tokens=4, eos=[EOS], seed=1)
        assert (outcome.reason, bytes(outcome.token_ids)) == ("length", b"\x00\x01\x02\x00")
        assert not rule.is_valid(outcome.state[0])


async def test_a_text_that_left_the_grammar_is_not_accepted() -> None:
    """With the budget spent and objections unheard; a text within is accepted, wherever the rule stands."""
    engine = FakeEngine(n_logits=4)
    async with fake_language_model(engine, n_vocab=4) as llm:
        left = 0
        for every in (1, 3):
            rule = GrammarRule(StringSet(llm, TEXTS), every=every)
            for seed in range(8):
                options: dict[str, Any] = {"max_new_tokens": 8, "eos": [EOS], "seed": seed}
                none = Budget(undos=0)
                outcome = await walk(llm, PROMPT, rule, budget=none, when_exhausted="accept", **options)
                text = outcome.token_ids[:-1] if outcome.reason == "eos" else outcome.token_ids
                assert rule.accepts(outcome) == (bytes(text) in TEXTS)
                left += not rule.accepts(outcome)
                within = await walk(llm, PROMPT, [KEEP_ALL, rule], **options)
                assert within.reason == "eos" and rule.accepts(within, place=1)
        assert left > 0


async def test_checking_asks_for_one_token_at_a_time() -> None:
    class Counting(StringSet):
        n_masks = n_asked = 0

        def mask(self, state: Any) -> Any:
            self.n_masks += 1
            return super().mask(state)

        def allows(self, state: Any, symbol: int) -> bool:
            self.n_asked += 1
            return super().allows(state, symbol)

    engine = FakeEngine(n_logits=4)
    async with fake_language_model(engine, n_vocab=4) as llm:
        constraint = Counting(llm, TEXTS)
        outcome = await walk(llm, PROMPT, GrammarRule(constraint), max_new_tokens=8, eos=[EOS], seed=1)
        assert constraint.n_masks == 0 and constraint.n_asked == outcome.n_draws
        await walk(llm, PROMPT, GrammarRule(constraint), max_new_tokens=8, eos=[EOS], seed=1, mode="mask")
        assert constraint.n_masks > 0
    with pytest.raises(InvalidQuery, match="every"):
        GrammarRule(constraint, every=0)


def test_the_mask_is_what_is_checked() -> None:
    engine = FakeEngine(n_logits=4)
    llm = fake_language_model(engine, n_vocab=4)
    constraint = StringSet(llm, TEXTS)
    rule = GrammarRule(constraint)
    from genlm_backend.backtracking import Prompt

    state = rule.init(Prompt((1,), llm.byte_vocab, frozenset([EOS])))
    for path in itertools.chain.from_iterable(itertools.product(range(3), repeat=n) for n in range(3)):
        here = state._replace(read=constraint.state_of(path))
        row = rule.allowed(here)
        expected = [constraint.allows(here.read, i) for i in range(3)] + [constraint.is_complete(here.read)]
        assert np.array_equal(row, expected)
    llm.close()


async def test_a_mask_leaves_what_it_allows_however_improbable() -> None:
    """The only token allowed has a probability of 1e-16, of 1e-32 at temperature 0.5; top-p leaves it out at first."""
    toy = Toy([[1 - 1e-16, 1e-16]] * 2, 3, [])
    rule = GrammarRule(StringSet(toy.model(), [b"\1\1\1"]))
    settings: list[dict[str, float]] = [
        {},
        {"top_p": 0.9},
        {"temperature": 0.5},
        {"temperature": 0.5, "top_p": 0.9},
    ]
    for filters in settings:
        outcome = await walk(toy.model(), (0,), rule, max_new_tokens=3, mode="mask", eos=(), seed=1, **filters)
        assert (outcome.token_ids, outcome.reason) == ([1, 1, 1], "length"), filters


@pytest.mark.parametrize("scale", [0.0, 1.0, 8.0])
@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999])
def test_a_nucleus_is_the_one_of_all_tokens_sorted(scale: float, top_p: float) -> None:
    scaled = (np.random.default_rng(0).normal(size=5000).round(2) * scale).astype(np.float32)  # with many equals
    masses = np.exp(scaled.astype(np.float64))
    order = np.lexsort((np.arange(5000), -scaled))
    before = np.cumsum(masses[order]) - masses[order]
    expected = order[before < top_p * masses.sum()]
    kept = from_row(scaled, scaled, Filters(top_p=top_p)).token_ids
    assert kept is not None and abs(len(kept) - len(expected)) <= 1  # of the sums' rounding
    assert (kept[: len(expected)] == expected[: len(kept)]).all()


class Counted(StringSet):
    """Counts the masks that are made."""

    n_masks = 0

    def mask(self, state: Any) -> Any:
        self.n_masks += 1
        return super().mask(state)


class MasksAlways(GrammarRule):
    """Does not tell of one token, so that each draw has its mask."""

    tells = False


@pytest.mark.parametrize("filters", [{}, {"temperature": 0}, {"temperature": 0.7, "top_p": 0.9}, {"top_k": 2}], ids=str)
async def test_a_mask_is_made_only_for_draws_that_leave_the_set_and_changes_no_text(filters):
    made: dict[type, Any] = {}
    for rule_type in (GrammarRule, MasksAlways):
        async with fake_language_model(FakeEngine(n_logits=4), n_vocab=4) as llm:
            constraint = Counted(llm, TEXTS)
            rules = [rule_type(constraint)]
            options = {"max_new_tokens": 4, "mode": "mask", "eos": [EOS], **filters}
            walks = [walk(llm, PROMPT, rules, seed=i, **options) for i in range(60)]
            texts = [(one.token_ids, one.logprob, one.log_q, one.reason) for one in await asyncio.gather(*walks)]
            made[rule_type] = texts, constraint.n_masks, sum(len(text[0]) for text in texts)
    (texts, n_masks, n_tokens), (same, n_always, _) = made[GrammarRule], made[MasksAlways]
    assert texts == same
    assert n_always >= n_tokens
    assert 0 < n_masks <= n_always - (filters.get("temperature") != 0), "greedy walks here are refused too often"


class NoOnes(GrammarRule):
    """Overrides the row alone: what it inherits as `allows` does not know of it."""

    def allowed(self, state: Any) -> Any:
        row = super().allowed(state)
        row[1] = False
        return row


async def test_a_rule_that_overrides_its_row_alone_is_asked_for_the_row():
    async with fake_language_model(FakeEngine(n_logits=4), n_vocab=4) as llm:
        assert GrammarRule(StringSet(llm, TEXTS)).tells and not NoOnes(StringSet(llm, TEXTS)).tells
        options = {"max_new_tokens": 4, "mode": "mask", "eos": [EOS]}
        walks = [walk(llm, PROMPT, [NoOnes(StringSet(llm, TEXTS))], seed=i, **options) for i in range(40)]
        assert all(1 not in one.token_ids for one in await asyncio.gather(*walks))


class Maskless(StringSet):
    """Like lark's parser: it tells of a token, not of all."""

    def mask(self, state: Any) -> Any:
        raise UnsupportedGrammar("test", "no masks", "check instead of masking")


async def test_a_constraint_without_masks_is_refused_before_anything_is_drawn():
    async with fake_language_model(FakeEngine(n_logits=4), n_vocab=4) as llm:
        for seed in range(20):
            one = walk(llm, PROMPT, [GrammarRule(Maskless(llm, TEXTS))], seed=seed, mode="mask", eos=[EOS])
            with pytest.raises(UnsupportedGrammar):
                await one
            assert one.n_draws == 0
