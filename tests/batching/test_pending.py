"""The queue as plain data, against a list that does the same in the plainest way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from genlm_backend.batching.pending import Entry, Pending, Waiter


def waiter(name: int) -> Waiter:
    return Waiter(question=name, lane=None, ticket=name)


def test_equal_keys_join_and_keep_the_place_of_the_first() -> None:
    pending = Pending()
    for key, name in [("a", 1), ("b", 2), ("a", 3)]:
        pending.add(key, waiter(name), now_s=float(name))
    assert len(pending) == 2 and pending.n_added == 3 and pending.oldest_s() == 1.0
    taken, removed = pending.take(2, lambda _: True)
    assert [(entry.key, [w.ticket for w in entry.waiters]) for entry in taken] == [("a", [1, 3]), ("b", [2])]
    assert len(removed) == 3 and len(pending) == 0 and pending.oldest_s() is None


def test_an_entry_without_a_live_waiter_takes_no_room_in_a_batch() -> None:
    pending = Pending()
    for name in range(6):
        pending.add(name, waiter(name), now_s=0.0)
    taken, removed = pending.take(2, lambda w: w.ticket not in (0, 2, 3))
    assert [entry.key for entry in taken] == [1, 4]
    assert [w.ticket for w in removed] == [0, 1, 2, 3, 4]


def test_the_dead_are_dropped_up_to_the_first_that_still_waits() -> None:
    pending = Pending()
    for name in range(4):
        pending.add(name, waiter(name), now_s=float(name))
    pending.add(1, waiter(9), now_s=9.0)
    assert [w.ticket for w in pending.drop_dead(lambda w: w.ticket in (2, 9))] == [0]
    assert pending.oldest_s() == 1.0 and len(pending) == 3


class AgainstAList(RuleBasedStateMachine):
    """Every operation on the queue and on a list of (key, time, names); names in `dead` do not live."""

    make: Callable[[], Pending] = Pending

    def __init__(self) -> None:
        super().__init__()
        self.pending = type(self).make()
        self.model: list[tuple[int, float, list[int]]] = []
        self.dead: set[int] = set()
        self.n_names = 0

    @rule(key=st.integers(0, 5))
    def add(self, key: int) -> None:
        self.n_names += 1
        self.pending.add(key, waiter(self.n_names), now_s=float(self.n_names))
        for queued, _, names in self.model:
            if queued == key:
                names.append(self.n_names)
                return
        self.model.append((key, float(self.n_names), [self.n_names]))

    @precondition(lambda self: self.n_names)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.dead.add(data.draw(st.integers(1, self.n_names)))

    @rule(limit=st.integers(1, 4))
    def take(self, limit: int) -> None:
        taken, removed = self.pending.take(limit, self.is_live)
        expected: list[tuple[int, list[int]]] = []
        gone: list[int] = []
        while self.model and len(expected) < limit:
            key, _, names = self.model.pop(0)
            gone += names
            live = [name for name in names if name not in self.dead]
            if live:
                expected.append((key, live))
        assert [(entry.key, [w.ticket for w in entry.waiters]) for entry in taken] == expected
        assert [w.ticket for w in removed] == gone

    @rule()
    def drop_dead(self) -> None:
        gone: list[int] = []
        while self.model and set(self.model[0][2]) <= self.dead:
            gone += self.model.pop(0)[2]
        assert [w.ticket for w in self.pending.drop_dead(self.is_live)] == gone

    def is_live(self, w: Waiter) -> bool:
        return w.ticket not in self.dead

    @invariant()
    def same(self) -> None:
        assert len(self.pending) == len(self.model)
        assert self.pending.n_added == self.n_names
        assert self.pending.oldest_s() == (self.model[0][1] if self.model else None)


TestAgainstAList = AgainstAList.TestCase
TestAgainstAList.settings = settings(max_examples=30, stateful_step_count=25, deadline=None, derandomize=True)
UNSHRUNK = settings(
    max_examples=300, deadline=None, derandomize=True, report_multiple_bugs=False, phases=[Phase.generate]
)


class NewestFirst(Pending):
    def take(self, limit: int, is_live: Callable[[Waiter], bool]) -> tuple[list[Entry], list[Waiter]]:
        self._entries = dict(reversed(self._entries.items()))
        return super().take(limit, is_live)


class KeepsTheDead(Pending):
    def take(self, limit: int, is_live: Callable[[Waiter], bool]) -> tuple[list[Entry], list[Waiter]]:
        return super().take(limit, lambda _: True)


class ForgetsJoined(Pending):
    def add(self, key: Any, waiter: Waiter, now_s: float) -> None:
        super().add(key, waiter, now_s)
        self._entries[key].waiters[:] = [waiter]


@pytest.mark.parametrize("mutant", [NewestFirst, KeepsTheDead, ForgetsJoined])
@pytest.mark.thorough
def test_the_machine_finds_a_wrong_queue(mutant: type[Pending]) -> None:
    class Machine(AgainstAList):
        make = mutant

    with pytest.raises(AssertionError):
        run_state_machine_as_test(Machine, settings=UNSHRUNK)
