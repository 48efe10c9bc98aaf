"""What byte a model writes next: the log-mass of each, from rows of next-token log-probabilities."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from genlm_backend.tokenization import Token
from genlm_backend.trie.sums import (
    Segments,
    Weights,
    checked_rows,
    plain_weights,
    reduce_array_segments,
    reduce_tensor_segments,
)
from genlm_backend.trie.tries import TokenCharacterTrie

_END = 256  # column of tokens that end at the prefix
_NO_TEXT = 257  # column of tokens that are no text
_N_COLUMNS = 258


class NextBytes(NamedTuple):
    """Log-masses in nats, -inf where no token fits; together they hold the whole mass below the prefix.

    Attributes:
        log_masses: (n, 256), or (256,) for one row; tokens that continue the prefix with each byte.
        log_ends: (n,) or a scalar; tokens whose bytes are the prefix and nothing more.
        log_no_text: (n,) or a scalar; special tokens, and letters that are no bytes. They match no text, so they are
            counted with the empty prefix only.
    """

    log_masses: Any
    log_ends: Any
    log_no_text: Any


class NextByteTokens:
    """The tokens that continue a prefix, by their next byte; made once for a prefix and used for any number of rows.

    Args:
        trie: Of the whole vocabulary.
        prefix: The bytes of the token being written; empty at the start of one.

    Attributes:
        n_tokens: Width of the rows it takes.
    """

    def __init__(self, trie: TokenCharacterTrie, prefix: bytes = b"") -> None:
        self.prefix = bytes(prefix)
        self.n_tokens = trie.layout.n_tokens
        token, column = _tokens_by_next_byte(trie, self.prefix)
        order = np.argsort(column, kind="stable")
        self._segments = Segments(token[order], np.bincount(column, minlength=_N_COLUMNS))

    def log_masses(self, rows: Weights) -> NextBytes:
        """The log-mass of each next byte, under rows of log-probabilities.

        Args:
            rows: (n, vocab) or (vocab,) log-probabilities of the next token, nats.

        Returns:
            Tensors on the device of the rows and in their type for tensors, float64 arrays for anything else. The
            log-mass of the prefix itself is the log-sum of all of them.

        Raises:
            WeightsMismatch: The rows do not fit the vocabulary.
        """
        plain = plain_weights(rows)
        checked = checked_rows(plain, self.n_tokens, plain.ndim)
        by_column: Any
        if isinstance(checked, torch.Tensor):
            by_column = reduce_tensor_segments(checked, self._segments, "logsumexp")
        else:
            by_column = reduce_array_segments(checked, self._segments, "logsumexp")
        if plain.ndim == 1:
            by_column = by_column[0]
        return NextBytes(by_column[..., :_END], by_column[..., _END], by_column[..., _NO_TEXT])


def _tokens_by_next_byte(
    trie: TokenCharacterTrie, prefix: bytes
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Tokens and the column of each."""
    layout = trie.layout
    node = trie.find(prefix)
    if node is None:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    starts, ends = layout.leaf_range
    token = layout.token_of_leaf_position[starts[node] : ends[node]].astype(np.int64)
    children = layout.children_of(node)
    codes = layout.code[children].astype(np.int64)
    of_child = np.select([codes < 0, codes < 256], [np.int64(_END), codes], np.int64(_NO_TEXT))
    column = np.repeat(of_child, ends[children] - starts[children])
    is_text = ~_is_special(trie)[token]
    if prefix:
        is_text &= column != _NO_TEXT
        return token[is_text], column[is_text]
    column[~is_text] = _NO_TEXT
    return token, column


def _is_special(trie: TokenCharacterTrie) -> npt.NDArray[np.bool_]:
    return np.fromiter((isinstance(t, Token) and t.is_special for t in trie.decode), np.bool_, len(trie.decode))
