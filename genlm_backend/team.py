"""Compiled functions on the threads that torch has for the calling thread already.

torch's threads wait for work by spinning for some milliseconds, so a second pool would find no free core between two of
torch's operations. They belong to OpenMP: whoever calls its `GOMP_parallel` from the same thread gets them.

Importing this file imports numba.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from numba import types

from genlm_backend.compiled import c_function
from genlm_backend.parts import has_forked

_ROWS = 4  # that are worth a thread which waits already
_ROWS_IN_MAIN = 64

Work = Any  # in compiled functions: a pointer to int64, of which the first counts the tasks that were taken


class TeamFunction:
    """A compiled function that any number of threads run at once, each taking tasks from one counter.

    Args:
        function: Of a pointer to int64; its first number is the counter, see `bits.count_up`, the others are arguments.
        options: Of `numba.cfunc`, such as `fastmath`.
    """

    def __init__(self, function: Callable[[Work], None], **options: Any) -> None:
        made = c_function(types.void(types.CPointer(types.int64)), function, **options)
        self._alone = made.ctypes
        self._address = made.address

    def __call__(self, arguments: Sequence[int], n_threads: int) -> None:
        """Return when all tasks are done; releases the interpreter lock.

        Args:
            arguments: What comes after the counter.
            n_threads: At most so many, where torch's can be had.
        """
        work = (ctypes.c_int64 * (1 + len(arguments)))(0, *arguments)
        parallel = None if n_threads == 1 or has_forked() else _parallel()
        if parallel is None:
            self._alone(work)
        else:
            parallel(self._address, work, n_threads, 0)


def threads_for(n_rows: int) -> int:
    """One, or as many as torch has, for so many rows of tens of microseconds each.

    All or none: GNU's OpenMP ends the threads that a smaller team has no use for, and torch would start them again.
    Those that the main thread would get are not those of an engine's thread, and beside them would slow both down.
    """
    is_main = threading.current_thread() is threading.main_thread()
    return torch.get_num_threads() if n_rows >= 2 * (_ROWS_IN_MAIN if is_main else _ROWS) else 1


def has_team() -> bool:
    """Whether torch's threads can be had; else there is one."""
    return not has_forked() and _parallel() is not None


@cache
def _parallel() -> Any:
    """`GOMP_parallel` of the OpenMP that torch is linked with, GNU's or LLVM's; None without it."""
    if not torch.backends.openmp.is_available():
        return None
    try:
        parallel = ctypes.CDLL(torch._C.__file__).GOMP_parallel  # found among the libraries that this one needs
    except (OSError, AttributeError):
        return None
    parallel.restype = None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    return parallel
