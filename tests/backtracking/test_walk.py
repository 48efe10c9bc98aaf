"""The loop: modes, budgets, verdicts, finality, events."""

from __future__ import annotations

import asyncio

import pytest

from genlm_backend.backtracking import Budget, rule, walk
from genlm_backend.errors import WalkExhausted
from tests.backtracking import toy


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
