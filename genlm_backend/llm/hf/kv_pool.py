"""Keys and values of single tokens, outside the model: slots of one tensor per layer, and which of them are free."""

from __future__ import annotations

import heapq

import numpy as np
import torch

from genlm_backend.cache.prefix_tree import PrefixTree, Slots
from genlm_backend.llm.service import Context

FIRST_CAPACITY = 1024
MOST_SPARE_BYTES = 64 * 2**20  # what an emptied pool may keep for the next one
PLAN_TOKENS = 8192  # new tokens of a batch for which room is made at once: bounds what it holds beyond the budget


class KVPool:
    """Slots for keys and values. Low slots are given out first, so that what is in use stays close together.

    Args:
        budget_bytes: Up to here the pool grows by doubling, beyond it only by what a batch needs, and until it ends.

    Attributes:
        bytes_per_slot: Keys and values of one token over all layers; 0 until the first forward.
        n_used: Slots given out.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.bytes_per_slot = 0
        self.n_used = 0
        self._n_touched = 0  # slots from here on were never given out
        self._free: list[int] = []  # a heap
        self._capacity = FIRST_CAPACITY
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._spare: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # of the pool that this one follows
        self._positions = np.zeros(FIRST_CAPACITY, np.int64)

    def emptied(self) -> KVPool:
        """One that holds nothing. It uses the same memory where that is little: new pages cost more than a forward.

        A batch that still writes into this one must end before the other one is used.
        """
        new = KVPool(self.budget_bytes)
        new.bytes_per_slot = self.bytes_per_slot
        if self._capacity == FIRST_CAPACITY and self._capacity * self.bytes_per_slot <= MOST_SPARE_BYTES:
            new._spare = {**self._spare, **self._layers}
        return new

    def release(self) -> None:
        """Give its memory back; nothing is held here any more."""
        self._layers, self._spare = {}, {}

    def allocate(self, positions: list[int]) -> Slots:
        """A free slot for each new token, in increasing order: (n,); grows the pool when none is left.

        Args:
            positions: Place of each token in its sequence.
        """
        n = len(positions)
        n_new = max(0, n - len(self._free))
        if self._n_touched + n_new > self._capacity:
            self._grow(self._n_touched + n_new)  # first: where there is no memory for it, nothing was given out
        again = [heapq.heappop(self._free) for _ in range(n - n_new)]
        slots = np.array([*again, *range(self._n_touched, self._n_touched + n_new)], np.int64)
        self._n_touched += n_new
        self.n_used += n
        self._positions[slots] = positions
        return slots

    def free(self, slots: Slots) -> None:
        """Take slots back."""
        for slot in slots.tolist():
            heapq.heappush(self._free, slot)
        self.n_used -= len(slots)

    def wipe(self, slots: Slots) -> None:
        """Put zeros where a failed forward may have left NaN: attention reads what it masks, and 0 * NaN is NaN."""
        with torch.inference_mode():
            for held in self._layers.values():
                for tensor in held:
                    tensor.index_fill_(1, torch.from_numpy(slots).to(tensor.device), 0)

    def positions(self, slots: Slots) -> Slots:
        """Place of each slot's token in its sequence."""
        return self._positions[slots]

    def write(
        self, layer: int, slots: Slots, index: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store one layer's keys and values of new tokens; that layer's whole tensors (kv_heads, capacity, head_dim).

        Args:
            layer: Number of the layer.
            slots: Where, (n,).
            index: The same on the model's device.
            key: (kv_heads, n, key_dim).
            value: (kv_heads, n, value_dim).
        """
        held = self._layers.get(layer)
        if held is None:
            held = self._layers[layer] = self._spare_of(layer, key, value) or (self._new(key), self._new(value))
            self.bytes_per_slot = max(self.bytes_per_slot, sum(map(_bytes_per_slot, self._layers.values())))
        first, n = int(slots[0]), len(slots)
        if int(slots[-1]) - first == n - 1:
            held[0][:, first : first + n] = key
            held[1][:, first : first + n] = value
        else:
            held[0].index_copy_(1, index, key)
            held[1].index_copy_(1, index, value)
        return held

    def read(self, layer: int, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of one layer's keys and values at some slots: (kv_heads, len(index), head_dim) each."""
        keys, values = self._layers[layer]
        return keys.index_select(1, index), values.index_select(1, index)

    def compact(self, capacity: int) -> Slots:
        """Move what lies beyond a smaller capacity into free slots, which must be enough; the new slot of each one.

        Memory comes back with `fit`.
        """
        is_used = np.ones(self._n_touched, np.bool_)
        is_used[np.array(self._free, np.int64)] = False
        old = capacity + np.flatnonzero(is_used[capacity:])
        new = np.flatnonzero(~is_used[:capacity])[: len(old)]
        with torch.inference_mode():
            for held in self._layers.values():
                for tensor in held:
                    moved = tensor.index_select(1, torch.from_numpy(old).to(tensor.device))
                    tensor.index_copy_(1, torch.from_numpy(new).to(tensor.device), moved)
        self._positions[new] = self._positions[old]
        self._positions = self._positions[:capacity].copy()
        new_slots = np.arange(self._n_touched)
        new_slots[old] = new
        is_used[new] = True
        self._free = np.flatnonzero(~is_used[:capacity]).tolist()
        self._n_touched = min(self._n_touched, capacity)
        self._capacity = capacity
        return new_slots

    def fit(self) -> None:
        """Give back the memory beyond the capacity."""
        for layer, held in self._layers.items():
            if held[0].shape[1] > self._capacity:
                self._layers[layer] = _resized(held[0], self._capacity), _resized(held[1], self._capacity)

    @property
    def capacity(self) -> int:
        """Slots there is memory for."""
        return self._capacity

    @property
    def layers(self) -> list[int]:
        """Numbers of the layers that have been written."""
        return sorted(self._layers)

    def _spare_of(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Memory of this layer that holds nothing any more, if it fits: a model may have got another type or device."""
        spare = self._spare.pop(layer, None)
        if spare is None or any(
            (had.dtype, had.device, had.shape) != (new.dtype, new.device, (len(new), self._capacity, new.shape[2]))
            for had, new in zip(spare, (key, value), strict=True)
        ):
            return None
        return spare

    def _new(self, like: torch.Tensor) -> torch.Tensor:
        return like.new_zeros(like.shape[0], self._capacity, like.shape[2])

    def _grow(self, n_needed: int) -> None:
        capacity = self._capacity * 2
        if self.bytes_per_slot:
            capacity = min(capacity, self.budget_bytes // self.bytes_per_slot)
        capacity = max(capacity, n_needed)
        for layer, held in self._layers.items():
            if held[0].shape[1] < capacity:  # a growth that failed half-way has grown some
                self._layers[layer] = _resized(held[0], capacity), _resized(held[1], capacity)
        self._positions = np.concatenate((self._positions, np.zeros(capacity - len(self._positions), np.int64)))
        self._capacity = capacity


class KVCache:
    """The tree and the pool it points into; replaced together when cleared.

    Args:
        budget_bytes: Bound of what is kept between batches.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.tree = PrefixTree()
        self.pool = KVPool(budget_bytes)
        self.tick = 0
        self._n_evicted_before = 0

    @property
    def n_bytes(self) -> int:
        """Bytes of the keys and values held."""
        return self.pool.n_used * self.pool.bytes_per_slot

    @property
    def n_evicted(self) -> int:
        """Tokens evicted, those of the caches this one was emptied from included."""
        return self._n_evicted_before + self.tree.n_evicted

    def emptied(self) -> KVCache:
        """A new one that holds nothing."""
        new = KVCache(self.budget_bytes)
        new.pool = self.pool.emptied()
        new._n_evicted_before = self.n_evicted
        return new

    def n_new(self, context: Context) -> int:
        """Tokens of a context that are to be computed, its last one always; what is held is in use at this tick."""
        ids = context.token_ids
        return len(ids) - self.tree.match(context.adapter, ids, len(ids) - 1, self.tick).length

    def make_room(self, n_new: int) -> None:
        """Forget what is not in use at this tick until `n_new` tokens fit the budget.

        With 0, after the batch, nothing is in use, and memory that it took beyond the budget is given back.
        """
        if self.pool.bytes_per_slot:
            n_over = self.pool.n_used + n_new - self.budget_bytes // self.pool.bytes_per_slot
            if n_over > 0:
                # A little more than needed, so that the tree is not searched at every step.
                n_over += self.pool.n_used // 64
                self.pool.free(self.tree.evict(n_over, self.tick if n_new else self.tick + 1))
            if not n_new:
                self._shrink(max(FIRST_CAPACITY, self.budget_bytes // self.pool.bytes_per_slot))

    def _shrink(self, capacity: int) -> None:
        if self.pool.capacity > capacity:
            self.tree.renumber(self.pool.compact(capacity))
        self.pool.fit()


def _resized(held: torch.Tensor, capacity: int) -> torch.Tensor:
    n = min(capacity, held.shape[1])
    resized = held.new_zeros(held.shape[0], capacity, held.shape[2])
    resized[:, :n] = held[:, :n]
    return resized


def _bytes_per_slot(held: tuple[torch.Tensor, torch.Tensor]) -> int:
    return sum(tensor.shape[0] * tensor.shape[2] * tensor.element_size() for tensor in held)
