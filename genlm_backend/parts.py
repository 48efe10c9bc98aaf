"""Work on many rows, done in parts by several threads at once."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import torch

T = TypeVar("T")

_forked: int | None = None  # the thread that a fork began with


def _note_fork() -> None:
    global _forked
    _forked = threading.get_ident()


os.register_at_fork(after_in_child=_note_fork)


def has_forked() -> bool:
    """Whether this thread came from another process: OpenMP's threads did not, and GNU's waits for them for ever."""
    return threading.get_ident() == _forked


def in_parts(n: int, least: int, work: Callable[[int, int], T]) -> list[T]:
    """The results of `work(start, stop)` for parts of `range(n)`, in order.

    Threads are started for each call and end with it (0.1 ms each): there is no pool that a fork could break.

    Args:
        n: How many rows there are; `work(0, 0)` for none.
        least: Rows for which another thread is worth starting.
        work: Must let other threads run meanwhile, as compiled functions do.

    Raises:
        BaseException: What `work` raised, the first part's first.
    """
    n_parts = max(1, min(torch.get_num_threads(), n // least))
    if n_parts == 1:
        return [work(0, n)]
    bounds = [n * i // n_parts for i in range(n_parts + 1)]
    results: list[T | BaseException] = [RuntimeError("this part was not done")] * n_parts

    def do(part: int) -> None:
        try:
            results[part] = work(bounds[part], bounds[part + 1])
        except BaseException as error:
            results[part] = error

    threads = [threading.Thread(target=do, args=(part,), daemon=True) for part in range(1, n_parts)]
    n_started = 0
    with suppress(RuntimeError):  # no more threads are to be had: the rest is done here
        for thread in threads:
            thread.start()
            n_started += 1
    for part in (0, *range(n_started + 1, n_parts)):
        do(part)
    for thread in threads[:n_started]:
        thread.join()
    return [_unless_raised(result) for result in results]


def _unless_raised(result: T | BaseException) -> T:
    if isinstance(result, BaseException):
        raise result
    return result
