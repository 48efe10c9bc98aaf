"""Node weights by enumeration: for each node of a trie, the tokens below it, found through its public attributes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from genlm_backend.tokenization import Token
from genlm_backend.trie import TokenCharacterTrie

FOUR_WORDS = [b"cat", b"cats", b"dog", b"dogs"]

byte_strings = st.lists(st.binary(max_size=6) | st.text("ab", max_size=5).map(str.encode), max_size=12)
vocabularies = byte_strings.map(lambda words: [Token(i, word) for i, word in enumerate(words)])
log_weights = st.floats(-1000, 1000, width=32) | st.just(-math.inf)


def tokens_below(trie: TokenCharacterTrie) -> list[set[int]]:
    """For each node, the positions of the tokens whose leaf it is or lies below it."""
    below: list[set[int]] = [set() for _ in trie.children]
    for position, leaf in trie.idx_to_leaf.tolist():
        below[leaf].add(position)
    for node, children in enumerate(trie.children):  # children come before their parents
        for child in children.values():
            assert child < node
            below[node] |= below[child]
    return below


def node_weights(trie: TokenCharacterTrie, weights: Any, reduction: str) -> npt.NDArray[np.float64]:
    """The weight of each node, each from scratch."""
    weights = np.asarray(weights, np.float64)
    return np.array([REDUCE[reduction]([float(weights[i]) for i in sorted(below)]) for below in tokens_below(trie)])


def _logsumexp(weights: list[float]) -> float:
    top = max(weights, default=-math.inf)
    return top if math.isinf(top) else top + math.log(math.fsum(math.exp(w - top) for w in weights))


REDUCE = {"sum": math.fsum, "max": lambda weights: max(weights, default=-math.inf), "logsumexp": _logsumexp}
