"""Compiled functions on the threads that torch has for the calling thread already.

torch's threads wait for work by spinning for some milliseconds, so a second pool would find no free core between two of
torch's operations. They belong to OpenMP: whoever calls its `GOMP_parallel` from the same thread gets them.

Importing this file imports numba.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from numba import types

from genlm_backend.compiled import c_function

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
        parallel = None if n_threads == 1 else _parallel()
        if parallel is None:
            self._alone(work)
        else:
            parallel(self._address, work, n_threads, 0)


def has_team() -> bool:
    """Whether torch's threads can be had; else there is one."""
    return _parallel() is not None


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
