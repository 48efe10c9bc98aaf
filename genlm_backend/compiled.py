"""Functions compiled by numba without the interpreter lock, kept on disk where some folder can be written.

Importing this file imports numba (about half a second): only files that a first use imports may import it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: compile at the first call, for any thread and after a fork.

    Args:
        options: Of `numba.njit`, such as `fastmath`.
    """

    def compile_function(function: Callable[..., Any]) -> Callable[..., Any]:
        machine_code: Callable[..., Any]
        try:
            machine_code = numba.njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # numba found neither the package's folder nor the user's cache folder writable
            machine_code = numba.njit(nogil=True, **options)(function)
        return machine_code

    return compile_function
