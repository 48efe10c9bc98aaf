"""Radix tree over token prefixes: which slot of a pool holds what was computed for each token.

Everything in the tree is computed; what is being computed is not in it yet. So a failed computation has nothing to undo
here. A node is a run of tokens without a fork; node `n` covers the positions `n.start` to `n.start + len(n.tokens)` of
every sequence through it. Nodes touched at the current `tick` are in use and never evicted.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Slots = npt.NDArray[np.int64]
_NO_SLOTS: Slots = np.empty(0, np.int64)


class Match(NamedTuple):
    """The longest known prefix of a sequence: its length, and its slots in order as one array per node passed."""

    length: int
    parts: list[Slots]


class _Node:
    __slots__ = ("_slots", "children", "parent", "start", "tick", "tokens")

    def __init__(self, parent: _Node | None, start: int, tokens: list[int], slots: Slots, tick: int) -> None:
        self.parent = parent
        self.start = start
        self.tokens = tokens
        self._slots = slots  # may have room at its end, so that a growing leaf is not copied at each token
        self.tick = tick
        self.children: dict[int, _Node] = {}

    @property
    def slots(self) -> Slots:
        return self._slots[: len(self.tokens)]

    def append(self, tokens: Sequence[int], slots: Slots) -> None:
        n_before = len(self.tokens)
        n_after = n_before + len(tokens)
        if n_after > len(self._slots):
            self._slots = np.concatenate((self.slots, np.empty(max(16, n_after), np.int64)))
        self._slots[n_before:n_after] = slots
        self.tokens += tokens


class PrefixTree:
    """Prefixes of any number of namespaces (adapters); namespaces share nothing.

    The matched slots are views: use them before the next call that changes the tree.
    """

    def __init__(self) -> None:
        self._roots: dict[Hashable, _Node] = {}
        self.n_tokens = 0
        self.n_evicted = 0

    def match(self, namespace: Hashable, token_ids: Sequence[int], limit: int, tick: int) -> Match:
        """The longest known prefix of at most `limit` tokens; marks it as used at `tick`. Costs O(length)."""
        length, parts = 0, []
        node = self._roots.get(namespace)
        ids = list(token_ids)
        while node is not None:
            node.tick = tick
            if length == limit:
                break
            node = node.children.get(ids[length])
            if node is None:
                break
            n_same = n_common(node.tokens, ids, length, limit)
            parts.append(node.slots[:n_same])
            length += n_same
            if n_same < len(node.tokens):
                node.tick = tick
                break
        return Match(length, parts)

    def insert(self, namespace: Hashable, token_ids: Sequence[int], first: int, slots: Slots, tick: int) -> list[int]:
        """Record slots for the tokens of a sequence from position `first` on.

        Args:
            namespace: The adapter.
            token_ids: The whole sequence, (n,).
            first: Tokens before this position must be in the tree already.
            slots: One slot for each token from `first` on, (n - first,).
            tick: The time of this use.

        Returns:
            Positions whose token the tree held already, so that their slot was not taken over.
        """
        ids = list(token_ids)
        node = self._roots.get(namespace)
        if node is None:
            node = self._roots[namespace] = _Node(None, 0, [], _NO_SLOTS, tick)
        length = 0
        while length < len(ids):
            node.tick = tick
            child = node.children.get(ids[length])
            if child is None:
                break
            n_same = n_common(child.tokens, ids, length, len(ids))
            length += n_same
            if n_same < len(child.tokens):
                child.tick = tick
                if length < len(ids):
                    node = self._split(child, n_same)
                break
            node = child
        assert length >= first, "tokens before `first` are not in the tree"
        if length < len(ids):
            self._extend(node, ids[length:], slots[length - first :], tick)
        node.tick = tick
        return list(range(first, length))

    def evict(self, n_tokens: int, tick: int) -> Slots:
        """Forget `n_tokens` tokens, or all that are not in use if these are fewer, least recently used leaves first.

        Returns:
            The freed slots.
        """
        freed: list[Slots] = []
        n_freed = 0
        leaves = [(node.tick, i, node) for i, node in enumerate(self._nodes()) if _is_evictable(node, tick)]
        heapq.heapify(leaves)  # the middle number only orders equals
        while leaves and n_freed < n_tokens:
            _, i, leaf = heapq.heappop(leaves)
            parent = leaf.parent
            n_cut = min(len(leaf.tokens), n_tokens - n_freed)
            freed.append(self._cut(leaf, n_cut))
            n_freed += n_cut
            if parent is not None and _is_evictable(parent, tick):
                heapq.heappush(leaves, (parent.tick, i, parent))
        self.n_evicted += n_freed
        return np.concatenate(freed) if freed else _NO_SLOTS

    def renumber(self, new_slots: Slots) -> None:
        """Let each slot `s` be called `new_slots[s]` from now on."""
        for node in self._nodes():
            node._slots = new_slots[node.slots]

    def check_integrity(self) -> None:
        """Raise AssertionError unless every law of the tree holds: for tests."""
        seen: list[int] = []
        for node in self._nodes():
            if node.parent is None:
                assert not node.tokens and node.start == 0
            else:
                assert node.tokens and node.parent.children[node.tokens[0]] is node
                assert node.start == node.parent.start + len(node.parent.tokens)
                assert node.parent.tick >= node.tick, "a parent is used whenever its child is"
            assert len(node.slots) == len(node.tokens)
            seen += node.slots.tolist()
        assert len(seen) == len(set(seen)) == self.n_tokens, "each token has a slot of its own"

    def _extend(self, node: _Node, tokens: list[int], slots: Slots, tick: int) -> None:
        self.n_tokens += len(tokens)
        if node.parent is not None and not node.children:
            node.append(tokens, slots)
        else:
            child = _Node(node, node.start + len(node.tokens), tokens, slots.copy(), tick)
            node.children[tokens[0]] = child

    def _split(self, node: _Node, n_upper: int) -> _Node:
        """Put the first `n_upper` tokens of a node into a new parent of it; the new parent."""
        assert node.parent is not None
        upper = _Node(node.parent, node.start, node.tokens[:n_upper], node.slots[:n_upper].copy(), node.tick)
        node.parent.children[upper.tokens[0]] = upper
        node._slots = node.slots[n_upper:].copy()
        node.tokens = node.tokens[n_upper:]
        node.start += n_upper
        node.parent = upper
        upper.children[node.tokens[0]] = node
        return upper

    def _cut(self, leaf: _Node, n_cut: int) -> Slots:
        """Forget the last `n_cut` tokens of a leaf; their slots."""
        n_kept = len(leaf.tokens) - n_cut
        slots = leaf.slots[n_kept:].copy()
        if n_kept == 0:
            assert leaf.parent is not None
            del leaf.parent.children[leaf.tokens[0]]
        del leaf.tokens[n_kept:]
        self.n_tokens -= n_cut
        return slots

    def _nodes(self) -> Iterator[_Node]:
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            yield node
            stack += node.children.values()


def _is_evictable(node: _Node, tick: int) -> bool:
    return not node.children and node.tick != tick and node.parent is not None


def n_common(tokens: list[int], ids: list[int], start: int, limit: int) -> int:
    """How many leading entries of `tokens` equal `ids[start:limit]`."""
    n = min(len(tokens), limit - start)
    if tokens[:n] == ids[start : start + n]:
        return n
    low, high = 0, n - 1  # tokens[:low] is equal; tokens[:high + 1] is not
    while low < high:
        middle = (low + high + 1) // 2
        if tokens[low:middle] == ids[start + low : start + middle]:
            low = middle
        else:
            high = middle - 1
    return low
