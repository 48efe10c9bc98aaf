"""The only asyncio queue and the only engine thread: gathers what coroutines ask, computes it together, answers.

Life of a request:

1. `ask` queues a waiter under its key. Equal keys join.
2. While the engine is idle, the loop that asked counts its own passes. After `quiet_passes` passes in a row that
   brought no new request, the batch closes: one pass is not enough, because particles that are several tasks deep
   arrive over several passes. A full batch, or one whose oldest request is `max_age_s` old, closes at once.
3. The engine thread takes the batch (dropping waiters that were cancelled), computes it, and answers every waiter of a
   loop by one call into that loop. Meanwhile new requests only queue; they form the next batch.

A lane is one event loop that has waiters. Loops in any number of threads, one after another or together, may ask.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

from genlm_backend.batching.pending import Entry, Pending, Waiter
from genlm_backend.batching.scheduling import responsive_threads
from genlm_backend.errors import EngineNotStarted, ForkedEngine, ModelClosed, QueriesReset

QUIET_PASSES = 16  # a particle 4 tasks deep asks again 12 passes after one that is not nested; a pass costs 3 us
LOST_TICK_S = (
    0.1  # a KeyboardInterrupt inside a callback can lose the tick of a loop; then the next request restarts it
)


class Job(NamedTuple):
    """One distinct key of a batch, with the question of each of its waiters."""

    key: Hashable
    questions: tuple[Any, ...]


class _Lane:
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.n_waiting = 0
        self.tick_s: float | None = None  # when it ticked last; None while it does not
        self.n_starts = 0  # only the chain of ticks started last counts passes
        self.n_seen = 0
        self.n_quiet = 0


class Batcher:
    """Turns concurrent questions into batches for one engine.

    Args:
        evaluate: Called in the engine thread with a list of jobs; returns, for each job, one outcome for each of its
            questions: the answer, or an exception for that waiter alone. If it raises, the batch is tried again in
            halves until the job that causes it is alone, and that job's waiters get the exception. Only a weak
            reference is kept when it is a method, so that its object can be collected without `close`.
        batch_size: Most distinct keys in one batch.
        quiet_passes: Passes of the event loop without a new request that close a batch.
        max_age_s: A batch closes when its oldest request has waited this long for the loop to go quiet.
        explain: Turns what was raised for one job into the exception its waiters get.
    """

    def __init__(
        self,
        evaluate: Callable[[Sequence[Job]], Sequence[Sequence[Any]]],
        *,
        batch_size: int,
        quiet_passes: int = QUIET_PASSES,
        max_age_s: float = 0.02,
        explain: Callable[[Job, BaseException], BaseException] = lambda job, error: error,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected at least 1")
        if hasattr(evaluate, "__self__"):
            self._evaluate = weakref.WeakMethod(evaluate)
        else:
            self._evaluate = lambda: evaluate  # type: ignore[assignment]
        self._explain = explain
        self.batch_size = batch_size
        self.quiet_passes = quiet_passes
        self.max_age_s = max_age_s
        self.n_batches = 0
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._pending = Pending()
        self._lanes: dict[asyncio.AbstractEventLoop, _Lane] = {}
        self._busy = False
        self._closed = False
        self._thread: threading.Thread | None = None
        self._wake: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._stop = weakref.finalize(self, self._wake.put, False)

    # ---- the callers' side, in their event loops

    def ask(self, key: Hashable, question: Any) -> asyncio.Future[Any]:
        """A future for the answer to one question about one key; never blocks. Call it in a running event loop.

        Cancelling the future drops the request if it was not taken yet; nobody else's answer changes. Where no engine
        thread can be started, the future gets `EngineNotStarted`.

        Raises:
            ModelClosed: After `close`.
            ForkedEngine: In a process forked from the one that made this batcher.
        """
        self.check_process()
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        now = time.monotonic()
        with self._lock:
            if self._closed:
                raise ModelClosed()
            lane = self._lanes.get(loop)
            if lane is None:
                lane = self._lanes[loop] = _Lane(loop)
            self._pending.add(key, Waiter(question, lane, future), now)
            lane.n_waiting += 1
            if not self._busy:
                self._start_ticking(lane, now)
        return future

    def check_process(self) -> None:
        """Raise ForkedEngine in a process forked from the one that made this batcher: there, no engine thread runs."""
        if os.getpid() != self._pid:
            raise ForkedEngine(self._pid, os.getpid())

    def reset(self) -> None:
        """Drop every request that was not taken yet; its waiters get `QueriesReset`."""
        self.check_process()
        with self._lock:
            _, removed = self._take(len(self._pending))
        _answer((waiter, QueriesReset()) for waiter in removed)

    def close(self, timeout_s: float | None = 10.0) -> None:
        """Answer what is being computed, refuse what is queued with `ModelClosed`, and end the engine thread.

        Blocks until the thread has ended, at most `timeout_s`; a second call does nothing, nor does one in a fork.
        """
        if os.getpid() != self._pid:
            return
        with self._lock:
            self._closed = True
            thread = self._thread
            _, removed = self._take(len(self._pending))
        _answer((waiter, ModelClosed()) for waiter in removed)
        self._stop()
        if thread is not None and thread.is_alive() and thread is not threading.current_thread():
            thread.join(timeout_s)

    def _start_ticking(self, lane: _Lane, now: float) -> None:
        """Let a lane tick, unless it does. A second chain beside the first would count each pass twice."""
        if lane.tick_s is not None and now - lane.tick_s < LOST_TICK_S:
            return
        lane.tick_s, lane.n_quiet, lane.n_seen = now, 0, self._pending.n_added
        lane.n_starts += 1
        lane.loop.call_soon(self._tick, lane, lane.n_starts)

    def _tick(self, lane: _Lane, start: int) -> None:
        now = time.monotonic()
        with self._lock:
            self._forget(self._pending.drop_dead(_is_live))  # the age of the oldest is that of one who still waits
            oldest_s = self._pending.oldest_s()
            if self._busy or oldest_s is None:
                lane.tick_s = None
                return
            is_last_started = start == lane.n_starts
            if is_last_started:
                is_quiet = self._pending.n_added == lane.n_seen
                lane.n_quiet = lane.n_quiet + 1 if is_quiet else 0
                lane.n_seen = self._pending.n_added
            is_full = len(self._pending) >= self.batch_size
            if lane.n_quiet >= self.quiet_passes or is_full or now - oldest_s >= self.max_age_s:
                lane.tick_s = None
                self._wake_engine()
                return
            if not is_last_started:
                return
            lane.tick_s = now
        lane.loop.call_soon(self._tick, lane, start)

    def _resume(self, lane: _Lane) -> None:
        """Called in a lane's loop when the engine became idle."""
        with self._lock:
            if not self._busy and lane.n_waiting and not self._closed:
                self._start_ticking(lane, time.monotonic())

    # ---- the engine's side, in its thread

    def _wake_engine(self) -> None:
        try:
            self.check_process()
            self._start_thread()
        except Exception as error:  # no thread, or no memory for one
            _, removed = self._take(len(self._pending))
            data = error.data if isinstance(error, ForkedEngine) else (str(error),)
            kind = ForkedEngine if isinstance(error, ForkedEngine) else EngineNotStarted
            _answer((waiter, kind(*data)) for waiter in removed)  # an error each: raising one changes it
            return
        self._wake.put(True)
        self._busy = True  # last: interrupted before it, the engine serves and does not look busy for ever

    def _start_thread(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            target = _serve
            self._thread = threading.Thread(
                target=target, args=(weakref.ref(self), self._wake), name="genlm-engine", daemon=True
            )
            _LIVE.add(self)
            self._thread.start()

    def _serve_batch(self) -> None:
        entries: list[Entry] = []
        answers: list[tuple[Waiter, Any]] = []
        try:
            with self._lock:
                entries, _ = self._take(self.batch_size)
            answers = self._answers(entries)
        except BaseException as error:  # outside of `evaluate`: no memory to collect answers, for one
            answers = [
                (waiter, self._explained(Job(entry.key, ()), error)) for entry in entries for waiter in entry.waiters
            ]
        finally:
            with self._lock:
                self._busy = False
                waiting = [lane for lane in self._lanes.values() if lane.n_waiting]
            _answer(answers, then=self._resume, also=waiting)

    def _answers(self, entries: list[Entry]) -> list[tuple[Waiter, Any]]:
        if not entries:
            return []
        self.n_batches += 1
        jobs = [Job(entry.key, tuple(waiter.question for waiter in entry.waiters)) for entry in entries]
        with responsive_threads():
            outcomes = self._isolate(jobs)
        answers: list[tuple[Waiter, Any]] = []
        for entry, of_entry in zip(entries, outcomes, strict=True):
            answers += zip(entry.waiters, of_entry, strict=True)
        return answers

    def _isolate(self, jobs: list[Job]) -> list[Sequence[Any]]:
        evaluate = self._evaluate()
        if evaluate is None:
            return [[ModelClosed() for _ in job.questions] for job in jobs]
        try:
            outcomes = list(evaluate(jobs))
            if [len(of_job) for of_job in outcomes] != [len(job.questions) for job in jobs]:
                raise RuntimeError("the number of outcomes is not the number of questions")
            return outcomes
        except BaseException as error:  # handed on to the waiters of the job that caused it
            if len(jobs) == 1:
                return [[self._explained(jobs[0], error) for _ in jobs[0].questions]]
            del evaluate
        half = len(jobs) // 2
        return self._isolate(jobs[:half]) + self._isolate(jobs[half:])

    def _explained(self, job: Job, error: BaseException) -> BaseException:
        try:
            explained = self._explain(job, error)
        except BaseException:  # it may format an error that cannot be formatted
            explained = error
        if isinstance(explained, StopIteration):  # no future takes it
            explained = RuntimeError("evaluate raised StopIteration")
            explained.__cause__ = error
        return explained

    def _take(self, limit: int) -> tuple[list[Entry], list[Waiter]]:
        taken, removed = self._pending.take(limit, _is_live)
        self._forget(removed)
        return taken, removed

    def _forget(self, removed: Iterable[Waiter]) -> None:
        for waiter in removed:
            lane = waiter.lane
            assert isinstance(lane, _Lane)
            lane.n_waiting -= 1
            if not lane.n_waiting:
                self._lanes.pop(lane.loop, None)


def _is_live(waiter: Waiter) -> bool:
    assert isinstance(waiter.lane, _Lane) and isinstance(waiter.ticket, asyncio.Future)
    return not waiter.ticket.cancelled() and not waiter.lane.loop.is_closed()


def _answer(
    answers: Iterable[tuple[Waiter, Any]],
    then: Callable[[_Lane], None] | None = None,
    also: Iterable[_Lane] = (),
) -> None:
    """Hand answers to their loops, one call into each; a loop that was closed meanwhile has nobody left to answer."""
    by_lane: dict[_Lane, list[tuple[Any, Any]]] = {lane: [] for lane in also}
    for waiter, outcome in answers:
        assert isinstance(waiter.lane, _Lane)
        by_lane.setdefault(waiter.lane, []).append((waiter.ticket, outcome))
    for lane, outcomes in by_lane.items():
        outcomes.reverse()  # delivered from the end
        with contextlib.suppress(RuntimeError):  # RuntimeError: Event loop is closed
            lane.loop.call_soon_threadsafe(_deliver, lane, outcomes, then)


def _deliver(
    lane: _Lane, outcomes: list[tuple[asyncio.Future[Any], Any]], then: Callable[[_Lane], None] | None
) -> None:
    try:
        while outcomes:
            future, outcome = outcomes[-1]
            if not future.done():
                if isinstance(outcome, BaseException):
                    future.set_exception(outcome)
                else:
                    future.set_result(outcome)
            outcomes.pop()
    finally:
        if outcomes:  # a KeyboardInterrupt came in between: nobody is left waiting
            lane.loop.call_soon(_deliver, lane, outcomes, then)
        elif then is not None:
            then(lane)


_LIVE: weakref.WeakSet[Batcher] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for batcher in list(_LIVE):
        batcher.close(timeout_s=2.0)


def _serve(batcher: weakref.ref[Batcher], wake: queue.SimpleQueue[bool]) -> None:
    """The engine thread: holds its batcher only while there is a batch, so that a forgotten one can be collected."""
    while wake.get():
        alive = batcher()
        if alive is None:
            return
        with contextlib.suppress(Exception):  # no memory even to answer: later batches are served all the same
            alive._serve_batch()
        del alive
