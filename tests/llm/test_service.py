"""One engine for many askers: cancellation, failure and life, over an engine that waits for the test."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import gc
import inspect
import math
import pickle
import random
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import pytest
import torch

from genlm_backend import errors
from genlm_backend.batching import run_sync
from genlm_backend.cache import row_memory
from genlm_backend.cache.row_memo import Block
from genlm_backend.errors import EvaluationFailed, GenlmError, ModelClosed, NonFiniteLogits, QueriesReset
from genlm_backend.llm import AsyncLM, LogNormalizer, TopK
from genlm_backend.llm.service import Context, Engine, normalize
from genlm_backend.testing import PATIENCE_S, FakeEngine, check_idle, fake_language_model

N_VOCAB = 64
Load = Callable[..., tuple[FakeEngine, AsyncLM]]


@pytest.fixture
def load() -> Iterator[Load]:
    """Makes models over fake engines; after the test they are idle and still answer."""
    made: list[tuple[FakeEngine, AsyncLM]] = []

    def load_one(*, is_open: bool = True, **options: Any) -> tuple[FakeEngine, AsyncLM]:
        engine = FakeEngine(N_VOCAB, is_open=is_open)
        made.append((engine, fake_language_model(engine, N_VOCAB, **options)))
        return made[-1]

    yield load_one
    for engine, llm in made:
        engine.open()
        engine.fail_calls.clear()
        if not llm._is_closed:
            check_idle(llm)
            llm.close()
        assert engine.is_closed
        assert not len(llm._service.batcher._pending) and not llm._service.batcher._lanes


def ask(llm: AsyncLM, *ids: int) -> asyncio.Task[torch.Tensor]:
    return asyncio.create_task(llm.next_token_logprobs(ids))


async def passes(n: int = 3) -> None:
    for _ in range(n):
        await asyncio.sleep(0)


def same(row: torch.Tensor, oracle: torch.Tensor) -> bool:
    return row.shape == oracle.shape and bool((row - oracle).abs().max() <= 2e-6)


# ---- rows


async def test_a_row_is_what_the_engine_says_normalised(load: Load) -> None:
    engine, llm = load()
    row = await llm.next_token_logprobs([3, 1])
    assert same(row, engine.row([3, 1])) and row.dtype == torch.float32
    assert abs(row.exp().sum().item() - 1) < 1e-5


async def test_equal_requests_are_computed_once_and_each_has_its_own_row(load: Load) -> None:
    engine, llm = load()
    rows = await asyncio.gather(*(ask(llm, 1, 2) for _ in range(5)), ask(llm, 2))
    assert engine.batches == [[(1, 2), (2,)]]
    rows[0].fill_(7)
    assert all(same(row, engine.row([1, 2])) for row in rows[1:5])


async def test_changing_a_returned_row_changes_nothing_else(load: Load) -> None:
    engine, llm = load()
    for _ in range(3):  # computed, remembered, remembered
        (await llm.next_token_logprobs([1])).fill_(0)
        (await llm.batch_next_token_logprobs([[1], [1]])).fill_(0)
    top = await llm.query([1], TopK(3))
    top.logprobs.fill_(0)
    assert same(await llm.next_token_logprobs([1]), engine.row([1]))
    assert len(engine.batches) == 1


async def test_a_batch_is_one_batch_and_its_rows_are_in_order(load: Load) -> None:
    engine, llm = load()
    rows = await llm.batch_next_token_logprobs([[1], [2], [1], [3]])
    assert engine.batches == [[(1,), (2,), (3,)]]
    assert same(rows, torch.stack([engine.row([i]) for i in (1, 2, 1, 3)]))
    assert (await llm.batch_next_token_logprobs([])).shape == (0, N_VOCAB)


async def test_what_was_asked_while_it_was_computed_is_not_computed_again(load: Load) -> None:
    engine, llm = load(is_open=False)
    first = ask(llm, 1)
    await engine.entered()
    again, other = ask(llm, 1), ask(llm, 2)
    await passes()
    engine.open()
    assert same(await first, engine.row([1])) and same(await again, engine.row([1]))
    assert same(await other, engine.row([2]))
    assert engine.batches == [[(1,)], [(2,)]] and llm.statistics().row_hits == 1


async def test_statistics_count(load: Load) -> None:
    engine, llm = load()
    assert llm.statistics() == (0,) * 8
    await llm.batch_next_token_logprobs([[1, 2], [3], [3]])
    await llm.next_token_logprobs([3])
    await llm.query([3], LogNormalizer())
    statistics = llm.statistics()
    assert statistics.requests == 5 and statistics.batches == 1 and statistics.forwards == 1
    assert statistics.tokens_computed == 3 and statistics.row_hits == 2
    llm.clear_cache()
    await llm.next_token_logprobs([3])
    assert llm.statistics().row_hits == 2 and llm.statistics().batches == 2 and engine.n_clears == 1
    llm.clear_kv_cache()
    await llm.next_token_logprobs([3])
    assert llm.statistics().row_hits == 3 and engine.n_clears == 2


async def test_without_a_memo_everything_is_computed(load: Load) -> None:
    engine, llm = load(row_memo_bytes=0)
    for _ in range(3):
        assert same(await llm.next_token_logprobs([1]), engine.row([1]))
    assert len(engine.batches) == 3 and llm.statistics().row_hits == 0


async def test_a_batch_is_put_where_forgotten_rows_were(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_memory, "SMALL_BYTES", 0)
    engine, llm = load(row_memo_bytes=4 * 4 * N_VOCAB)  # of four rows, and one more
    where = set()
    for i in range(12):
        ids = [[1, 1 + i % 3], [2, 1 + i % 3]]
        rows = await llm.batch_next_token_logprobs(ids)
        assert same(rows, torch.stack([engine.row(one) for one in ids]))
        block = llm._service.memo.get(Context(None, tuple(ids[0])))
        assert block is not None
        where.add(block.logprobs.untyped_storage().data_ptr())
        if i % 4 == 3:
            llm.clear_cache()
    assert max(where) - min(where) < 5 * 4 * N_VOCAB, "all in one place"


async def test_clearing_while_requests_run_changes_no_answer(load: Load) -> None:
    engine, llm = load(is_open=False)
    asked = [ask(llm, 1), ask(llm, 2)]
    await engine.entered()
    llm.clear_cache()
    engine.open()
    assert [same(await task, engine.row([i])) for i, task in enumerate(asked, 1)] == [True, True]


async def test_what_was_computed_before_a_clear_is_not_remembered_after_it(load: Load) -> None:
    engine, llm = load(is_open=False)
    running = ask(llm, 1)
    await engine.entered()
    llm.clear_cache()
    again = ask(llm, 1)
    engine.open()
    assert same(await running, engine.row([1])) and same(await again, engine.row([1]))
    assert engine.batches == [[(1,)], [(1,)]]


async def test_clearing_forgets_rows_after_keys_and_values(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that began in between could have used old keys and values for the rows that it leaves behind."""
    engine, llm = load()

    def ask_and_clear() -> None:
        llm.next_token_logprobs_sync([1])

    monkeypatch.setattr(engine, "clear_kv", ask_and_clear)
    llm.clear_cache()
    assert not len(llm._service.memo)


async def test_cache_kv_computes_a_prompt_whose_row_is_remembered(load: Load) -> None:
    engine, llm = load()
    await llm.next_token_logprobs([1, 2])
    llm.clear_kv_cache()
    llm.cache_kv([1, 2])
    assert engine.batches == [[(1, 2)]] * 2
    assert same(await llm.next_token_logprobs([1, 2]), engine.row([1, 2])) and llm.statistics().row_hits == 1


async def test_cache_kv_computes_a_prompt_that_is_just_being_computed(load: Load) -> None:
    """Keys and values of the batch that runs are those that `clear_kv_cache` forgot."""
    engine, llm = load(is_open=False)
    running = ask(llm, 1)
    await engine.entered()
    llm.clear_kv_cache()
    caching = asyncio.create_task(asyncio.to_thread(llm.cache_kv, [1]))
    joined = ask(llm, 1)
    while llm._service.batcher._pending.n_added < 3:
        await asyncio.sleep(0)
    engine.open()
    await asyncio.gather(running, caching)
    assert same(await joined, engine.row([1]))
    assert engine.batches == [[(1,)]] * 2


# ---- cancellation: Triton's four assertions, at every moment


async def test_cancelled_before_it_was_asked(load: Load) -> None:
    engine, llm = load()
    never, mate = ask(llm, 1), ask(llm, 2)
    never.cancel()
    assert same(await mate, engine.row([2])) and never.cancelled()
    assert engine.batches == [[(2,)]] and llm.statistics().requests == 1


async def test_cancelled_while_the_batch_gathers(load: Load) -> None:
    engine, llm = load()
    dropped, mate = ask(llm, 1), ask(llm, 2)
    await passes()
    assert len(llm._service.batcher._pending) == 2
    dropped.cancel()
    assert same(await mate, engine.row([2]))
    with pytest.raises(asyncio.CancelledError):
        await dropped
    assert engine.batches == [[(2,)]]


async def test_cancelled_while_queued_it_is_not_executed_and_not_remembered(load: Load) -> None:
    engine, llm = load(is_open=False)
    running = ask(llm, 1)
    await engine.entered()
    dropped, mate = ask(llm, 2), ask(llm, 3)
    await passes()
    dropped.cancel()
    with pytest.raises(asyncio.CancelledError):
        await dropped
    engine.open()
    assert same(await running, engine.row([1])) and same(await mate, engine.row([3]))
    assert engine.batches == [[(1,)], [(3,)]], "not executed"
    assert llm._service.memo.get(Context(None, (2,))) is None, "not remembered"
    assert same(await llm.next_token_logprobs([2]), engine.row([2])), "the next one is executed"
    assert engine.batches[2:] == [[(2,)]] and llm.statistics().row_hits == 0
    assert same(await llm.next_token_logprobs([2]), engine.row([2])), "and the one after is remembered"
    assert len(engine.batches) == 3 and llm.statistics().row_hits == 1


async def test_if_everything_was_cancelled_nothing_is_executed(load: Load) -> None:
    engine, llm = load()
    for _ in range(3):
        asked = [ask(llm, i) for i in range(4)]
        await passes()
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
    await passes(50)
    assert engine.batches == [] and llm.statistics().batches == 0


async def test_cancelled_while_computed_its_row_is_kept(load: Load) -> None:
    engine, llm = load(is_open=False)
    dropped, mate = ask(llm, 1), ask(llm, 2)
    await engine.entered()
    dropped.cancel()
    with pytest.raises(asyncio.CancelledError):
        await dropped
    engine.open()
    assert same(await mate, engine.row([2]))
    assert same(await llm.next_token_logprobs([1]), engine.row([1]))
    assert len(engine.batches) == 1 and llm.statistics().row_hits == 1


async def test_cancelled_after_the_answer_nothing_happens(load: Load) -> None:
    engine, llm = load()
    task = ask(llm, 1)
    row = await task
    assert not task.cancel() and same(row, engine.row([1]))


async def test_of_two_that_asked_the_same_the_first_is_cancelled(load: Load) -> None:
    engine, llm = load(is_open=False)
    first, second = ask(llm, 1), ask(llm, 1)
    await engine.entered()
    first.cancel()
    engine.open()
    assert same(await second, engine.row([1])) and len(engine.batches) == 1


@pytest.mark.parametrize("n_rounds", [60, pytest.param(1000, marks=pytest.mark.slow)])
async def test_random_cancellations_change_no_other_answer(load: Load, n_rounds: int) -> None:
    engine, llm = load(is_open=False, row_memo_bytes=8 * 4 * N_VOCAB)
    rng = random.Random(0)
    oracle = {i: engine.row([i]) for i in range(N_VOCAB)}
    moments = {"before": 0, "gathering": 0, "running": 0, "after": 0}
    for _ in range(n_rounds):
        n_before = len(engine.batches)
        ids = [rng.randrange(N_VOCAB) for _ in range(32)]
        tasks = [ask(llm, i) for i in ids]
        chosen = set(rng.sample(range(32), rng.randrange(1, 32)))
        moment = rng.choice(list(moments))
        moments[moment] += 1
        if moment == "gathering":
            await passes(rng.randrange(1, 10))
        if moment == "running" and await computing(engine, llm, tasks):
            assert engine.batches[-1]
        if moment == "after":
            engine.let_one_through()
            await asyncio.gather(*tasks)
        for i in chosen:
            tasks[i].cancel()
        if moment != "after":
            engine.let_one_through()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        for i, answer in enumerate(answers):
            if i in chosen and moment != "after":
                assert isinstance(answer, asyncio.CancelledError) or same(answer, oracle[ids[i]])
            else:
                assert same(answer, oracle[ids[i]])
        executed = {context[0] for batch in engine.batches[n_before:] for context in batch}
        if moment in ("before", "gathering"):
            assert executed <= {ids[i] for i in range(32) if i not in chosen}, "only what somebody waited for"
        drain(engine)
        assert not len(llm._service.batcher._pending)
    assert min(moments.values()) > n_rounds // 10, "every moment was tried"
    assert llm.statistics().row_hits > 0 and max(map(len, engine.batches)) > 8


async def computing(engine: FakeEngine, llm: AsyncLM, tasks: list[asyncio.Task[Any]]) -> bool:
    """Wait until the engine has the batch of these tasks; False if all were remembered."""
    n = len(engine.batches)
    while len(engine.batches) == n:
        if all(task.done() for task in tasks):
            return False
        await asyncio.sleep(0)
    return True


def drain(engine: FakeEngine) -> None:
    """Take back a pass through the gate that no batch needed."""
    while engine._passes.acquire(blocking=False):
        pass


# ---- failure


class Boom(Exception):
    """What a model raises."""


async def test_one_failing_context_among_32(load: Load) -> None:
    engine, llm = load()
    engine.fail_on[13] = Boom("no such page")
    rows = await asyncio.gather(*(ask(llm, 1, i) for i in range(32)), return_exceptions=True)
    for i, row in enumerate(rows):
        if i != 13:
            assert isinstance(row, torch.Tensor) and same(row, engine.row([1, i]))
    failed = rows[13]
    assert isinstance(failed, EvaluationFailed) and isinstance(failed, RuntimeError)
    assert failed.__cause__ is engine.fail_on[13]
    assert "2 tokens" in str(failed) and "Boom: no such page" in str(failed)
    assert len(engine.batches) <= 1 + 2 * math.ceil(math.log2(32)), "found by halving"
    for i in range(100):
        assert same(await llm.next_token_logprobs([i // 50, i % 10]), engine.row([i // 50, i % 10]))
    engine.fail_on.clear()
    assert same(await llm.next_token_logprobs([1, 13]), engine.row([1, 13])), "a failure is not remembered"


@pytest.mark.parametrize(
    "error",
    [MemoryError("out"), KeyboardInterrupt(), SystemExit(1), StopIteration(), asyncio.CancelledError(), Boom()],
    ids=lambda error: type(error).__name__,
)
async def test_whatever_is_raised_in_the_engine_only_its_cause_fails(load: Load, error: BaseException) -> None:
    engine, llm = load()
    engine.fail_on[7] = error
    good, bad, joined = await asyncio.gather(ask(llm, 6), ask(llm, 7), ask(llm, 7), return_exceptions=True)
    assert isinstance(good, torch.Tensor) and same(good, engine.row([6]))
    for failed in (bad, joined):
        assert isinstance(failed, EvaluationFailed) and failed.__cause__ is error
    assert same(await llm.next_token_logprobs([8]), engine.row([8]))


async def test_an_error_whose_text_cannot_be_made_is_named(load: Load) -> None:
    class Speechless(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    engine, llm = load()
    engine.fail_on[7] = Speechless()
    with pytest.raises(EvaluationFailed, match="1 tokens failed: Speechless;") as caught:
        await llm.next_token_logprobs([7])
    assert caught.value.__cause__ is engine.fail_on[7]


async def test_where_no_engine_thread_starts_the_caller_hears_it(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    _, llm = load()

    def start() -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(llm._service.batcher, "_start_thread", start)
    with pytest.raises(EvaluationFailed, match=r"did not start \(can\'t start new thread\); end"):
        await llm.next_token_logprobs([1])
    monkeypatch.undo()


async def test_a_failure_that_does_not_come_again_is_heard_by_nobody(load: Load) -> None:
    """Out of memory for the whole batch, but not for its halves."""
    engine, llm = load()
    engine.fail_calls[0] = MemoryError()
    rows = await llm.batch_next_token_logprobs([[i] for i in range(8)])
    assert same(rows, torch.stack([engine.row([i]) for i in range(8)]))
    assert [len(batch) for batch in engine.batches] == [8, 4, 4]


async def test_every_call_fails_and_then_none(load: Load) -> None:
    engine, llm = load()
    engine.fail_calls = dict.fromkeys(range(100), Boom())
    failures = await asyncio.gather(*(ask(llm, i) for i in range(8)), return_exceptions=True)
    assert {type(failure) for failure in failures} == {EvaluationFailed}
    assert len({id(failure) for failure in failures}) == 8, "each has its own"
    engine.fail_calls.clear()
    assert same(await llm.next_token_logprobs([1]), engine.row([1]))


async def test_a_row_with_nan_fails_alone_and_is_not_remembered(load: Load) -> None:
    engine, llm = load()
    engine.nan_on.add(2)
    rows = await asyncio.gather(*(ask(llm, i) for i in range(5)), ask(llm, 2), return_exceptions=True)
    for i, row in enumerate(rows):
        if i in (2, 5):
            assert isinstance(row, NonFiniteLogits) and "1 tokens" in str(row)
        else:
            assert isinstance(row, torch.Tensor) and same(row, engine.row([i]))
    assert llm._service.memo.get(Context(None, (2,))) is None
    with pytest.raises(NonFiniteLogits):
        await llm.query([2], TopK(1))
    engine.nan_on.clear()
    assert same(await llm.next_token_logprobs([2]), engine.row([2]))


async def test_a_batch_with_one_failing_context_cancels_the_rest_and_leaves_no_task(load: Load) -> None:
    engine, llm = load()
    engine.fail_on[3] = Boom()
    with pytest.raises(EvaluationFailed):
        await llm.batch_next_token_logprobs([[1], [3], [2]])
    with pytest.raises(EvaluationFailed):
        await llm.sequence_logprob([1], [2, 3, 1])
    with pytest.raises(EvaluationFailed):
        await llm.batch_sample([[1], [3], [2]], 5, [], seed=0)
    assert asyncio.all_tasks() == {asyncio.current_task()}


class Wrong(Engine):
    """Gives a number of rows that is not the number of contexts."""

    def __init__(self, n_rows: Callable[[int], int]) -> None:
        self.n_rows = n_rows

    def evaluate(self, contexts: Any) -> torch.Tensor:
        return torch.zeros(self.n_rows(len(contexts)), N_VOCAB)


@pytest.mark.parametrize("n_rows", [lambda n: 0, lambda n: n - 1, lambda n: n + 1])
async def test_an_engine_with_a_wrong_number_of_rows_hangs_nobody(n_rows: Callable[[int], int]) -> None:
    async with fake_language_model(Wrong(n_rows), N_VOCAB) as llm:
        answers = await asyncio.gather(ask(llm, 1), ask(llm, 2), return_exceptions=True)
        assert all(isinstance(answer, EvaluationFailed) for answer in answers)


# ---- loops and threads


def test_200_runs_with_tiny_time_limits_and_then_a_good_one(load: Load) -> None:
    engine, llm = load()

    async def hurry(i: int) -> None:
        for step in range(3):
            asked = llm.next_token_logprobs([i % 7, step])
            try:
                assert same(await asyncio.wait_for(asked, (i % 5) * 1e-5), engine.row([i % 7, step]))
            except TimeoutError:
                outcomes.append("late")

    outcomes: list[str] = []
    for i in range(210):
        asyncio.run(hurry(i))
        if i % 20 == 0:
            llm.clear_cache()
    assert outcomes
    assert same(asyncio.run(asyncio.wait_for(llm.next_token_logprobs([9, 9]), PATIENCE_S)), engine.row([9, 9]))


def test_eight_threads_with_a_loop_each(load: Load) -> None:
    engine, llm = load()
    oracle = {(i, j): engine.row([i, j]) for i in range(8) for j in range(8)}
    failures: list[BaseException] = []

    def work(thread: int) -> None:
        async def main() -> None:
            for step in range(10):
                rows = await asyncio.gather(*(llm.next_token_logprobs([(thread + step) % 8, j]) for j in range(8)))
                assert all(same(row, oracle[(thread + step) % 8, j]) for j, row in enumerate(rows))

        try:
            asyncio.run(main())
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert not failures
    assert llm.statistics().requests == 8 * 10 * 8
    assert len({context for batch in engine.batches for context in batch}) == sum(map(len, engine.batches)) == 64


async def test_synchronous_methods_inside_a_running_loop(load: Load) -> None:
    engine, llm = load()
    queued = ask(llm, 5)
    await passes(1)
    assert same(llm.next_token_logprobs_sync([1]), engine.row([1]))
    assert same(llm.batch_next_token_logprobs_sync([[1], [2]]), torch.stack([engine.row([1]), engine.row([2])]))
    llm.cache_kv([3])
    assert same(await queued, engine.row([5])), "the loop that was blocked goes on"
    assert same(await llm.next_token_logprobs([3]), engine.row([3])) and llm.statistics().row_hits >= 2


def test_synchronous_methods_without_a_loop_and_nested(load: Load) -> None:
    engine, llm = load()
    assert same(llm.next_token_logprobs_sync([1]), engine.row([1]))

    async def outer() -> torch.Tensor:
        async def inner() -> torch.Tensor:
            return llm.next_token_logprobs_sync([2])

        return run_sync(inner())

    assert same(run_sync(outer()), engine.row([2]))
    with pytest.raises(errors.EmptyPrompt):
        llm.cache_kv([])


# ---- life


async def test_reset_async_queries_leaves_nobody_hanging(load: Load) -> None:
    engine, llm = load(is_open=False)
    running = ask(llm, 1)
    await engine.entered()
    queued = [ask(llm, i) for i in (2, 3, 3)]
    await passes()
    llm.reset_async_queries()
    for task in queued:
        with pytest.raises(QueriesReset, match="ask again"):
            await task
    engine.open()
    assert same(await running, engine.row([1])) and same(await ask(llm, 2), engine.row([2]))


async def test_aclose_while_queued_and_running_and_twice(load: Load) -> None:
    engine, llm = load(is_open=False)
    running = ask(llm, 1)
    await engine.entered()
    queued = ask(llm, 2)
    await passes()
    closing = asyncio.gather(llm.aclose(), llm.aclose())
    with pytest.raises(ModelClosed):
        await queued
    assert not engine.is_closed, "a batch is computed"
    engine.open()
    assert same(await running, engine.row([1]))
    await closing
    assert engine.is_closed
    await llm.aclose()
    llm.close()


async def test_every_question_after_close_is_refused(load: Load) -> None:
    _, llm = load()
    await llm.next_token_logprobs([1])
    await llm.aclose()
    for question in (
        llm.next_token_logprobs([1]),
        llm.batch_next_token_logprobs([[1]]),
        llm.query([1], TopK(1)),
        llm.sequence_logprob([1], [2]),
        llm.sample([1], 3, []),
        llm.batch_sample([[1]], 3, []),
    ):
        with pytest.raises(ModelClosed, match="load it again"):
            await question
    for call in (llm.next_token_logprobs_sync, llm.cache_kv):
        with pytest.raises(ModelClosed):
            call([1])
    with pytest.raises(ModelClosed):
        async for _ in llm.stream([1], 3):
            pass
    assert llm.statistics().requests == 1
    llm.reset_async_queries()
    llm.clear_cache()


async def test_async_with_closes(load: Load) -> None:
    engine, llm = load()
    with pytest.raises(Boom):
        async with llm:
            await llm.next_token_logprobs([1])
            raise Boom
    assert engine.is_closed


@pytest.mark.thorough
def test_a_forgotten_model_is_collected_and_its_thread_ends() -> None:
    before = set(threading.enumerate())
    llm = fake_language_model(FakeEngine())
    llm.next_token_logprobs_sync([1])
    asyncio.run(llm.sample([1], 3, []))
    (thread,) = set(threading.enumerate()) - before
    assert thread.name == "genlm-engine"
    forgotten, engine = weakref.ref(llm), weakref.ref(llm._service.engine)
    del llm
    gc.collect()
    thread.join(PATIENCE_S)
    assert forgotten() is None and engine() is None and not thread.is_alive()
    assert not set(threading.enumerate()) - before


@dataclasses.dataclass
class Particle:
    llm: AsyncLM
    ids: list[int]


def test_copying_a_particle_shares_its_model(load: Load) -> None:
    _, llm = load()
    particle = Particle(llm, [1])
    for copied in (copy.deepcopy(particle), copy.copy(particle)):
        assert copied.llm is llm
    assert copy.deepcopy(particle).ids is not particle.ids


def test_a_model_is_not_pickled(load: Load) -> None:
    _, llm = load()
    with pytest.raises(TypeError, match="send its name"):
        pickle.dumps(Particle(llm, [1]))


def an_error(kind: type[GenlmError]) -> GenlmError:
    """An error of this class with the least data that its message needs."""
    for n_data in range(5):
        error = kind(*["100000"] * n_data)
        with contextlib.suppress(ValueError, IndexError):
            if str(error):
                return error
    raise AssertionError(f"{kind.__name__} has no message")


ERRORS = [c for c in vars(errors).values() if inspect.isclass(c) and issubclass(c, GenlmError)]


@pytest.mark.parametrize("kind", ERRORS)
def test_every_error_says_something_and_survives_pickling_and_copying(kind: type[GenlmError]) -> None:
    error = an_error(kind)
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(again) is kind and str(again) == str(error) and again.data == error.data


def test_there_are_errors_and_each_is_also_a_built_in_one() -> None:
    assert len(ERRORS) > 15
    for kind in ERRORS:
        built_in = {c for c in kind.__mro__ if c.__module__ == "builtins"} - {Exception, BaseException, object}
        assert built_in or kind is GenlmError


def test_an_error_of_an_engine_is_chained_to_its_cause_and_pickles() -> None:
    engine = FakeEngine()
    engine.fail_on[1] = Boom("x")
    llm = fake_language_model(engine)
    with pytest.raises(EvaluationFailed) as caught:
        llm.next_token_logprobs_sync([1])
    llm.close()
    assert caught.value.__cause__ is engine.fail_on[1]
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


# ---- logits become rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("first", [0.5, -math.inf, -1e4, -200.0])
@pytest.mark.parametrize("n_vocab", [5, 8, 11])
def test_log_probability_plus_normaliser_is_the_logit(dtype: torch.dtype, first: float, n_vocab: int) -> None:
    """Padded columns are dropped, missing ids have -inf, and the first token may be all but impossible."""
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(3, 8, generator=generator)).to(dtype)
    logits[:, 0] = first
    logits[1, 3] = -math.inf
    logprobs, log_normalizers = normalize(logits.clone(), n_vocab)
    assert logprobs.shape == (3, n_vocab) and logprobs.dtype == torch.float32
    n = min(8, n_vocab)
    used = logits[:, :n].double()
    assert (logprobs[:, n:] == -math.inf).all()
    assert torch.allclose(logprobs[:, :n].double(), used.log_softmax(-1), atol=2e-6, rtol=1e-6)
    assert log_normalizers == pytest.approx(used.logsumexp(-1).tolist(), abs=1e-5)
    back = logprobs[:, :n].double() + torch.tensor(log_normalizers)[:, None].double()
    assert torch.allclose(back, used, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (1, 50_001), (50, 4_096), (3, 7)])
def test_normalising_is_log_softmax(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    logits = (4 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)
    before = logits.clone()
    rows = normalize(logits, shape[1]).logprobs
    exact = before.double().log_softmax(-1)
    assert (rows - exact).abs().max() <= 2.5e-6  # torch in float32: 4e-6
    assert torch.equal(logits, before), "logits stay the engine's"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_normalised_alike_alone_in_a_batch_and_by_several_threads(dtype: torch.dtype) -> None:
    wide = (4 * torch.randn(40, 1_111, generator=torch.Generator().manual_seed(0))).to(dtype)
    wide[3, 9] = math.nan
    logits = wide[:, 7:1_007]  # cut out of wider rows
    alone = [normalize(row[None], 1_000) for row in logits]
    assert torch.allclose(alone[0].logprobs[0].double(), logits[0].double().log_softmax(-1), atol=1e-6)

    def with_threads(n_threads: int) -> Block:
        before = torch.get_num_threads()
        torch.set_num_threads(n_threads)
        try:
            return normalize(logits, 1_000)
        finally:
            torch.set_num_threads(before)

    for n_threads in (1, 3):
        with ThreadPoolExecutor(1) as not_main:
            block = not_main.submit(with_threads, n_threads).result()
        assert torch.equal(block.logprobs.nan_to_num(7.0), torch.cat([one.logprobs for one in alone]).nan_to_num(7.0))
        assert block.logprobs[3].isnan().all() and math.isnan(block.log_normalizers.pop(3))
        assert block.log_normalizers == [one.log_normalizers[0] for i, one in enumerate(alone) if i != 3]


@pytest.mark.parametrize("offset", [400.0, 3e4, 1e6, -1e7])
@pytest.mark.parametrize("n_rows", [1, 9])
def test_what_all_logits_share_costs_no_precision(offset: float, n_rows: int) -> None:
    logits = torch.tensor([[0.0, 1.0, -2.0, 3.0]]).expand(n_rows, 4) + offset
    rows, log_normalizers = normalize(logits, 4)
    assert torch.allclose(rows.double(), logits.double().log_softmax(-1), atol=1e-6)
    assert log_normalizers == pytest.approx(logits.double().logsumexp(-1).tolist(), abs=1e-6)


def test_a_fork_hears_that_it_cannot_ask_before_any_lock_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock of the memo may be held for ever by a thread that the fork has not."""
    llm = fake_language_model(FakeEngine())

    def other_process() -> None:
        raise errors.ForkedEngine(1, 2)

    monkeypatch.setattr(llm._service.batcher, "check_process", other_process)
    monkeypatch.setattr(llm._service.memo, "get", lambda key: pytest.fail("the memo was asked"))
    with pytest.raises(errors.ForkedEngine):
        asyncio.run(llm.next_token_logprobs([1]))
    monkeypatch.undo()
    llm.close()


def test_without_a_compiler_rows_are_normalised_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(2, 5)
    expected = normalize(logits, 7)
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    found = normalize(logits, 7)
    assert torch.allclose(found.logprobs, expected.logprobs, atol=1e-6)
    assert found.log_normalizers == pytest.approx(expected.log_normalizers, abs=1e-6)


@pytest.mark.parametrize("value", [torch.finfo(torch.float32).min, -1e9, -1e30])
def test_a_suppressed_first_token_does_not_spoil_the_normaliser(value: float) -> None:
    logits = torch.tensor([[value, 1.0, 2.0]])
    (log_normalizer,) = normalize(logits, 3).log_normalizers
    assert log_normalizer == pytest.approx(math.log(math.e + math.e**2), abs=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 1, 3])
def test_only_rows_that_are_not_finite_have_no_finite_normaliser(value: float, at: int) -> None:
    logits = torch.zeros(3, 4)
    logits[1, at] = value
    assert [math.isfinite(x) for x in normalize(logits, 4).log_normalizers] == [True, False, True]


def test_a_row_without_any_possible_token_has_no_finite_normaliser() -> None:
    assert not math.isfinite(normalize(torch.full((1, 4), -math.inf), 4).log_normalizers[0])


def test_nan_in_a_padded_column_is_nobodys() -> None:
    logits = torch.tensor([[1.0, 2.0, math.nan]])
    assert math.isfinite(normalize(logits, 2).log_normalizers[0])


def test_logits_are_not_changed() -> None:
    logits = torch.randn(2, 5)
    before = logits.clone()
    normalize(logits, 4)
    normalize(logits, 7)
    assert torch.equal(logits, before)
