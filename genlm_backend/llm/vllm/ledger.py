"""Which token prefixes are held by live requests: plain data, no vLLM.

A session is one live request of the engine; all its tokens are computed. The ledger is a radix tree of their tokens, so
that the longest prefix of a new context that some session holds is found in one walk, also where it ends in the middle
of a session: a shorter prefix (backtracking) and a second continuation (a fork) are found in the same way.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from genlm_backend.cache.prefix_tree import n_common


class Session:
    """One live request: its name in the engine, its adapter and how many tokens it holds."""

    __slots__ = ("_node", "adapter", "name")

    def __init__(self, name: str, adapter: str | None) -> None:
        self.name = name
        self.adapter = adapter
        self._node: _Node | None = None

    @property
    def length(self) -> int:
        """Number of computed tokens."""
        assert self._node is not None, "the session is in no ledger"
        return self._node.start + len(self._node.tokens)


class Match(NamedTuple):
    """The longest prefix of a context that a session holds.

    Attributes:
        length: Its number of tokens.
        session: One that holds it; None if `length` is 0.
        place: Equal for two contexts exactly if they match the same tokens.
    """

    length: int
    session: Session | None
    place: tuple[int, int]


class _Node:
    __slots__ = ("children", "parent", "session", "start", "tokens")

    def __init__(self, parent: _Node | None, start: int, tokens: list[int]) -> None:
        self.parent = parent
        self.start = start
        self.tokens = tokens
        self.children: dict[int, _Node] = {}
        self.session: Session | None = None


class Ledger:
    """Sessions by their tokens, and in the order of their last use.

    Attributes:
        n_tokens: Distinct prefixes held, over all sessions.
    """

    def __init__(self) -> None:
        self._roots: dict[str | None, _Node] = {}
        self._by_use: OrderedDict[str, Session] = OrderedDict()
        self.n_tokens = 0

    def __len__(self) -> int:
        """Number of sessions."""
        return len(self._by_use)

    def __contains__(self, name: str) -> bool:
        return name in self._by_use

    def get(self, name: str) -> Session | None:
        """The session of this name, if it is held."""
        return self._by_use.get(name)

    def names(self) -> list[str]:
        """Least recently used first."""
        return list(self._by_use)

    def match(self, adapter: str | None, token_ids: Sequence[int], limit: int) -> Match:
        """The longest prefix of at most `limit` tokens that a session of this adapter holds; costs O(length)."""
        node = self._roots.get(adapter)
        if node is None:
            return Match(0, None, (0, 0))
        ids, length = list(token_ids), 0
        while length < limit:
            child = node.children.get(ids[length])
            if child is None:
                break
            n_same = n_common(child.tokens, ids, length, limit)
            node, length = child, length + n_same
            if n_same < len(child.tokens):
                break
        if not length:
            return Match(0, None, (id(node), 0))
        at_end = node.session if length == node.start + len(node.tokens) else None
        return Match(length, at_end or _holder(node), (id(node), length))

    def add(self, session: Session, token_ids: Sequence[int]) -> Session | None:
        """Hold a session with these tokens, as the one used last.

        Returns:
            The session that held exactly these tokens so far and is no longer in the ledger; None if there was none.
        """
        assert token_ids and session.name not in self._by_use
        replaced = self._put(session, token_ids)
        self._by_use[session.name] = session
        if replaced is not None:
            del self._by_use[replaced.name]
        return replaced

    def extend(self, session: Session, token_ids: Sequence[int]) -> Session | None:
        """A session now holds `token_ids`, which start with what it held; returns as `add` does."""
        node = session._node
        assert node is not None and node.session is session
        new = list(token_ids[session.length :])
        if not node.children:
            node.tokens += new
            self.n_tokens += len(new)
            replaced = None
        else:
            node.session = None
            replaced = self._put(session, token_ids)
            if replaced is not None:
                del self._by_use[replaced.name]
        self._by_use.move_to_end(session.name)
        return replaced

    def remove(self, session: Session) -> int:
        """Forget a session; the number of tokens that no other one holds."""
        node = session._node
        assert node is not None and node.session is session
        del self._by_use[session.name]
        node.session, session._node = None, None
        n_before = self.n_tokens
        while node.session is None and not node.children and node.parent is not None:
            del node.parent.children[node.tokens[0]]
            self.n_tokens -= len(node.tokens)
            node = node.parent
        return n_before - self.n_tokens

    def touch(self, session: Session) -> None:
        """Count a session as the one used last."""
        self._by_use.move_to_end(session.name)

    def idlest(self, besides: Collection[str]) -> Session | None:
        """The least recently used session whose name is not in `besides`; None if there is none."""
        return next((session for name, session in self._by_use.items() if name not in besides), None)

    def clear(self) -> None:
        """Forget all sessions."""
        self._roots.clear()
        self._by_use.clear()
        self.n_tokens = 0

    def check_integrity(self) -> None:
        """Raise AssertionError unless every law of the tree holds: for tests."""
        n_tokens, held = 0, set()
        for node in self._nodes():
            n_tokens += len(node.tokens)
            if node.parent is None:
                assert not node.tokens and node.start == 0 and node.session is None
            else:
                assert node.tokens and node.parent.children[node.tokens[0]] is node
                assert node.start == node.parent.start + len(node.parent.tokens)
                assert node.session is not None or node.children, "a leaf without a session is removed"
            if node.session is not None:
                assert node.session._node is node
                held.add(node.session.name)
        assert n_tokens == self.n_tokens and held == set(self._by_use)

    def _put(self, session: Session, token_ids: Sequence[int]) -> Session | None:
        node = self._roots.get(session.adapter)
        if node is None:
            node = self._roots[session.adapter] = _Node(None, 0, [])
        ids, length = list(token_ids), 0
        while length < len(ids):
            child = node.children.get(ids[length])
            if child is None:
                child = _Node(node, length, ids[length:])
                node.children[ids[length]] = child
                self.n_tokens += len(child.tokens)
                n_same = len(child.tokens)
            else:
                n_same = n_common(child.tokens, ids, length, len(ids))
                if n_same < len(child.tokens):
                    child = _split(child, n_same)
            node, length = child, length + n_same
        replaced, node.session, session._node = node.session, session, node
        if replaced is not None:
            replaced._node = None
        return replaced

    def _nodes(self) -> Iterator[_Node]:
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            yield node
            stack += node.children.values()


def _holder(node: _Node) -> Session:
    """A session through the end of a node; every leaf has one."""
    while node.session is None:
        node = next(iter(node.children.values()))
    return node.session


def _split(node: _Node, n_upper: int) -> _Node:
    """Put the first `n_upper` tokens of a node into a new parent of it; the new parent."""
    assert node.parent is not None
    upper = _Node(node.parent, node.start, node.tokens[:n_upper])
    node.parent.children[upper.tokens[0]] = upper
    node.tokens = node.tokens[n_upper:]
    node.start += n_upper
    node.parent = upper
    upper.children[node.tokens[0]] = node
    return upper
