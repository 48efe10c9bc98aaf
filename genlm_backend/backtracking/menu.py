"""A menu in the terminal, for a person who chooses tokens."""

from __future__ import annotations

import threading
from typing import Any

from genlm_backend.errors import BackendUnavailable

_LOOK_MS = 100  # between looks at whether the choice is still wanted


def choose_in_terminal(
    options: list[tuple[str, float | None]], text: str, given_up: threading.Event | None = None
) -> int:
    """The index of the option that a person chooses with the arrow keys and Enter; blocks.

    Args:
        options: Text and probability; None for an action.
        text: What has been written so far.
        given_up: Set in another thread, it ends the menu; then -1 is given.

    Raises:
        BackendUnavailable: This Python has no curses.
    """
    try:
        import curses
    except ImportError as error:
        raise BackendUnavailable("curses, which draws the menu,", "pip install windows-curses") from error
    chosen: int = curses.wrapper(_run, curses, options, text, given_up or threading.Event())
    return chosen


def _run(
    screen: Any, curses: Any, options: list[tuple[str, float | None]], text: str, given_up: threading.Event
) -> int:
    curses.curs_set(0)
    screen.timeout(_LOOK_MS)
    row = 0
    while not given_up.is_set():
        _draw(screen, curses, options, text, row)
        key = screen.getch()
        if key in (curses.KEY_UP, ord("k")):
            row = (row - 1) % len(options)
        elif key in (curses.KEY_DOWN, ord("j")):
            row = (row + 1) % len(options)
        elif key in (ord("\n"), ord("\r"), curses.KEY_ENTER):
            return row
    return -1


def _draw(screen: Any, curses: Any, options: list[tuple[str, float | None]], text: str, row: int) -> None:
    height, width = screen.getmaxyx()
    lines = [
        line[i : i + width - 4] for line in text.splitlines() or [""] for i in range(0, max(1, len(line)), width - 4)
    ]
    n_text = max(1, height - len(options) - 3)
    screen.erase()
    for y, line in enumerate(lines[-n_text:]):
        screen.addstr(1 + y, 2, line, curses.A_BOLD)
    for i, (option, p) in enumerate(options):
        y = min(len(lines), n_text) + 2 + i
        if y < height - 1:
            shown = repr(option) if p is None else f"{option!r} ({p:.2%})"
            screen.addstr(y, 2, shown[: width - 4], curses.A_REVERSE if i == row else curses.A_NORMAL)
    screen.refresh()
