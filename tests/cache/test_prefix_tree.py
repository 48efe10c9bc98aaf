"""The prefix tree against a dictionary of prefixes; its laws hold after every step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from genlm_backend.cache import prefix_tree
from genlm_backend.cache.prefix_tree import Match, PrefixTree, Slots, n_common


def slots_of(match: Match) -> list[int]:
    return [int(slot) for part in match.parts for slot in part]


def put(tree: PrefixTree, ids: Sequence[int], *slots: int, namespace: str | None = None, tick: int = 1) -> list[int]:
    """Insert a sequence; `slots` are those of its last tokens."""
    return tree.insert(namespace, ids, len(ids) - len(slots), np.array(slots, np.int64), tick)


def test_the_longest_known_prefix_is_found_with_its_slots_in_order() -> None:
    tree = PrefixTree()
    put(tree, [5, 6, 7], 10, 11, 12)
    put(tree, [5, 6, 8, 9], 13, 14)
    assert slots_of(tree.match(None, [5, 6, 8, 9, 1], 5, 2)) == [10, 11, 13, 14]
    assert slots_of(tree.match(None, [5, 6, 7, 9], 4, 2)) == [10, 11, 12]
    assert tree.match(None, [6], 1, 2) == (0, [])
    assert tree.n_tokens == 5
    tree.check_integrity()


def test_no_more_than_the_limit_is_matched() -> None:
    tree = PrefixTree()
    put(tree, [1, 2, 3], 10, 11, 12)
    for limit in range(4):
        assert slots_of(tree.match(None, [1, 2, 3], limit, 2)) == [10, 11, 12][:limit]


def test_two_children_of_one_node_both_stay() -> None:
    """A tree that overwrites the first child loses what was computed for it."""
    tree = PrefixTree()
    put(tree, [1], 0)
    put(tree, [1, 2], 1)
    put(tree, [1, 3], 2)
    assert slots_of(tree.match(None, [1, 2], 2, 2)) == [0, 1]
    assert slots_of(tree.match(None, [1, 3], 2, 2)) == [0, 2]


def test_a_token_inserted_twice_keeps_its_slot_and_the_second_is_reported() -> None:
    tree = PrefixTree()
    put(tree, [1, 2, 3], 10, 11, 12)
    assert put(tree, [1, 2, 4], 20, 21, 22) == [0, 1]
    assert put(tree, [1, 2], 30, 31) == [0, 1]
    assert slots_of(tree.match(None, [1, 2, 4], 3, 2)) == [10, 11, 22]
    assert tree.n_tokens == 4
    tree.check_integrity()


def test_namespaces_share_nothing() -> None:
    tree = PrefixTree()
    put(tree, [1, 2], 10, 11, namespace="a")
    put(tree, [1, 3], 12, 13, namespace="b")
    assert slots_of(tree.match("a", [1, 2], 2, 2)) == [10, 11]
    assert slots_of(tree.match("b", [1, 2], 2, 2)) == [12]
    assert tree.match(None, [1, 2], 2, 2).length == 0


def test_tokens_before_the_first_new_one_must_be_known() -> None:
    with pytest.raises(AssertionError, match="not in the tree"):
        put(PrefixTree(), [1, 2, 3], 5)


def test_what_is_in_use_is_never_evicted() -> None:
    tree = PrefixTree()
    put(tree, [1, 2, 3], 10, 11, 12, tick=1)
    put(tree, [1, 2, 4, 5], 13, 14, tick=2)
    tree.match(None, [1, 2, 4, 5], 4, 3)
    assert sorted(tree.evict(100, 3)) == [12]
    assert slots_of(tree.match(None, [1, 2, 4, 5], 4, 3)) == [10, 11, 13, 14]
    tree.check_integrity()


def test_a_partly_used_run_is_in_use() -> None:
    tree = PrefixTree()
    put(tree, [1, 2, 3], 10, 11, 12, tick=1)
    assert tree.match(None, [1, 2, 9], 3, 2).length == 2
    assert len(tree.evict(1, 2)) == 0 and len(tree.evict(1, 3)) == 1


def test_the_end_of_the_least_recently_used_leaf_goes_first() -> None:
    tree = PrefixTree()
    put(tree, [1, 2, 3], 10, 11, 12, tick=1)
    put(tree, [4, 5], 13, 14, tick=2)
    assert list(tree.evict(2, 9)) == [11, 12]
    assert slots_of(tree.match(None, [1, 2, 3], 3, 3)) == [10]
    assert list(tree.evict(1, 9)) == [14], "[1] was used at 3, [4, 5] at 2"
    assert tree.n_evicted == 3 and tree.n_tokens == 2


def test_a_dead_trunk_goes_before_a_younger_leaf() -> None:
    """An abandoned branch is forgotten whole, its inner nodes too, before what others used since."""
    tree = PrefixTree()
    put(tree, [1, 2, 3], 10, 11, 12, tick=1)
    put(tree, [1, 2, 4], 13, tick=1)
    put(tree, [7, 8], 20, 21, tick=5)
    assert sorted(tree.evict(4, 6)) == [10, 11, 12, 13]
    assert slots_of(tree.match(None, [7, 8], 2, 7)) == [20, 21]


def test_evicting_everything_leaves_an_empty_tree_that_works() -> None:
    tree = PrefixTree()
    for i in range(50):
        put(tree, [i % 3, i % 5, i], *([i * 3, i * 3 + 1, i * 3 + 2]), tick=i)
    n = tree.n_tokens
    assert len(tree.evict(10**9, 99)) == n and tree.n_tokens == 0
    assert put(tree, [1, 2], 7, 8, tick=100) == [] and slots_of(tree.match(None, [1, 2], 2, 101)) == [7, 8]
    tree.check_integrity()


def test_slots_are_renumbered_and_nothing_else_changes() -> None:
    tree = PrefixTree()
    put(tree, [1, 2, 3], 4, 5, 6)
    put(tree, [1, 2, 4], 1, namespace=None)
    put(tree, [1], 3, namespace="a")
    new_slots = np.arange(7)
    new_slots[[4, 6]] = 0, 2
    tree.renumber(new_slots)
    assert slots_of(tree.match(None, [1, 2, 3], 3, 2)) == [0, 5, 2]
    assert slots_of(tree.match(None, [1, 2, 4], 3, 2)) == [0, 5, 1]
    assert slots_of(tree.match("a", [1], 1, 2)) == [3]
    assert put(tree, [1, 2, 3, 5], 6, tick=3) == [] and slots_of(tree.match(None, [1, 2, 3, 5], 4, 3)) == [0, 5, 2, 6]
    tree.check_integrity()


@given(st.lists(st.integers(0, 1), max_size=12), st.lists(st.integers(0, 1), max_size=12), st.data())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_the_number_of_common_tokens(tokens: list[int], ids: list[int], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(ids)))
    limit = data.draw(st.integers(start, len(ids)))
    expected = 0
    while expected < min(len(tokens), limit - start) and tokens[expected] == ids[start + expected]:
        expected += 1
    assert n_common(tokens, ids, start, limit) == expected


def test_a_path_of_100_000_tokens_needs_no_recursion() -> None:
    tree = PrefixTree()
    n = 100_000
    ids = [i % 7 for i in range(n)]
    tree.insert(None, ids, 0, np.arange(n), 1)
    assert tree.match(None, [*ids, 1], n + 1, 2).length == n
    assert len(tree.evict(n // 2, 3)) == n // 2
    tree.check_integrity()
    assert tree.match(None, ids, n, 4).length == n - n // 2
    tree.evict(n, 5)
    tree.check_integrity()


def test_a_chain_of_2_000_nodes_needs_no_recursion() -> None:
    """A fork at every token: as many nodes as tokens on the path."""
    tree = PrefixTree()
    n = 2_000
    ids = [0] * n
    tree.insert(None, ids, 0, np.arange(n), 1)
    for depth in range(n - 1, 0, -1):
        tree.insert(None, [*ids[:depth], 1], depth, np.array([n + depth]), 1)
    tree.check_integrity()
    match = tree.match(None, ids, n, 2)
    assert len(match.parts) == n and slots_of(match) == list(range(n))
    assert len(tree.evict(10**6, 3)) == 2 * n - 1
    tree.check_integrity()


def test_growing_a_leaf_token_by_token_does_not_copy_it_each_time() -> None:
    """Linear, not quadratic: 40,000 appended slots in well under a second."""
    tree = PrefixTree()
    node = tree.insert(None, [0], 0, np.array([0]), 1)
    assert node == []
    leaf = next(iter(tree._roots.values())).children[0]
    arrays = set()
    started = time.perf_counter()
    for i in range(1, 40_000):
        tree._extend(leaf, [i], np.array([i]), 1)
        arrays.add(leaf._slots.__array_interface__["data"][0])
    assert len(arrays) < 40 and time.perf_counter() - started < 20
    assert leaf.slots.tolist() == list(range(40_000))


class AgainstADictionary(RuleBasedStateMachine):
    """The tree and {(namespace, prefix): slot}; slots come from a pool, as they do in an engine."""

    make: Callable[[], PrefixTree] = PrefixTree
    sequences = st.lists(st.integers(0, 2), min_size=1, max_size=9)

    def __init__(self) -> None:
        super().__init__()
        self.tree = type(self).make()
        self.slot: dict[tuple[str, tuple[int, ...]], int] = {}
        self.used_at: dict[tuple[str, tuple[int, ...]], int] = {}
        self.free = list(range(2000))
        self.tick = 1

    def known(self, namespace: str, ids: Sequence[int]) -> int:
        n = 0
        while n < len(ids) and (namespace, tuple(ids[: n + 1])) in self.slot:
            n += 1
        return n

    def use(self, namespace: str, ids: Sequence[int]) -> None:
        for n in range(1, len(ids) + 1):
            self.used_at[namespace, tuple(ids[:n])] = self.tick

    @rule(namespace=st.sampled_from("ab"), ids=sequences, data=st.data())
    def match(self, namespace: str, ids: list[int], data: st.DataObject) -> None:
        limit = data.draw(st.integers(0, len(ids)))
        match = self.tree.match(namespace, ids, limit, self.tick)
        assert match.length == min(limit, self.known(namespace, ids)) == sum(map(len, match.parts))
        assert slots_of(match) == [self.slot[namespace, tuple(ids[: i + 1])] for i in range(match.length)]
        self.use(namespace, ids[: match.length])

    @rule(namespace=st.sampled_from("ab"), ids=sequences, data=st.data())
    def insert(self, namespace: str, ids: list[int], data: st.DataObject) -> None:
        known = self.known(namespace, ids)
        first = data.draw(st.integers(0, known))  # what a batch-mate computed meanwhile is known too
        slots = [self.free.pop() for _ in ids[first:]]
        kept = self.tree.insert(namespace, ids, first, np.array(slots, np.int64), self.tick)
        assert kept == list(range(first, known))
        for position, slot in enumerate(slots, first):
            if position < known:
                self.free.append(slot)
            else:
                self.slot[namespace, tuple(ids[: position + 1])] = slot
        self.use(namespace, ids)

    @rule(n=st.integers(0, 12), in_use=st.booleans())
    def evict(self, n: int, in_use: bool) -> None:
        tick = self.tick if in_use else self.tick + 1
        freed = self.tree.evict(n, tick).tolist()
        owner = {slot: key for key, slot in self.slot.items()}
        gone = {owner[slot] for slot in freed}
        assert len(freed) == len(gone) <= n
        assert not [key for key in gone if self.used_at[key] == tick], "what is in use stays"
        if len(freed) < n and not in_use:
            assert len(gone) == len(self.slot), "only what is in use may be left"
        for key in gone:
            self.free.append(self.slot.pop(key))
        for namespace, prefix in self.slot:
            assert len(prefix) == 1 or (namespace, prefix[:-1]) in self.slot, "leaves go first"

    @rule()
    def later(self) -> None:
        self.tick += 1

    @invariant()
    def lawful(self) -> None:
        self.tree.check_integrity()
        assert self.tree.n_tokens == len(self.slot) == 2000 - len(self.free)

    def teardown(self) -> None:
        for namespace, prefix in self.slot:
            match = self.tree.match(namespace, prefix, len(prefix), self.tick)
            assert slots_of(match) == [self.slot[namespace, prefix[: i + 1]] for i in range(len(prefix))]


TestAgainstADictionary = AgainstADictionary.TestCase
TestAgainstADictionary.settings = settings(max_examples=40, stateful_step_count=25, deadline=None, derandomize=True)
UNSHRUNK = settings(
    max_examples=300, deadline=None, derandomize=True, report_multiple_bugs=False, phases=[Phase.generate]
)


class SplitLosesTheLower(PrefixTree):
    def _split(self, node: Any, n_upper: int) -> Any:
        upper = super()._split(node, n_upper)
        upper.children.clear()
        return upper


class EvictsWhatIsInUse(PrefixTree):
    def evict(self, n_tokens: int, tick: int) -> Slots:
        return super().evict(n_tokens, tick + 10**6)


class ForgetsThatTheUpperPartWasUsed(PrefixTree):
    def match(self, namespace: Any, token_ids: Sequence[int], limit: int, tick: int) -> Match:
        match = super().match(namespace, token_ids, limit, tick)
        if namespace in self._roots:
            for node in self._roots[namespace].children.values():
                node.tick = 0
        return match


@pytest.mark.parametrize("mutant", [SplitLosesTheLower, EvictsWhatIsInUse, ForgetsThatTheUpperPartWasUsed])
def test_the_machine_finds_a_wrong_tree(mutant: type[PrefixTree]) -> None:
    class Machine(AgainstADictionary):
        make = mutant

    with pytest.raises(AssertionError):
        run_state_machine_as_test(Machine, settings=UNSHRUNK)


def test_the_machine_finds_a_search_that_stops_one_token_early(monkeypatch: pytest.MonkeyPatch) -> None:
    def early(tokens: list[int], ids: list[int], start: int, limit: int) -> int:
        n = n_common(tokens, ids, start, limit)
        return n - 1 if n > 2 else n

    monkeypatch.setattr(prefix_tree, "n_common", early)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(AgainstADictionary, settings=UNSHRUNK)


def test_matched_slots_survive_until_the_tree_changes() -> None:
    """Rows of one batch are matched first and read together: growing one leaf leaves the views of others alone."""
    tree = PrefixTree()
    put(tree, [1, 2], 10, 11)
    put(tree, [1, 3], 12)
    matches = [tree.match(None, ids, 2, 2) for ids in ([1, 2], [1, 3])]
    assert [slots_of(match) for match in matches] == [[10, 11], [10, 12]]
    assert all(a.length == b.length for a, b in pairwise(matches))
