"""A vocabulary as the flat arrays of its trie: nodes in post-order, and what reducing over them reads."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from genlm_backend.errors import DuplicateWord
from genlm_backend.tokenization import Token

Int32s = npt.NDArray[np.int32]
UInt32s = npt.NDArray[np.uint32]


class Forks(NamedTuple):
    """How the values of all nodes come from the weights.

    Values 0 to n_tokens - 1 are the weights, in the order of their leaves; value n_tokens + i is that of fork i, a node
    with several children. Forks are ordered by height (above their children), then by number of children.

    Attributes:
        node: (n_forks,) int32.
        value_of_token: (n_tokens,) uint32; where the weight of each entry is among the values.
        child: uint32; which values the first fork reduces, then which the second does, and so on.
        group_start: (n_groups + 1,) int32; group g are the forks from `group_start[g]` up to `group_start[g + 1]`.
        group_size: (n_groups,) uint64; the number of children of each fork of the group.
        value_of_node: (n_nodes,) uint32; a node with one child has the value of that child.
    """

    node: Int32s
    value_of_token: UInt32s
    child: UInt32s
    group_start: Int32s
    group_size: npt.NDArray[np.uint64]
    value_of_node: UInt32s


class Layout:
    """The trie of a vocabulary.

    Every token has a leaf of its own, below the node of its bytes. Nodes are numbered in post-order: children before
    parents, in the order in which the vocabulary brings them; the root is last.

    Args:
        decode: The vocabulary: tokens, plain bytes, or other iterables of hashable letters.

    Attributes:
        n_tokens: Entries of the vocabulary.
        n_nodes: Leaves and inner nodes.
        parent: (n_nodes,); -1 for the root.
        code: (n_nodes,); the letter that leads to the node, a byte as itself; -1 for leaves and the root.
        leaf: (n_tokens,); the leaf of each entry.
        child_start, child: The children of node n are `child[child_start[n]:child_start[n + 1]]`, ascending.

    Raises:
        DuplicateWord: One token, or one plain entry, comes twice.
    """

    def __init__(self, decode: Sequence[Any]) -> None:
        from genlm_backend.trie import passes

        self._refuse_duplicates(decode)
        self._letters: list[Hashable] = []  # those that are no bytes; their codes start at 256
        self._code_of_letter: dict[Hashable, int] = {}
        codes, ends = self._encode(decode)
        self.n_tokens = len(decode)
        self.parent, self.code, self.leaf, self.child_start, self.child = passes.insert_tokens(codes, ends)
        self.n_nodes = len(self.parent)
        self.root = self.n_nodes - 1

    def letter(self, code: int) -> Any:
        """The letter with this code."""
        return code if code < 256 else self._letters[code - 256]

    def children_of(self, node: int) -> Int32s:
        """The children of a node, leaves included, ascending."""
        children: Int32s = self.child[self.child_start[node] : self.child_start[node + 1]]
        return children

    def find(self, prefixes: Sequence[Iterable[Any]]) -> Int32s:
        """The inner nodes that these letters lead to, -1 where no token starts with them: (n_prefixes,)."""
        from genlm_backend.trie import passes

        if all(isinstance(prefix, bytes) for prefix in prefixes):
            codes = np.frombuffer(b"".join(prefixes), np.uint8).astype(np.int32)  # type: ignore[arg-type]
            lengths = [len(prefix) for prefix in prefixes]  # type: ignore[arg-type]
        else:
            of_prefixes = [[self._code_of(letter) for letter in prefix] for prefix in prefixes]
            lengths = [len(of_prefix) for of_prefix in of_prefixes]
            all_codes = (_NO_CODE if code is None else code for of_prefix in of_prefixes for code in of_prefix)
            codes = np.fromiter(all_codes, np.int32)
        ends = np.array([*accumulate(lengths)], np.int64)
        found: Int32s = passes.find_nodes(codes, ends, self.code, self.child_start, self.child)
        return found

    def prefix_codes(self, node: int) -> Int32s:
        """The codes of the letters from the root to a node; a leaf has those of its parent."""
        codes = []
        while node != self.root:
            if self.code[node] >= 0:
                codes.append(self.code[node])
            node = int(self.parent[node])
        return np.array(codes[::-1], np.int32)

    def prefix(self, node: int) -> list[Any]:
        """The letters from the root to a node; a leaf has those of its parent."""
        return [self.letter(code) for code in self.prefix_codes(node).tolist()]

    @cached_property
    def token_of_leaf_position(self) -> Int32s:
        """(n_tokens,); the entries in the order of their leaves. The leaves below a node are one run of it."""
        return np.argsort(self.leaf, kind="stable").astype(np.int32)

    @cached_property
    def leaf_range(self) -> tuple[Int32s, Int32s]:
        """(n_nodes,) each; the run of `token_of_leaf_position` below node n is from `[0][n]` up to `[1][n]`."""
        from genlm_backend.trie import passes

        n_below = passes.count_leaves(self.parent, self.leaf)
        is_leaf = np.zeros(self.n_nodes, np.int32)
        is_leaf[self.leaf] = 1
        end = np.cumsum(is_leaf, dtype=np.int32)
        return end - n_below, end

    @cached_property
    def forks(self) -> Forks:
        """What reducing over the whole trie reads; without tokens there is nothing to reduce, and it means nothing."""
        from genlm_backend.trie import passes

        holder, bottom, above, n_children, height = passes.find_holders(self.parent, self.child_start)
        forks = np.flatnonzero(n_children)
        forks = forks[np.lexsort((n_children[forks], height[forks]))]
        is_new = (np.diff(height[forks]) != 0) | (np.diff(n_children[forks]) != 0)
        first_of_group = np.concatenate([np.zeros(min(len(forks), 1), np.int64), np.flatnonzero(is_new) + 1])
        value = self.leaf_range[0][bottom].astype(np.uint32)  # of a leaf, its place among the leaves
        value[forks] = self.n_tokens + np.arange(len(forks), dtype=np.uint32)
        by_fork = np.argsort(value[above[:-1]], kind="stable")  # the last holder is the root's, and nobody's child
        return Forks(
            bottom[forks],
            self.leaf_range[0][self.leaf].astype(np.uint32),
            value[:-1][by_fork],
            np.append(first_of_group, len(forks)).astype(np.int32),
            n_children[forks[first_of_group]].astype(np.uint64),
            value[holder],
        )

    def _code_of(self, letter: Any) -> int | None:
        try:
            if letter in _BYTES:  # equal to a byte, as numpy integers and True are
                return int(letter)
        except (TypeError, ValueError):  # an array, say
            return None
        return self._code_of_letter.get(letter)

    def _encode(self, decode: Sequence[Any]) -> tuple[Int32s, npt.NDArray[np.int64]]:
        """The letters of all entries as codes, one after another, and where each entry ends."""
        if all(isinstance(item, bytes) for item in decode):
            lengths = np.fromiter(map(len, decode), np.int64, len(decode))
            return np.frombuffer(b"".join(decode), np.uint8).astype(np.int32), np.cumsum(lengths)
        entries = [
            np.frombuffer(item, np.uint8).astype(np.int32) if isinstance(item, bytes) else self._codes_of(item)
            for item in decode
        ]
        return np.concatenate(entries), np.cumsum([len(entry) for entry in entries], dtype=np.int64)

    def _codes_of(self, letters: Iterable[Any]) -> Int32s:
        codes = []
        for letter in letters:
            code = self._code_of(letter)
            if code is None:
                code = self._code_of_letter[letter] = 256 + len(self._letters)
                self._letters.append(letter)
            codes.append(code)
        return np.array(codes, np.int32)

    def _refuse_duplicates(self, decode: Sequence[Any]) -> None:
        tokens = [item for item in decode if isinstance(item, Token)]
        others = [item for item in decode if not isinstance(item, Token)] if len(tokens) < len(decode) else []
        if len({token.token_id for token in tokens}) == len(tokens) and len(set(others)) == len(others):
            return
        seen: dict[Hashable, int] = {}
        for i, key in enumerate(word_keys(decode)):
            first = seen.setdefault(key, i)
            if first != i:
                raise DuplicateWord(key, first, i)


def word_keys(decode: Iterable[Any]) -> Iterator[Any]:
    """The key of each entry in `word2leaf`: (bytes, token id) of a token, and anything else is its own."""
    return ((item.byte_string, item.token_id) if isinstance(item, Token) else item for item in decode)


_BYTES = frozenset(range(256))
_NO_CODE = -2  # of a letter that no entry has
