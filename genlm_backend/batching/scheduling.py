"""Keep an engine thread and busy Python threads from starving each other."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator

SWITCH_INTERVAL_S = (
    5e-5  # measured in docs/decisions.md: the default of 5 ms is paid at each of a forward's ~1,000 calls
)

_lock = threading.Lock()
_depth = 0
_before_s = 0.0


@contextlib.contextmanager
def responsive_threads() -> Iterator[None]:
    """While inside, a thread that waits for the interpreter gets it after 50 microseconds instead of 5 ms.

    A forward pass enters and leaves the interpreter about a thousand times; beside one busy Python thread each entry
    would wait the whole switch interval. Nested and concurrent uses share one change; the last one out restores it.
    """
    global _depth, _before_s
    with _lock:
        if _depth == 0:
            _before_s = sys.getswitchinterval()
            sys.setswitchinterval(min(SWITCH_INTERVAL_S, _before_s))
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                sys.setswitchinterval(_before_s)
