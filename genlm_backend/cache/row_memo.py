"""Recently served rows, bounded in bytes: one block per batch, forgotten least recently used first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch


class Block(NamedTuple):
    """The rows of one batch: (batch, vocab) float32 nats, and (batch,) log-normalisers as Python floats."""

    logprobs: torch.Tensor
    log_normalizers: list[float]


class _Held(NamedTuple):
    block: Block
    keys: list[Hashable]
    n_bytes: int


class RowMemo:
    """Rows by key. Rows stay in the tensor they were computed in, so keeping a batch copies nothing.

    Safe to use from several threads. Whoever gets a row from here must not change it.

    Args:
        budget_bytes: Most bytes of rows to keep, the newest block apart; 0 keeps none.

    Attributes:
        generation: How often it was cleared: rows whose computation began in an earlier one are not kept.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.n_bytes = 0
        self.generation = 0
        self._lock = threading.Lock()
        self._blocks: OrderedDict[int, _Held] = OrderedDict()
        self._where: dict[Hashable, tuple[int, int]] = {}
        self._next_id = 0

    def get(self, key: Hashable) -> Block | None:
        """The row of a key as a block of one, or None."""
        with self._lock:
            where = self._where.get(key)
            if where is None:
                return None
            block_id, row = where
            self._blocks.move_to_end(block_id)
            logprobs, log_normalizers = self._blocks[block_id].block
            return Block(logprobs[row : row + 1], [log_normalizers[row]])

    def put(self, keys: Sequence[Hashable], rows: Sequence[int], block: Block, generation: int | None = None) -> None:
        """Keep a block; `keys[i]` names its row `rows[i]`. One larger than the budget is kept alone, until the next.

        Args:
            keys: Names.
            rows: Their rows.
            block: The rows.
            generation: The memo's when the rows began to be computed; if it was cleared since, nothing is kept.
        """
        n_bytes = block.logprobs.numel() * block.logprobs.element_size()
        if not self.budget_bytes or not keys:
            return
        with self._lock:
            if generation not in (None, self.generation):
                return
            self._make_room(n_bytes)
            block_id = self._next_id
            self._next_id += 1
            self._blocks[block_id] = _Held(block, list(keys), n_bytes)
            self.n_bytes += n_bytes
            for key, row in zip(keys, rows, strict=True):
                self._where[key] = (block_id, row)

    def make_room(self, n_bytes: int) -> None:
        """Forget what would have to go for rows of so many bytes: where it was, they may be computed."""
        with self._lock:
            self._make_room(n_bytes)

    def clear(self) -> None:
        """Forget every row, also those that are being computed now."""
        with self._lock:
            self.generation += 1
            self._blocks.clear()
            self._where.clear()
            self.n_bytes = 0

    def __len__(self) -> int:
        """Number of keys known."""
        with self._lock:
            return len(self._where)

    def _make_room(self, n_bytes: int) -> None:
        while self._blocks and self.n_bytes + n_bytes > self.budget_bytes:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        block_id, held = self._blocks.popitem(last=False)
        self.n_bytes -= held.n_bytes
        for key in held.keys:
            if self._where.get(key, (None,))[0] == block_id:
                del self._where[key]
