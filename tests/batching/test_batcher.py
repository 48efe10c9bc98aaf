"""The batcher alone, over an engine that gives each key back: what is computed together, and who hears what."""

from __future__ import annotations

import asyncio
import functools
import gc
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Awaitable, Callable, Hashable, Iterator, Sequence
from typing import Any

import pytest

from genlm_backend.batching import Batcher, Job
from genlm_backend.batching.batcher import QUIET_PASSES
from genlm_backend.errors import EngineNotStarted, ForkedEngine, ModelClosed, QueriesReset

PATIENCE_S = 30.0  # fails instead of hanging


class Echo:
    """Answers each question with (key, question). Remembers its batches; waits at a gate, if there is one."""

    def __init__(self) -> None:
        self.batches: list[list[Hashable]] = []
        self.faults: dict[Hashable, BaseException] = {}
        self.gate: threading.Semaphore | None = None
        self.entered = threading.Semaphore(0)

    def evaluate(self, jobs: Sequence[Job]) -> list[list[Any]]:
        self.batches.append([job.key for job in jobs])
        self.entered.release()
        if self.gate is not None:
            assert self.gate.acquire(timeout=PATIENCE_S)
        for job in jobs:
            if job.key in self.faults:
                raise self.faults[job.key]
        return [[(job.key, question) for question in job.questions] for job in jobs]

    async def wait_entered(self) -> None:
        assert await asyncio.to_thread(self.entered.acquire, timeout=PATIENCE_S)


Make = Callable[..., Batcher]


@pytest.fixture
def echo() -> Echo:
    return Echo()


@pytest.fixture
def make(echo: Echo) -> Iterator[Make]:
    """Makes batchers that close by quiet only, not by age; after the test, none has anything left."""
    made: list[Batcher] = []

    def make_one(**options: Any) -> Batcher:
        options = {"batch_size": 256, "max_age_s": PATIENCE_S} | options
        made.append(Batcher(echo.evaluate, **options))
        return made[-1]

    yield make_one
    for batcher in made:
        if not batcher._closed:
            echo.gate = None
            assert asyncio.run(one(batcher, "last")) == ("last", None), "the engine goes on"
        batcher.close()
        assert not len(batcher._pending) and not batcher._lanes and not batcher._busy
        assert batcher._thread is None or not batcher._thread.is_alive()


async def one(batcher: Batcher, key: Hashable, question: Any = None) -> Any:
    return await asyncio.wait_for(batcher.ask(key, question), PATIENCE_S)


# ---- what is one batch

NESTINGS = ("gather", "task group", "task")
DEPTHS = {
    "none": [0] * 10,
    "all 1": [1] * 10,
    "all 2": [2] * 10,
    "all 3": [3] * 10,
    "all 4": [4] * 10,
    "half 2": [0] * 5 + [2] * 5,
    "half 4": [0] * 5 + [4] * 5,
    "one 4": [0] * 9 + [4],
    "mixed": [0, 1, 2, 3, 4] * 2,
}


async def nested(ask: Callable[[], Awaitable[Any]], depth: int, nesting: str) -> Any:
    if depth == 0:
        return await ask()
    inner = nested(ask, depth - 1, nesting)
    match nesting:
        case "gather":
            (answer,) = await asyncio.gather(inner)
            return answer
        case "task":
            return await asyncio.create_task(inner)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(inner)
    return task.result()


def sizes_when_closed(batcher: Batcher, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets the number of queued keys each time a batch closes, whatever still joins before it is taken."""
    sizes: list[int] = []
    start_thread = batcher._start_thread

    def start() -> None:
        sizes.append(len(batcher._pending))
        start_thread()

    monkeypatch.setattr(batcher, "_start_thread", start)
    return sizes


async def walk(batcher: Batcher, depths: Sequence[int], nesting: str, n_steps: int) -> None:
    async def particle(i: int, depth: int) -> None:
        for step in range(n_steps):
            key = (i, step)
            assert await nested(functools.partial(batcher.ask, key, "?"), depth, nesting) == (key, "?")

    await asyncio.wait_for(asyncio.gather(*(particle(i, depth) for i, depth in enumerate(depths))), PATIENCE_S)


@pytest.mark.parametrize("nesting", NESTINGS)
@pytest.mark.parametrize("depths", DEPTHS)
async def test_particles_nested_up_to_4_tasks_deep_form_one_batch_per_step(
    make: Make, echo: Echo, monkeypatch: pytest.MonkeyPatch, depths: str, nesting: str
) -> None:
    batcher = make()
    sizes = sizes_when_closed(batcher, monkeypatch)
    await walk(batcher, DEPTHS[depths], nesting, n_steps=4)
    assert sizes == [10] * 4
    assert [sorted(batch) for batch in echo.batches] == [[(i, step) for i in range(10)] for step in range(4)]


@pytest.mark.parametrize("quiet_passes", [1, 2, 4])
async def test_fewer_quiet_passes_would_split_them(
    make: Make, monkeypatch: pytest.MonkeyPatch, quiet_passes: int
) -> None:
    batcher = make(quiet_passes=quiet_passes)
    sizes = sizes_when_closed(batcher, monkeypatch)
    await walk(batcher, DEPTHS["half 4"], "gather", n_steps=4)
    assert min(sizes) < 10


async def test_a_gather_within_a_gather_asks_all_its_keys_in_one_batch(make: Make, echo: Echo) -> None:
    batcher = make()
    await asyncio.gather(*(asyncio.gather(*(batcher.ask((i, j), None) for j in range(4))) for i in range(4)))
    assert len(echo.batches) == 1 and len(echo.batches[0]) == 16


async def test_a_lone_request_is_a_batch_after_the_quiet_passes(make: Make, echo: Echo) -> None:
    batcher = make()
    asked = batcher.ask("a", 1)
    for _ in range(QUIET_PASSES):
        await asyncio.sleep(0)
    assert batcher._busy or asked.done(), "nothing but passes is waited for"
    assert await asyncio.wait_for(asked, PATIENCE_S) == ("a", 1)
    assert echo.batches == [["a"]] and batcher.n_batches == 1


async def test_a_full_batch_closes_without_waiting_for_quiet(make: Make, echo: Echo) -> None:
    batcher = make(batch_size=3, quiet_passes=10**9)
    assert await asyncio.gather(*(one(batcher, i) for i in range(3))) == [(i, None) for i in range(3)]
    assert echo.batches == [[0, 1, 2]]
    batcher.quiet_passes = 1


async def test_a_trickle_that_never_goes_quiet_does_not_starve_the_first(make: Make, echo: Echo) -> None:
    batcher = make(quiet_passes=2, max_age_s=0.01)
    first = batcher.ask("first", None)
    others = []
    while not first.done():
        others.append(batcher.ask(len(others), None))
        await asyncio.sleep(0)
    await asyncio.gather(*others)
    assert echo.batches[0][0] == "first"


async def test_what_is_asked_while_the_engine_works_is_the_next_batch(make: Make, echo: Echo) -> None:
    batcher = make()
    echo.gate = threading.Semaphore(0)
    first = batcher.ask("a", None)
    await echo.wait_entered()
    later = [batcher.ask(key, None) for key in "bcd"]
    for _ in range(3 * QUIET_PASSES):
        await asyncio.sleep(0)
    assert echo.batches == [["a"]] and batcher._lanes and len(batcher._pending) == 3
    echo.gate.release(10)
    await asyncio.gather(first, *later)
    assert echo.batches == [["a"], ["b", "c", "d"]]


async def test_passes_are_counted_once_although_the_loop_asked_before_it_heard_that_the_engine_is_idle(
    make: Make, echo: Echo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two chains of ticks in one loop would count each pass twice, and split nested particles."""
    batcher = make()
    echo.gate = threading.Semaphore(0)
    ticks: Counter[int] = Counter()
    n_passes = 0
    tick = batcher._tick

    def counted(*args: Any) -> None:
        ticks[n_passes] += 1
        tick(*args)

    monkeypatch.setattr(batcher, "_tick", counted)
    asked = [batcher.ask("a", None)]
    await echo.wait_entered()
    asked.append(batcher.ask("b", None))
    echo.gate.release(10)
    while batcher._busy:  # without a pass of the loop: the answer is on its way, but not here
        threading.Event().wait(0.001)
    ticks.clear()
    asked.append(batcher.ask("c", None))
    while not asked[-1].done():
        n_passes += 1
        await asyncio.sleep(0)
    assert await asyncio.gather(*asked) == [("a", None), ("b", None), ("c", None)]
    assert set(ticks.values()) == {1} and len(ticks) >= QUIET_PASSES


async def test_a_lost_tick_is_started_again_by_the_next_request(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A KeyboardInterrupt can come instead of a callback."""
    batcher = make()
    monkeypatch.setattr(batcher, "_tick", lambda *_: None)
    first = batcher.ask("a", None)
    await asyncio.sleep(0)
    monkeypatch.undo()
    next(iter(batcher._lanes.values())).tick_s = 0.0  # long ago
    assert await one(batcher, "b") == ("b", None)
    assert await asyncio.wait_for(first, PATIENCE_S) == ("a", None)


# ---- joining


async def test_equal_requests_join_and_are_computed_once(make: Make, echo: Echo) -> None:
    batcher = make()
    answers = await asyncio.gather(*(one(batcher, i % 3, i) for i in range(12)))
    assert answers == [(i % 3, i) for i in range(12)], "each has the answer to its own question"
    assert echo.batches == [[0, 1, 2]]


@pytest.mark.parametrize("cancelled", [[0], [1], [2], [0, 1], [0, 2], [0, 1, 2]])
async def test_of_joined_waiters_any_may_be_cancelled(make: Make, echo: Echo, cancelled: list[int]) -> None:
    batcher = make()
    asked = [batcher.ask("a", i) for i in range(3)]
    mate = batcher.ask("b", None)
    for i in cancelled:
        asked[i].cancel()
    assert await mate == ("b", None)
    for i, future in enumerate(asked):
        assert future.cancelled() if i in cancelled else await future == ("a", i)
    assert echo.batches == [["b"]] if len(cancelled) == 3 else [["a", "b"]]


# ---- failure


@pytest.mark.parametrize("n", [1, 2, 3, 7, 32])
async def test_one_bad_key_fails_alone(make: Make, echo: Echo, n: int) -> None:
    batcher = make()
    for bad in range(n):
        echo.faults = {bad: ValueError(bad)}
        answers = await asyncio.gather(*(one(batcher, i) for i in range(n)), return_exceptions=True)
        assert [i for i, answer in enumerate(answers) if answer != (i, None)] == [bad]
        assert answers[bad] is echo.faults[bad]


@pytest.mark.parametrize(
    "error", [MemoryError(), KeyboardInterrupt(), SystemExit(3), GeneratorExit(), asyncio.CancelledError("engine")]
)
async def test_whatever_is_raised_reaches_the_waiter_of_the_key_that_caused_it(
    make: Make, echo: Echo, error: BaseException
) -> None:
    batcher = make(explain=lambda job, cause: RuntimeError(job.key, repr(cause)))
    echo.faults["bad"] = error
    good, bad = await asyncio.gather(one(batcher, "good"), one(batcher, "bad"), return_exceptions=True)
    assert good == ("good", None)
    assert isinstance(bad, RuntimeError) and bad.args == ("bad", repr(error))


async def test_stop_iteration_which_no_future_takes_hangs_nobody(make: Make, echo: Echo) -> None:
    batcher = make()
    echo.faults["bad"] = StopIteration()
    good, bad = await asyncio.gather(one(batcher, "good"), one(batcher, "bad"), return_exceptions=True)
    assert good == ("good", None) and isinstance(bad, RuntimeError)


@pytest.mark.parametrize("wrong", [[], [[]], [[1, 2]], [[1], [2]], None], ids=str)
async def test_an_engine_that_gives_too_few_or_too_many_answers_hangs_nobody(
    echo: Echo, make: Make, monkeypatch: pytest.MonkeyPatch, wrong: Any
) -> None:
    monkeypatch.setattr(echo, "evaluate", lambda jobs: wrong)
    batcher = Batcher(lambda jobs: echo.evaluate(jobs), batch_size=4)
    with pytest.raises((RuntimeError, TypeError)):
        await one(batcher, "a")
    monkeypatch.undo()
    assert await one(batcher, "a") == ("a", None)
    batcher.close()


@pytest.fixture
def no_engine_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    start = threading.Thread.start

    def start_others(thread: threading.Thread) -> None:
        if thread.name == "genlm-engine":
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start_others)
        yield


async def test_where_no_engine_thread_starts_everyone_hears_it_and_a_later_request_tries_again(
    make: Make, no_engine_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    batcher = make(batch_size=2)
    for _ in range(2):
        answers = await asyncio.gather(*(one(batcher, key) for key in "aabcd"), return_exceptions=True)
        assert [type(answer) for answer in answers] == [EngineNotStarted] * 5
        assert "can't start new thread" in str(answers[0]) and len({id(answer) for answer in answers}) == 5
    assert not batcher._lanes


async def test_a_batcher_whose_thread_never_started_can_be_closed(make: Make, no_engine_thread: None) -> None:
    batcher = make()
    with pytest.raises(EngineNotStarted):
        await one(batcher, "a")
    batcher.close()


async def test_an_engine_thread_that_ended_is_replaced(make: Make, echo: Echo) -> None:
    batcher = make()
    assert await one(batcher, "a") == ("a", None)
    assert batcher._thread is not None
    batcher._wake.put(False)
    batcher._thread.join(PATIENCE_S)
    assert await one(batcher, "b") == ("b", None)


async def test_a_loop_that_goes_on_in_a_fork_starts_no_engine_there(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    batcher = make()
    asked = batcher.ask("a", None)
    monkeypatch.setattr(batcher, "_pid", -1)
    with pytest.raises(ForkedEngine, match="process -1"):
        await asyncio.wait_for(asked, PATIENCE_S)
    monkeypatch.undo()
    assert batcher._thread is None


async def test_an_explanation_that_raises_leaves_the_plain_error(make: Make, echo: Echo) -> None:
    def explain(job: Job, error: BaseException) -> BaseException:
        raise ValueError("cannot be explained")

    batcher = make(explain=explain)
    echo.faults["bad"] = MemoryError()
    good, bad = await asyncio.gather(one(batcher, "good"), one(batcher, "bad"), return_exceptions=True)
    assert good == ("good", None) and bad is echo.faults["bad"]


class NoMemoryForThem(list[Any]):
    """Answers that can be counted but not collected."""

    def __iter__(self) -> Iterator[Any]:
        raise MemoryError


async def test_no_memory_for_the_answers_of_a_batch_hangs_nobody(make: Make) -> None:
    answers: list[Any] = [NoMemoryForThem("a")]
    batcher = Batcher(lambda jobs: [answers[0]] * len(jobs), batch_size=4)
    failed = await asyncio.gather(one(batcher, "a"), one(batcher, "b"), return_exceptions=True)
    assert [type(error) for error in failed] == [MemoryError] * 2
    answers[0] = ["good"]
    assert await one(batcher, "a") == "good"
    batcher.close()


async def test_no_memory_to_take_a_batch_hangs_nobody(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    batcher = make()
    take, n_calls = batcher._take, [0]

    def take_the_second_time(limit: int) -> Any:
        n_calls[0] += 1
        if n_calls[0] == 1:
            raise MemoryError
        return take(limit)

    monkeypatch.setattr(batcher, "_take", take_the_second_time)
    assert await one(batcher, "a") == ("a", None)
    assert n_calls[0] == 2


async def test_an_interrupt_while_the_engine_is_woken_leaves_nobody_waiting(make: Make, echo: Echo) -> None:
    """KeyboardInterrupt may come between any two steps; the engine may be awake then, but must not look busy."""
    batcher = make()
    assert await one(batcher, "first") == ("first", None)
    wake = batcher._wake
    raised: list[bool] = []

    class Interrupted:
        def put(self, is_batch: bool) -> None:
            raised.append(batcher._busy)
            raise KeyboardInterrupt

    first = batcher.ask("a", None)
    (lane,) = batcher._lanes.values()
    lane.n_quiet = QUIET_PASSES
    batcher._wake = Interrupted()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        batcher._tick(lane, lane.n_starts)
    assert raised == [False]
    batcher._wake = wake
    assert await one(batcher, "b") == ("b", None)
    assert await asyncio.wait_for(first, PATIENCE_S) == ("a", None)


async def test_a_future_that_was_cancelled_while_its_batch_ran_changes_nothing(make: Make, echo: Echo) -> None:
    batcher = make()
    echo.gate = threading.Semaphore(0)
    asked = [batcher.ask(i, None) for i in range(4)]
    await echo.wait_entered()
    asked[1].cancel()
    echo.gate.release()
    assert await asyncio.gather(asked[0], *asked[2:]) == [(0, None), (2, None), (3, None)]


async def test_an_interrupt_between_two_answers_leaves_nobody_waiting(make: Make) -> None:
    """KeyboardInterrupt may come inside any callback; the answers after it are delivered in the next pass."""
    from genlm_backend.batching.batcher import _deliver, _Lane

    loop = asyncio.get_running_loop()
    futures = [loop.create_future() for _ in range(3)]

    class Interrupted:
        def done(self) -> bool:
            futures_left[1] = (futures[1], 1)
            raise KeyboardInterrupt

    futures_left: list[Any] = [(futures[2], 2), (Interrupted(), 1), (futures[0], 0)]
    with pytest.raises(KeyboardInterrupt):
        _deliver(_Lane(loop), futures_left, None)
    assert await asyncio.wait_for(asyncio.gather(*futures), PATIENCE_S) == [0, 1, 2]


# ---- many


@pytest.mark.slow
async def test_10_000_waiting_coroutines_are_answered_in_order_of_arrival(make: Make, echo: Echo) -> None:
    batcher = make(batch_size=256)
    answers = await asyncio.gather(*(one(batcher, i) for i in range(10_000)))
    assert answers == [(i, None) for i in range(10_000)]
    assert [key for batch in echo.batches for key in batch] == list(range(10_000))
    assert {len(batch) for batch in echo.batches[:-1]} == {256}


async def test_one_particle_among_99_busy_ones_waits_for_no_more_than_what_came_before_it(
    make: Make, echo: Echo
) -> None:
    batcher = make(batch_size=10)
    waits: list[int] = []
    is_over = False

    async def busy(i: int) -> None:
        step = 0
        while not is_over:
            await batcher.ask((i, step), None)
            step += 1

    async def rare() -> None:
        for step in range(20):
            before = len(echo.batches)
            await batcher.ask(("rare", step), None)
            waits.append(len(echo.batches) - before)

    async with asyncio.TaskGroup() as group:
        others = [group.create_task(busy(i)) for i in range(99)]
        await rare()
        is_over = True
    assert all(task.done() for task in others)
    assert len(echo.batches) > 100 and max(waits) <= 100 // 10 + 2


# ---- loops


def test_one_loop_after_another(make: Make, echo: Echo) -> None:
    batcher = make()
    for i in range(200):
        assert asyncio.run(one(batcher, i)) == (i, None)
    assert len(echo.batches) == 200 and threading.active_count() < 20


def test_200_loops_that_gave_up_and_then_a_good_request(make: Make, echo: Echo) -> None:
    """Requests that ran out of time at any moment, with their loop gone, are in nobody's way."""
    batcher = make()

    async def give_up(i: int) -> None:
        asked = [asyncio.ensure_future(one(batcher, (i, j))) for j in range(3)]
        for _ in range(i % (2 * QUIET_PASSES)):
            await asyncio.sleep(0)
        if i % 3 == 0:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(asyncio.shield(asyncio.get_running_loop().create_future()), 1e-6)
        for future in asked[: i % 4]:
            future.cancel()

    for i in range(210):
        asyncio.run(give_up(i))
    assert asyncio.run(one(batcher, "good")) == ("good", None)


def closed_loop_with_queued_work(batcher: Batcher, *keys: Hashable) -> None:
    loop = asyncio.new_event_loop()

    async def ask() -> None:
        for key in keys:
            batcher.ask(key, None)

    loop.run_until_complete(ask())
    loop.close()


def test_work_of_a_closed_loop_is_dropped(make: Make, echo: Echo) -> None:
    batcher = make()
    closed_loop_with_queued_work(batcher, "a", "b")
    assert len(batcher._pending) == 2
    assert asyncio.run(one(batcher, "c")) == ("c", None)
    assert echo.batches == [["c"]] and not batcher._lanes


def test_old_requests_that_nobody_waits_for_do_not_split_the_next_batch(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The age of a request whose loop was closed is nobody's."""
    batcher = make(max_age_s=5.0)
    sizes = sizes_when_closed(batcher, monkeypatch)
    closed_loop_with_queued_work(batcher, "old")
    next(iter(batcher._pending._entries.values())).arrived_s -= 1000.0
    asyncio.run(walk(batcher, DEPTHS["half 4"], "gather", n_steps=1))
    assert sizes == [10]


def test_a_loop_closed_while_its_batch_runs(make: Make, echo: Echo) -> None:
    batcher = make()
    echo.gate = threading.Semaphore(0)
    loop = asyncio.new_event_loop()

    async def ask() -> None:
        batcher.ask("a", None)
        while not echo.batches:
            await asyncio.sleep(0)

    loop.run_until_complete(ask())
    loop.close()
    echo.gate.release(10)
    assert asyncio.run(one(batcher, "b")) == ("b", None)


def test_a_loop_that_stops_and_never_goes_on_blocks_nobody(make: Make, echo: Echo) -> None:
    batcher = make()
    stopped = asyncio.new_event_loop()
    futures: list[asyncio.Future[Any]] = []

    async def ask() -> None:
        futures.extend(batcher.ask(key, None) for key in "ab")

    stopped.run_until_complete(ask())
    for i in range(3):
        assert asyncio.run(one(batcher, i)) == (i, None)
    assert echo.batches[0] == ["a", "b", 0], "its requests are as good as others"
    assert stopped.run_until_complete(asyncio.gather(*futures)) == [("a", None), ("b", None)], "and if it does go on"
    stopped.close()


def test_a_loop_that_stops_while_its_batch_runs_leaves_the_engine_free(make: Make, echo: Echo) -> None:
    batcher = make()
    echo.gate = threading.Semaphore(0)
    stopped = asyncio.new_event_loop()

    async def ask() -> None:
        batcher.ask("a", None)
        while not echo.batches:
            await asyncio.sleep(0)

    stopped.run_until_complete(ask())
    echo.gate.release(10)
    assert asyncio.run(one(batcher, "b")) == ("b", None)
    stopped.close()


def test_eight_threads_with_a_loop_each(make: Make, echo: Echo) -> None:
    batcher = make()
    failures: list[BaseException] = []

    def work(thread: int) -> None:
        async def main() -> None:
            for step in range(20):
                keys = [(thread * i * step) % 50 for i in range(5)]
                answers = await asyncio.gather(*(one(batcher, key, thread) for key in keys))
                assert answers == [(key, thread) for key in keys]

        try:
            asyncio.run(main())
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert not failures and not any(thread.is_alive() for thread in threads)


def test_loops_in_two_threads_share_a_batch(make: Make, echo: Echo) -> None:
    batcher = make()
    echo.gate = threading.Semaphore(0)
    answers: list[Any] = []

    async def main(key: str) -> None:
        answers.append(await one(batcher, key))

    async def hold() -> None:
        asked = batcher.ask("hold", None)
        await echo.wait_entered()
        threads = [threading.Thread(target=asyncio.run, args=(main(key),)) for key in "ab"]
        for thread in threads:
            thread.start()
        while len(batcher._pending) < 2:
            await asyncio.sleep(0)
        assert echo.gate is not None
        echo.gate.release(10)
        await asked
        for thread in threads:
            await asyncio.to_thread(thread.join)

    asyncio.run(hold())
    assert sorted(answers) == [("a", None), ("b", None)] and [len(batch) for batch in echo.batches] == [1, 2]


def test_asyncio_debug_mode(make: Make) -> None:
    """It checks which thread calls into a loop."""
    batcher = make()
    asyncio.run(walk(batcher, DEPTHS["mixed"], "task group", n_steps=3), debug=True)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="needs Python 3.12")
def test_eager_tasks(make: Make, echo: Echo) -> None:
    batcher = make()

    async def main() -> None:
        asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined,unused-ignore]
        await walk(batcher, DEPTHS["mixed"], "gather", n_steps=3)

    asyncio.run(main())
    assert [len(batch) for batch in echo.batches] == [10] * 3


# ---- life


async def test_reset_leaves_nobody_hanging_and_spares_what_is_computed(make: Make, echo: Echo) -> None:
    batcher = make()
    echo.gate = threading.Semaphore(0)
    running = batcher.ask("a", None)
    await echo.wait_entered()
    queued = [batcher.ask(key, None) for key in "bbc"]
    batcher.reset()
    for future in queued:
        with pytest.raises(QueriesReset):
            await asyncio.wait_for(future, PATIENCE_S)
    after = batcher.ask("d", None)
    echo.gate.release(10)
    assert await running == ("a", None) and await after == ("d", None)
    assert echo.batches == [["a"], ["d"]]


async def test_reset_while_a_batch_is_about_to_close(make: Make, echo: Echo) -> None:
    batcher = make()
    for n_passes in range(QUIET_PASSES + 3):
        asked = [batcher.ask((n_passes, i), None) for i in range(2)]
        for _ in range(n_passes):
            await asyncio.sleep(0)
        batcher.reset()
        answers = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), PATIENCE_S)
        assert {type(answer) for answer in answers} in ({QueriesReset}, {tuple})
        assert await one(batcher, n_passes) == (n_passes, None)


@pytest.mark.parametrize("moment", ["queued", "running"])
async def test_close_answers_what_runs_and_refuses_what_waits(make: Make, echo: Echo, moment: str) -> None:
    batcher = make()
    echo.gate = threading.Semaphore(0)
    asked = [batcher.ask("a", None)]
    if moment == "running":
        await echo.wait_entered()
        asked.append(batcher.ask("b", None))
    closing = asyncio.create_task(asyncio.to_thread(batcher.close))
    with pytest.raises(ModelClosed):
        await asyncio.wait_for(asked[-1], PATIENCE_S)
    echo.gate.release(10)
    await closing
    if moment == "running":
        assert await asyncio.wait_for(asked[0], PATIENCE_S) == ("a", None)
    assert [key for batch in echo.batches for key in batch] == (["a"] if moment == "running" else [])
    batcher.close()
    with pytest.raises(ModelClosed):
        batcher.ask("c", None)


def test_close_before_anything_was_asked(make: Make) -> None:
    batcher = make()
    batcher.close()
    assert batcher._thread is None


def test_an_impossible_batch_size_is_refused(echo: Echo) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Batcher(echo.evaluate, batch_size=0)


def engine_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "genlm-engine"}


@pytest.mark.thorough
def test_a_forgotten_batcher_is_collected_and_its_thread_ends() -> None:
    before = engine_threads()
    echo = Echo()
    batcher = Batcher(echo.evaluate, batch_size=4)
    assert asyncio.run(one(batcher, "a")) == ("a", None)
    (thread,) = engine_threads() - before
    forgotten = weakref.ref(batcher)
    del batcher
    gc.collect()
    assert forgotten() is None
    thread.join(PATIENCE_S)
    assert not thread.is_alive() and engine_threads() <= before


@pytest.mark.thorough
def test_a_batcher_forgotten_while_its_batch_runs_is_collected_after_it() -> None:
    before = engine_threads()
    echo = Echo()
    echo.gate = threading.Semaphore(0)

    async def leave() -> weakref.ref[Batcher]:
        batcher = Batcher(echo.evaluate, batch_size=4)
        batcher.ask("a", None)
        await echo.wait_entered()
        return weakref.ref(batcher)

    forgotten = asyncio.run(leave())
    (thread,) = engine_threads() - before
    echo.gate.release()
    thread.join(PATIENCE_S)
    gc.collect()
    assert not thread.is_alive() and forgotten() is None


@pytest.mark.thorough
async def test_the_owner_of_the_engine_is_not_kept_alive_by_its_batcher() -> None:
    echo = Echo()
    owner = weakref.ref(echo)
    batcher = Batcher(echo.evaluate, batch_size=4)
    assert await one(batcher, "a") == ("a", None)
    del echo
    gc.collect()
    assert owner() is None
    with pytest.raises(ModelClosed):
        await one(batcher, "b")
    batcher.close()
