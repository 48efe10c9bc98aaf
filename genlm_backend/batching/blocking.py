"""Run a coroutine from synchronous code, wherever that code runs."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def run_apart(work: Callable[[], T]) -> T:
    """The result of a function, called in a thread of its own that ends with it; blocks.

    Whatever computes with torch in a thread leaves a team of OpenMP workers to it. Where two threads have one each, the
    workers are more than the cores, do not spin between operations, and each operation of the engine thread starts
    by waking its own: 103 instead of 38 microseconds for a small linear layer. A thread that ends takes its team along.

    Raises:
        BaseException: Whatever the function raises.
    """
    outcome: list[T] = []
    failure: list[BaseException] = []

    def call() -> None:
        try:
            outcome.append(work())
        except BaseException as error:  # handed on to the caller below
            failure.append(error)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(call,), name="genlm-apart", daemon=True)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]


def run_sync(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine, for a caller that cannot await.

    Without a running event loop this is `asyncio.run`. Inside one (a notebook, or synchronous code called by a
    coroutine) the coroutine runs on a loop of its own in a thread of its own, and the calling thread, with its loop,
    blocks until it is done; Ctrl-C cancels it.

    Raises:
        BaseException: Whatever the coroutine raises.
    """
    if not _has_running_loop():
        return asyncio.run(coroutine)
    outcome: list[T] = []
    failure: list[BaseException] = []
    started: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = []

    async def main() -> T:
        task = asyncio.current_task()
        assert task is not None
        started.append((asyncio.get_running_loop(), task))
        return await coroutine

    def work() -> None:
        try:
            outcome.append(asyncio.run(main()))
        except BaseException as error:  # handed on to the caller below
            failure.append(error)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(work,), name="genlm-run-sync", daemon=True)
    thread.start()
    try:
        thread.join()
    except KeyboardInterrupt:
        if started:
            loop, task = started[0]
            loop.call_soon_threadsafe(task.cancel)
        raise
    if failure:
        raise failure[0]
    return outcome[0]


def _has_running_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
