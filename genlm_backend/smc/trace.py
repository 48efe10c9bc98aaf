"""What a particle was told: every answer of its context, in order; enough to run its program again to one point."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple


class Entry(NamedTuple):
    """One answer of the context.

    Attributes:
        kind: "sample", "query", "row", "key", "recorded", "show" or "checkpoint".
        answer: What the program got; None for a row, which is asked for again only if it is looked at.
        log_weight: What this draw added to the particle's log-weight, nats; 0 for other kinds.
        piece: The text of a draw, where it has one.
    """

    kind: str
    answer: Any = None
    log_weight: float = 0.0
    piece: bytes | None = None


class Path(NamedTuple):
    """A particle from its beginning to where it is: plain data.

    Attributes:
        entries: All answers of its context; those of a whole step end with a checkpoint.
        log_increments: What each step added to its log-weight, nats; as many as it made steps.
        status: "running", "done" or "dead".
        value: What its program returned; None unless it is done.
    """

    entries: tuple[Entry, ...] = ()
    log_increments: tuple[float, ...] = ()
    status: str = "running"
    value: Any = None

    @property
    def choices(self) -> list[Any]:
        """What was drawn, in order."""
        return [entry.answer for entry in self.entries if entry.kind == "sample"]

    @property
    def text(self) -> str:
        """What was written, for people: the pieces of its draws, or what `ctx.show` showed last and all after it."""
        return text_of(b"", self.entries).decode("utf-8", "replace")

    def first(self, n_steps: int) -> Path:
        """The path as it was after its first `n_steps` steps."""
        if n_steps >= len(self.log_increments):
            return self
        return Path(self.entries[: end_of_step(self.entries, n_steps)], self.log_increments[:n_steps])


def text_of(before: bytes, entries: Iterable[Entry]) -> bytes:
    """The text after these entries, where it was `before`."""
    text = before
    for entry in entries:
        if entry.kind == "show":
            text = entry.answer.encode("utf-8", "replace")
        elif entry.piece is not None:
            text += entry.piece
    return text


def end_of_step(entries: Sequence[Entry], n_steps: int) -> int:
    """How many entries the first `n_steps` steps have, their last checkpoint included."""
    if n_steps == 0:
        return 0
    n_seen = 0
    for i, entry in enumerate(entries):
        n_seen += entry.kind == "checkpoint"
        if n_seen == n_steps:
            return i + 1
    return len(entries)
