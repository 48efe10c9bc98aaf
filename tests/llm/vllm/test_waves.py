"""Waves of requests, room for them, and failures, on a core of plain Python."""

from __future__ import annotations

import functools
import math
import random
from typing import Any

import pytest
import torch

from genlm_backend.errors import EngineStalled
from genlm_backend.llm.service import Context
from genlm_backend.llm.vllm.engine import VirtualEngine
from genlm_backend.llm.vllm.ledger import Ledger, Session
from genlm_backend.llm.vllm.plan import next_wave
from genlm_backend.llm.vllm.transports import Fresh
from tests.llm.vllm.fake_core import N_LOGITS, FakeCore, FakeLive, make_engine

PROMPT = (1, 2, 3, 4, 5)


def asked(*ids: tuple[int, ...]) -> list[Context]:
    return [Context(None, i) for i in ids]


def check(engine: VirtualEngine, contexts: list[Context]) -> None:
    """Rows are those of the contexts, in their order; sessions and requests agree."""
    rows = engine.evaluate(contexts)
    core: Any = engine.core
    assert torch.equal(rows, torch.stack([core.row(context.token_ids) for context in contexts]))
    engine._ledger.check_integrity()
    assert set(engine._ledger.names()) == set(core.requests)
    assert len(core.requests) <= core.max_num_seqs
    for name, request in core.requests.items():
        session = engine._ledger.get(name)
        assert session is not None and session.length == len(request.token_ids) == request.n_computed


# ---- what is computed


def test_one_token_for_each_new_context_and_each_fork() -> None:
    engine, (core,) = make_engine()
    check(engine, asked(PROMPT))
    assert (core.n_computed, core.n_steps) == (5, 1)
    check(engine, asked(*((*PROMPT, t) for t in range(4))))
    assert (core.n_computed, core.n_steps) == (9, 2)
    assert (engine.tally.extended, engine.tally.forked, engine.tally.opened) == (1, 3, 1)
    check(engine, asked((*PROMPT, 0, 7), (*PROMPT, 3, 8), (*PROMPT, 3, 9), (*PROMPT[:2], 9)))
    assert (core.n_computed, core.n_steps) == (13, 3)


def test_tokens_that_new_contexts_have_in_common_are_computed_once() -> None:
    engine, (core,) = make_engine()
    check(engine, asked((*PROMPT, 6, 7), (*PROMPT, 6, 8), (*PROMPT, 9)))
    assert core.n_computed == 5 + 1 + 2 + 1
    engine.reset()
    check(engine, asked(*(PROMPT[:n] for n in (5, 2, 3, 1))))  # prefixes of one another
    assert core.n_computed == 5


def test_a_context_asked_again_computes_its_last_token_and_takes_no_other_slot() -> None:
    engine, (core,) = make_engine()
    check(engine, asked(PROMPT))
    check(engine, asked(PROMPT))
    assert core.n_computed == 6 and len(core.requests) == 1


def test_a_prompt_longer_than_the_budget_of_a_step() -> None:
    engine, (core,) = make_engine(budget=3)
    check(engine, asked(PROMPT, (7, 8, 9, 10)))
    assert core.n_steps == 3 and core.n_computed == 9


def test_contexts_of_different_adapters_share_nothing() -> None:
    engine, (core,) = make_engine()
    engine.evaluate([Context(None, PROMPT), Context("a", PROMPT), Context("a", (*PROMPT, 6))])
    assert core.n_computed == 11
    wave = next_wave(engine._ledger, [Context("b", (*PROMPT, 7))])
    assert wave[0].source is None


@pytest.mark.parametrize(("can_fork", "n_computed"), [(True, 7), (False, 14)])
def test_an_extension_longer_than_the_runner_takes_is_a_fork_or_a_new_request(can_fork: bool, n_computed: int) -> None:
    engine, (core,) = make_engine(functools.partial(FakeLive, can_fork=can_fork, longest=1))
    check(engine, asked(PROMPT))
    check(engine, asked((*PROMPT, 6, 7)))
    assert core.n_computed == (7 if can_fork else 12)
    assert engine.tally.extended == 0


# ---- room


def test_more_contexts_than_slots_come_in_waves() -> None:
    engine, (core,) = make_engine(max_num_seqs=3)
    many = asked(*((*PROMPT, t) for t in range(10)))
    for _ in range(3):
        check(engine, many)
        assert core.most_requests <= 3
    assert engine.tally.evicted > 0
    assert engine.counts().evictions > 0


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3])
@pytest.mark.parametrize("n_blocks", [3, 5, 9])
@pytest.mark.parametrize("longest", [None, 1])
def test_random_walks_in_little_room(max_num_seqs: int, n_blocks: int, longest: int | None) -> None:
    """Extensions, forks, backtracks and repeats, with slots and blocks for few of them."""
    make = functools.partial(FakeLive, longest=longest)
    engine, (core,) = make_engine(make, max_num_seqs=max_num_seqs, n_blocks=n_blocks, budget=5)
    rng = random.Random(max_num_seqs * 10 + n_blocks)
    known = [PROMPT]
    for _ in range(60):
        batch = []
        for _ in range(rng.randrange(1, 7)):
            start = rng.choice(known[-12:])
            ids = start[: rng.randrange(1, len(start) + 1)] + tuple(rng.choices(range(N_LOGITS), k=rng.randrange(3)))
            batch.append(ids[: 4 * n_blocks])
        known += batch
        if rng.random() < 0.5:
            core.preempt_next = set(rng.sample(sorted(core.requests), k=min(1, len(core.requests))))
        check(engine, asked(*dict.fromkeys(batch)))
    assert engine.tally.evicted > 10 and engine.tally.preempted > 0
    assert longest is not None or engine.tally.extended > 10
    if max_num_seqs > 1:
        assert engine.tally.forked > 0


def test_the_least_recently_used_is_ended_first() -> None:
    engine, (core,) = make_engine(max_num_seqs=2)
    check(engine, asked((1, 1)))
    check(engine, asked((2, 2)))
    check(engine, asked((1, 1, 1)))
    check(engine, asked((3, 3)))
    assert sorted(request.token_ids for request in core.requests.values()) == [[1, 1, 1], [3, 3]]


def test_a_context_larger_than_all_blocks_is_an_error_with_what_is_held() -> None:
    engine, _ = make_engine(n_blocks=2)
    with pytest.raises(EngineStalled, match="0 of 2 blocks of 4 tokens"):
        engine.evaluate(asked(tuple(range(9))))
    check(engine, asked(PROMPT))


# ---- standing still


def test_a_step_that_schedules_nothing_ends_an_idle_request_and_goes_on() -> None:
    engine, (core,) = make_engine()
    check(engine, asked((7, 7), PROMPT))
    core.stalled_steps = 3
    check(engine, asked((*PROMPT, 1)))
    assert engine.tally.evicted == 1


def test_an_engine_that_stands_still_is_a_clear_error_and_no_spin() -> None:
    engine, (core,) = make_engine()
    check(engine, asked((7, 7), (8, 8)))
    core.stalled_steps = 9  # three for each idle request, and three more
    with pytest.raises(EngineStalled, match="a context of 5 tokens waits") as caught:
        engine.evaluate(asked(PROMPT))
    assert "kv_cache_memory_bytes" in str(caught.value)
    check(engine, asked(PROMPT))


def test_a_skipped_step_now_and_then_ends_nothing() -> None:
    engine, (core,) = make_engine()
    check(engine, asked((7, 7)))
    core.stalled_steps = 2
    check(engine, asked(PROMPT))
    assert engine.tally.evicted == 0


def test_a_preempted_request_that_nobody_waits_for_is_not_computed_again() -> None:
    engine, (core,) = make_engine()
    check(engine, asked((7, 7, 7), PROMPT))
    core.preempt_next = {name for name, request in core.requests.items() if len(request.token_ids) == 3}
    n_before = core.n_computed
    check(engine, asked((*PROMPT, 1)))
    check(engine, asked((*PROMPT, 1, 2)))
    assert engine.tally.preempted == engine.tally.evicted == 1
    assert core.n_computed - n_before <= 2 + 3  # the fake computes it once more in the step that preempts it


def test_a_preempted_request_that_is_waited_for_is_computed_again() -> None:
    engine, (core,) = make_engine(budget=3)
    core.preempt_next = {"genlm-1"}
    check(engine, asked(PROMPT))


# ---- failures


@pytest.mark.parametrize("error", [RuntimeError("boom"), MemoryError(), KeyboardInterrupt()], ids=repr)
def test_after_a_failed_step_the_next_batch_is_served_by_the_same_core(error: BaseException) -> None:
    engine, cores = make_engine()
    core = cores[0]
    check(engine, asked(PROMPT))
    core.fail_on = {13: error}
    with pytest.raises(type(error)):
        engine.evaluate(asked((*PROMPT, 13), (*PROMPT, 1)))
    assert not core.requests and len(engine._ledger) == 0
    check(engine, asked((*PROMPT, 1)))
    assert len(cores) == 1 and engine.tally.restarted == 0


def test_a_dead_core_is_made_anew_and_the_counts_go_on() -> None:
    engine, cores = make_engine()
    check(engine, asked(PROMPT))
    before = engine.counts()
    cores[0].is_dead = True
    with pytest.raises(RuntimeError, match="dead"):
        engine.evaluate(asked((*PROMPT, 1)))
    assert len(cores) == 2 and cores[0].is_closed and engine.tally.restarted == 1
    check(engine, asked((*PROMPT, 1)))
    assert engine.counts().tokens_computed >= before.tokens_computed + 6


def test_where_no_other_core_can_be_made_the_next_batch_tries_again() -> None:
    engine, cores = make_engine()
    check(engine, asked(PROMPT))
    cores[0].is_dead = True
    make, engine._make_core = engine._make_core, lambda: (_ for _ in ()).throw(MemoryError("no room for another"))
    for _ in range(2):
        with pytest.raises(MemoryError):
            engine.evaluate(asked((*PROMPT, 1)))
        assert engine.counts().kv_tokens == 0
    engine._make_core = make
    check(engine, asked((*PROMPT, 1)))
    assert len(cores) == 2 and engine.tally.restarted == 1
    engine.close()
    assert all(core.is_closed for core in cores)


def test_a_core_that_computes_something_else_after_a_failure_is_made_anew() -> None:
    engine, cores = make_engine()
    cores[0].fail_on = {13: RuntimeError("boom")}
    row = FakeCore.row
    cores[0].row = lambda token_ids: row(cores[0], token_ids) + 1  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="boom"):
        engine.evaluate(asked((13,)))
    assert len(cores) == 2 and engine.tally.restarted == 1


def test_after_a_failed_step_of_the_oracle_nothing_that_it_began_is_kept() -> None:
    """vLLM names blocks when it schedules them: what was never computed would be found by a later request."""
    engine, (core,) = make_engine()
    check(engine, asked(PROMPT))
    core.fail_on = {13: RuntimeError("boom")}
    with pytest.raises(RuntimeError, match="boom"):
        engine.uncached(asked((*PROMPT, 13)))
    assert not core.requests and len(engine._ledger) == 0 and core.n_forgotten == 1
    check(engine, asked((*PROMPT, 1)))
    assert engine.tally.restarted == 0


def test_an_oracle_on_a_dead_core_makes_another_one() -> None:
    engine, cores = make_engine()
    cores[0].is_dead = True
    with pytest.raises(RuntimeError, match="dead"):
        engine.uncached(asked(PROMPT))
    assert len(cores) == 2 and engine.tally.restarted == 1
    check(engine, asked(PROMPT))


def test_an_oracle_that_stands_still_is_a_clear_error() -> None:
    engine, (core,) = make_engine()
    core.stalled_steps = 9
    with pytest.raises(EngineStalled):
        engine.uncached(asked(PROMPT))
    assert not core.requests
    core.stalled_steps = 0
    check(engine, asked(PROMPT))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("how", ["evaluate", "uncached"])
def test_what_gave_a_row_that_is_not_finite_is_computed_anew(how: str, bad: float) -> None:
    """Keys and values that are NaN would make every continuation NaN, also where the cause has passed."""
    engine, (core,) = make_engine()
    check(engine, asked((7, 7)))
    row = core.row
    core.row = lambda ids: torch.full((N_LOGITS,), bad) if 13 in ids else row(ids)  # type: ignore[method-assign]
    rows = getattr(engine, how)(asked((*PROMPT, 13), (*PROMPT, 1)))
    assert not rows[0].isfinite().any() and torch.equal(rows[1], row((*PROMPT, 1)))
    assert engine.counts().kv_tokens == 0 and not core.requests and core.n_forgotten == 1
    core.row = row  # type: ignore[method-assign]
    n_before = core.n_computed
    check(engine, asked((*PROMPT, 13, 2)))
    assert core.n_computed - n_before == len(PROMPT) + 2


def test_a_row_in_which_some_tokens_are_impossible_is_kept() -> None:
    engine, (core,) = make_engine()
    row = core.row
    core.row = lambda ids: row(ids).index_fill(0, torch.tensor([0, 3]), -math.inf)  # type: ignore[method-assign]
    engine.evaluate(asked(PROMPT))
    assert engine.counts().kv_tokens == len(PROMPT) and core.n_forgotten == 0


def test_clearing_ends_all_sessions_before_the_next_batch() -> None:
    engine, (core,) = make_engine()
    check(engine, asked(PROMPT))
    engine.clear_kv()
    assert engine.counts().kv_tokens == engine.counts().kv_bytes == 0
    check(engine, asked((*PROMPT, 1)))
    assert core.n_computed == 5 + 6
    assert engine.counts().kv_tokens == 6


# ---- transports that keep nothing


def test_fresh_requests_give_the_same_rows_and_leave_nothing() -> None:
    engine, (core,) = make_engine(Fresh, max_num_seqs=3)
    contexts = asked(PROMPT, PROMPT[:2], *((*PROMPT, t) for t in range(9)))
    rows = engine.evaluate(contexts)
    assert torch.equal(rows, torch.stack([core.row(context.token_ids) for context in contexts]))
    assert not core.requests and core.most_requests <= 3
    assert engine.counts().kv_tokens == 0


def test_the_oracle_is_served_where_all_slots_are_held() -> None:
    engine, (core,) = make_engine(max_num_seqs=2)
    check(engine, asked((7, 7), (8, 8)))
    assert torch.equal(engine.uncached(asked(PROMPT))[0], core.row(PROMPT))
    check(engine, asked((7, 7, 7)))


# ---- the plan


def test_a_wave_has_continuations_first_then_forks_then_new_requests() -> None:
    ledger = Ledger()
    ledger.add(Session("s", None), PROMPT)
    wave = next_wave(ledger, asked((9, 9), (*PROMPT[:3], 9), (*PROMPT, 6), (*PROMPT, 7)))
    assert [(target.source is not None, target.is_extension, target.n_shared) for target in wave] == [
        (True, True, 5),
        (True, False, 3),
        (True, False, 5),
        (False, False, 0),
    ]
    assert [target.n_blocks(4) for target in wave] == [0, 1, 1, 1]
    assert [target.n_blocks(5) for target in wave] == [1, 1, 1, 1]
