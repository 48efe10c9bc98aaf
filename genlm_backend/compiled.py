"""Functions compiled by numba without the interpreter lock, kept on disk where some folder can be written.

A file of that folder may be cut short by a loss of power or belong to another user, and a disk may be full. numba
raises that from the first call of a function, in every process; here it costs the time to compile, and is logged once.

Importing this file imports numba (about half a second): only files that a first use imports may import it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numba

_logger = logging.getLogger(__name__)
_told: set[str] = set()  # folders that were logged


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: compile at the first call, for any thread and after a fork.

    Args:
        options: Of `numba.njit`, such as `fastmath`.
    """

    def compile_function(function: Callable[..., Any]) -> Callable[..., Any]:
        machine_code: Any
        try:
            machine_code = numba.njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # numba found neither the package's folder nor the user's cache folder writable
            machine_code = numba.njit(nogil=True, **options)(function)
        else:
            if not numba.config.DISABLE_JIT:  # NUMBA_DISABLE_JIT=1: the function came back as it is
                _make_safe(machine_code._cache)
        return machine_code  # type: ignore[no-any-return]

    return compile_function


def c_function(signature: Any, function: Callable[..., None], **options: Any) -> Any:
    """Compile for callers outside Python: an object with `address`, and `ctypes`, which Python can call.

    Args:
        signature: The types of numba that it is compiled for, now.
        function: Python's.
        options: Of `numba.cfunc`.
    """
    from numba.core.ccallback import CFunc

    made = CFunc(function, (signature.args, signature.return_type), locals={}, options=options)
    try:
        made.enable_caching()
    except RuntimeError as error:  # as above
        _logger.debug("%s is not kept: %s", function.__name__, error)
    else:
        _make_safe(made._cache)
    made.compile()
    return made


def _make_safe(cache: Any) -> None:
    cache.load_overload = _or_give_up(cache, cache.load_overload)
    cache.save_overload = _or_give_up(cache, cache.save_overload)


def _or_give_up(cache: Any, step: Callable[..., Any]) -> Callable[..., Any]:
    """A step of a numba cache. Where it fails, this process goes on without it, and the next one finds it empty."""

    def call(*arguments: Any) -> Any:
        try:
            return step(*arguments)
        except Exception as error:  # damaged bytes can raise anything
            cache.disable()
            if cache.cache_path not in _told:
                _told.add(cache.cache_path)
                _logger.warning("cannot keep compiled functions in %s (%r); compiling anew", cache.cache_path, error)
            if not isinstance(error, PermissionError):  # another user's, who can read it
                _forget(cache)
        return None

    return call


def _forget(cache: Any) -> None:
    try:
        cache.flush()
    except OSError as error:
        _logger.debug("%s cannot be emptied (%r)", cache.cache_path, error)
