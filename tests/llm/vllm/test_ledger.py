"""The ledger of live requests against a list of token tuples."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from genlm_backend.llm.vllm.ledger import Ledger, Session

TOKENS = st.integers(0, 2)
IDS = st.lists(TOKENS, min_size=1, max_size=8).map(tuple)
ADAPTERS = st.sampled_from([None, "a"])


def n_common(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


class LedgerMachine(RuleBasedStateMachine):
    """Adds, extends, removes and looks up; the oracle is a dictionary of names to (adapter, tokens) by use."""

    @initialize()
    def start(self) -> None:
        self.ledger = Ledger()
        self.held: dict[str, tuple[str | None, tuple[int, ...]]] = {}
        self.n = 0

    def drop(self, replaced: Session | None, adapter: str | None, ids: tuple[int, ...], but: str) -> None:
        same = [name for name, held in self.held.items() if held == (adapter, ids) and name != but]
        assert ([] if replaced is None else [replaced.name]) == same
        for name in same:
            del self.held[name]

    @rule(ids=IDS, adapter=ADAPTERS)
    def add(self, ids: tuple[int, ...], adapter: str | None) -> None:
        name = f"s{self.n}"
        self.n += 1
        self.drop(self.ledger.add(Session(name, adapter), ids), adapter, ids, name)
        self.held[name] = (adapter, ids)

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 99), more=IDS)
    def extend(self, which: int, more: tuple[int, ...]) -> None:
        name = list(self.held)[which % len(self.held)]
        adapter, ids = self.held.pop(name)
        session = self.ledger.get(name)
        assert session is not None
        self.drop(self.ledger.extend(session, ids + more), adapter, ids + more, name)
        self.held[name] = (adapter, ids + more)

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 99))
    def remove(self, which: int) -> None:
        name = list(self.held)[which % len(self.held)]
        session = self.ledger.get(name)
        assert session is not None
        n_before = self.ledger.n_tokens
        n_freed = self.ledger.remove(session)
        del self.held[name]
        assert n_before - n_freed == self.ledger.n_tokens == len(self.prefixes())

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 99))
    def touch(self, which: int) -> None:
        name = list(self.held)[which % len(self.held)]
        session = self.ledger.get(name)
        assert session is not None
        self.ledger.touch(session)
        self.held[name] = self.held.pop(name)

    @rule(ids=IDS, adapter=ADAPTERS, cut=st.integers(0, 8))
    def look_up(self, ids: tuple[int, ...], adapter: str | None, cut: int) -> None:
        limit = min(cut, len(ids))
        match = self.ledger.match(adapter, ids, limit)
        others = [held for of, held in self.held.values() if of == adapter]
        assert match.length == max((n_common(ids[:limit], held) for held in others), default=0)
        if match.session is None:
            assert match.length == 0
        else:
            of, held = self.held[match.session.name]
            assert of == adapter and held[: match.length] == ids[: match.length]
            assert match.session.length == len(held)
            at_end = [held for held in others if held == ids[: match.length]]
            assert bool(at_end) == (match.session.length == match.length)

    def prefixes(self) -> set[tuple[str | None, tuple[int, ...]]]:
        return {(of, held[:n]) for of, held in self.held.values() for n in range(1, len(held) + 1)}

    @invariant()
    def agrees(self) -> None:
        self.ledger.check_integrity()
        assert self.ledger.names() == list(self.held)
        assert self.ledger.n_tokens == len(self.prefixes())


TestLedger = pytest.mark.thorough(LedgerMachine.TestCase)
TestLedger.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@given(st.lists(IDS, min_size=2, max_size=6, unique=True))
@settings(max_examples=50, deadline=None)
def test_places_are_equal_exactly_where_the_matched_tokens_are(held: list[tuple[int, ...]]) -> None:
    ledger = Ledger()
    for i, ids in enumerate(held):
        ledger.add(Session(f"s{i}", None), ids)
    asked = [(*ids[:n], 9) for ids in held for n in range(len(ids) + 1)]
    places = {ids[:-1]: ledger.match(None, ids, len(ids) - 1).place for ids in asked}
    assert len(set(places.values())) == len(places)


def test_the_idlest_is_the_one_used_longest_ago() -> None:
    ledger = Ledger()
    sessions = [Session(f"s{i}", None) for i in range(3)]
    for i, session in enumerate(sessions):
        ledger.add(session, (i,))
    ledger.touch(sessions[0])
    assert ledger.idlest(besides=()) is sessions[1]
    assert ledger.idlest(besides={"s1"}) is sessions[2]
    assert ledger.idlest(besides={"s0", "s1", "s2"}) is None
    ledger.clear()
    assert len(ledger) == 0 and ledger.idlest(besides=()) is None


def test_a_session_in_no_ledger_has_no_length() -> None:
    with pytest.raises(AssertionError, match="in no ledger"):
        _ = Session("s", None).length
