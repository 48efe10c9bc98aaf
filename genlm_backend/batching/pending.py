"""The queue of requests that wait for an engine, as plain data: no asyncio, no threads, no engine."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field


@dataclass(eq=False, slots=True)
class Waiter:
    """One caller: what it wants to know (`question`), where it lives (`lane`), and where its answer goes (`ticket`)."""

    question: object
    lane: object
    ticket: object


@dataclass(slots=True)
class Entry:
    """All waiters for one key. Equal keys are computed once; each waiter gets an answer of its own."""

    key: Hashable
    arrived_s: float
    waiters: list[Waiter] = field(default_factory=list)


class Pending:
    """Requests in order of arrival, joined by key.

    A request whose key is already queued joins that entry and takes its place in the order.
    """

    def __init__(self) -> None:
        self._entries: dict[Hashable, Entry] = {}
        self.n_added = 0

    def __len__(self) -> int:
        """Number of distinct keys."""
        return len(self._entries)

    def add(self, key: Hashable, waiter: Waiter, now_s: float) -> None:
        """Queue one waiter for a key."""
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = Entry(key, now_s)
        entry.waiters.append(waiter)
        self.n_added += 1

    def oldest_s(self) -> float | None:
        """When the oldest entry arrived; None when the queue is empty."""
        return next(iter(self._entries.values())).arrived_s if self._entries else None

    def drop_dead(self, is_live: Callable[[Waiter], bool]) -> list[Waiter]:
        """Remove entries from the oldest on, up to the first with a live waiter; what was removed."""
        removed: list[Waiter] = []
        while self._entries:
            key, entry = next(iter(self._entries.items()))
            if any(map(is_live, entry.waiters)):
                break
            removed += entry.waiters
            del self._entries[key]
        return removed

    def take(self, limit: int, is_live: Callable[[Waiter], bool]) -> tuple[list[Entry], list[Waiter]]:
        """Remove up to `limit` entries, oldest first, without the waiters that are no longer live.

        Entries left with no waiter are removed and do not count.

        Returns:
            The entries, and every waiter that was removed from the queue, live or not.
        """
        taken: list[Entry] = []
        removed: list[Waiter] = []
        while self._entries and len(taken) < limit:
            entry = self._entries.pop(next(iter(self._entries)))
            removed += entry.waiters
            entry.waiters = [waiter for waiter in entry.waiters if is_live(waiter)]
            if entry.waiters:
                taken.append(entry)
        return taken, removed
