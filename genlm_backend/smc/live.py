"""Live progress of a run in the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from genlm_backend.smc.result import Step
from genlm_backend.smc.weights import normalized


@contextmanager
def live_progress(console: Console | None = None, most_rows: int = 20) -> Iterator[Callable[[Step, int], None]]:
    """Shows the particles after each step, heaviest first, and leaves nothing behind; silent outside of a terminal.

    with live_progress() as on_step:
        result = await smc(model, 20, on_step=on_step)

    Args:
        console: Where; None is standard error.
        most_rows: How many particles at most.
    """
    console = Console(stderr=True) if console is None else console
    if not console.is_terminal:
        yield lambda step, number: None
        return
    with Live(console=console, auto_refresh=False, transient=True) as live:
        yield lambda step, number: live.update(picture(step, number, console.width, most_rows), refresh=True)


def picture(step: Step, number: int, width: int, most_rows: int) -> Group:
    """A step in a few lines."""
    weights = normalized(step.log_weights)
    order = sorted(range(len(weights)), key=lambda i: -weights[i])[:most_rows]
    counts = ", ".join(
        f"{step.statuses.count(letter)} {name}" for letter, name in (("r", "running"), ("d", "done"), ("x", "dead"))
    )
    resampled = "" if step.ancestors is None else f", resampled: {len(set(step.ancestors))} survive"
    lines = [Text(f"step {number}: effective sample size {step.ess:.1f}, {counts}{resampled}", style="bold")]
    for i in order:
        text = step.texts[i].replace("\n", "⏎")
        shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
        room = max(10, width - 9)
        lines.append(Text(f"{weights[i]:7.3f}  ", style="cyan").append(shown[-room:], style="default"))
    return Group(*lines)
