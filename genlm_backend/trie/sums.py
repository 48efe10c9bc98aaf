"""Sums, maxima and log-sums of token weights over the nodes of a trie: compiled on the CPU, by tensors on any device.

On a device (`DeviceSums`). Two ways were measured on CPU tensors, SmolLM2's vocabulary, float32, two threads:

- The product with the sparse matrix of forks x tokens (284,807 entries): 24 ms for one row, 31 to 51 ms for 32. It adds
  one by one, so its error grows with the number of tokens (9e-5 relative here), and it has no counterpart for maxima
  and log-sums.
- Hierarchical segment sums: 8 ms for one row, 39 to 51 ms for 32; 2.5e-7 relative. The leaves in the order of the trie
  are the lowest level of a binary tree of blocks. The leaves below a node are one run of them, so they are at most
  2 log2(n_tokens) blocks, which are combined.

The second is kept. Its cost depends neither on the depth of the trie nor on the length of its tokens, one algorithm
serves the three operations, and every number is written once, without atomic additions, so results repeat bit by bit.

On the CPU (`CompiledSums`) the compiled passes take 0.14 ms for one row and 8 ms for 32, float64 results included.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol, get_args

import numpy as np
import numpy.typing as npt
import torch

from genlm_backend.errors import WeightsMismatch
from genlm_backend.trie.layout import Layout

Reduction = Literal["sum", "max", "logsumexp"]
Rows = npt.NDArray[np.float32] | npt.NDArray[np.float64]
Weights = Any
"""Numbers, one per token: (nested) sequences, numpy arrays or tensors of any real type, on any device."""

_FLOATS = (torch.float32, torch.float64)
_SMALL_BYTES = 2**22  # below, the allocator keeps what is freed
_KEPT_BYTES = 2**28  # 32 rows of 900,000 nodes in float64 are 230 MB


class NodeSums(Protocol):
    """What computes over a trie. Its rows stay where it wants them."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    def rows(self, weights: Weights, n_dimensions: int, copy: bool = False) -> Any:
        """Weights as (n, n_tokens) rows where it computes; with `copy`, later changes do not reach them."""

    def reduce(self, rows: Any, reduction: Reduction) -> Any:
        """(n, n_nodes)."""

    def reduce_apart(self, blocks: Sequence[Any], reduction: Reduction) -> list[Any]:
        """`reduce` of each block of rows; no two results share memory."""

    def reduce_segments(self, rows: Any, segments: Segments, reduction: Reduction) -> Any:
        """(n, n_segments)."""

    def reduce_segments_apart(
        self, blocks: Sequence[Any], segments: Sequence[Segments], reduction: Reduction
    ) -> list[Any]:
        """`reduce_segments` of each block of rows, each with segments of its own; no two results share memory."""


class Segments(NamedTuple):
    """Groups of tokens; a group may be empty, and groups may share tokens.

    Attributes:
        token: (k,) int32 or int64; the tokens of the first group, then those of the second, and so on.
        lengths: (n_segments,) int64.
    """

    token: npt.NDArray[np.int32] | npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]


class CompiledSums:
    """On the CPU, in the thread that asks, without holding the interpreter. Rows and results are numpy arrays.

    Args:
        layout: The trie.
        dtype: Of the results; None is that of the weights. Sums are accumulated in float64 in any case.
    """

    device = torch.device("cpu")

    def __init__(self, layout: Layout, dtype: type[np.float64] | None) -> None:
        self._layout = layout
        self._dtype = dtype
        self._memory = _Memory()

    def __reduce__(self) -> tuple[Any, ...]:
        return CompiledSums, (self._layout, self._dtype)

    def rows(self, weights: Weights, n_dimensions: int, copy: bool = False) -> Rows:
        """(n, n_tokens) float32 or float64, contiguous."""
        checked = checked_rows(weights, self._layout.n_tokens, n_dimensions)
        array = checked.cpu().contiguous().numpy() if isinstance(checked, torch.Tensor) else checked
        if copy:
            return array.copy()
        return np.require(array, requirements=["C", "W"])  # compiled for these; others are copied

    def reduce(self, rows: Rows, reduction: Reduction) -> Rows:
        """(n, n_nodes)."""
        from genlm_backend.trie import passes

        out = self._memory.empty((len(rows), self._layout.n_nodes), np.dtype(self._dtype or rows.dtype))
        if not self._layout.n_tokens:
            out.fill(_IDENTITY[reduction])
            return out
        forks = self._layout.forks
        kernel = getattr(passes, f"{reduction}_rows")
        kernel(rows, *forks[1:], out)
        return out

    def reduce_apart(self, blocks: Sequence[Rows], reduction: Reduction) -> list[Rows]:
        """`reduce` of each block of rows; no two results share memory."""
        return [self.reduce(rows, reduction) for rows in blocks]

    def reduce_segments(self, rows: Rows, segments: Segments, reduction: Reduction) -> Rows:
        """(n, n_segments) float64."""
        if reduction == "logsumexp":
            return reduce_array_segments(rows, segments, reduction)
        from genlm_backend.trie import passes

        out = np.empty((len(rows), len(segments.lengths)))
        kernel = passes.sum_segments if reduction == "sum" else passes.max_segments
        kernel(rows, np.require(segments.token, np.int32), segments.lengths, out)
        return out

    def reduce_segments_apart(
        self, blocks: Sequence[Rows], segments: Sequence[Segments], reduction: Reduction
    ) -> list[Rows]:
        """`reduce_segments` of each block of rows, each with segments of its own; no two results share memory."""
        return [self.reduce_segments(rows, of_rows, reduction) for rows, of_rows in zip(blocks, segments, strict=True)]


class _Memory:
    """Memory for large results. That of the last two whose last view is gone serves the next of their size.

    Fresh memory costs as much as computing: 32 rows of 150,000 entries take 0.13 s in it and 0.07 s in memory that was
    used before. The system takes large blocks back as soon as they are freed, so two are kept here: with one, rows
    asked for alone take it from the batches between them, and 32 rows then take 70 to 79 ms instead of 36 to 58.
    """

    def __init__(self) -> None:
        self._free: deque[npt.NDArray[np.uint8]] = deque(maxlen=2)

    def empty(self, shape: tuple[int, int], dtype: np.dtype[Any]) -> Rows:
        """An array with anything in it."""
        n_bytes = shape[0] * shape[1] * dtype.itemsize
        if not _SMALL_BYTES <= n_bytes <= _KEPT_BYTES:
            return np.empty(shape, dtype)
        block = self._take(n_bytes)
        # Behind a memoryview, so that every view of the result refers to it and none to the block.
        flat = np.frombuffer(block.data[:n_bytes], dtype)
        weakref.finalize(flat, self._free.append, block).atexit = False
        return flat.reshape(shape)

    def _take(self, n_bytes: int) -> npt.NDArray[np.uint8]:
        for _ in range(len(self._free)):
            try:
                block = self._free.popleft()
            except IndexError:  # another thread took it
                break
            if n_bytes <= block.size <= 2 * n_bytes:
                return block
            self._free.append(block)
        return np.empty(n_bytes, np.uint8)


class DeviceSums:
    """By tensors, on any device, including the CPU. Rows and results are tensors there.

    float64 weights are reduced in float64 where the device has it, all others in float32.

    Args:
        layout: The trie.
        device: Where to compute.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self._layout = layout
        self.device = device

    def rows(self, weights: Weights, n_dimensions: int, copy: bool = False) -> torch.Tensor:
        """(n, n_tokens) float32 or float64, on the device."""
        checked = checked_rows(weights, self._layout.n_tokens, n_dimensions)
        tensor = _as_tensor(checked)
        moved = tensor.to(self.device, torch.float32 if self.device.type == "mps" else tensor.dtype)
        is_shared = isinstance(weights, torch.Tensor | np.ndarray) and moved.data_ptr() == tensor.data_ptr()
        return moved.clone() if copy and is_shared else moved

    def reduce(self, rows: torch.Tensor, reduction: Reduction) -> torch.Tensor:
        """(n, n_nodes), in the type of the rows."""
        if not self._layout.n_tokens:
            return rows.new_full((len(rows), self._layout.n_nodes), _IDENTITY[reduction])
        combine = _COMBINE[reduction]
        blocks = self._blocks
        values = rows.new_empty((len(rows), blocks.n_blocks + blocks.n_forks))
        values[:, : self._layout.n_tokens] = rows.index_select(1, blocks.token)
        start, length = 0, self._layout.n_tokens
        while length > 1:
            pairs = length // 2 * 2
            lower = values[:, start : start + pairs]
            start, length = start + length, pairs // 2
            values[:, start : start + length] = combine(lower[:, 0::2], lower[:, 1::2])
        forks = values[:, blocks.n_blocks :]
        for i, blocks_of_forks in enumerate(blocks.of_forks):
            some = forks[:, : len(blocks_of_forks)]
            part = values.index_select(1, blocks_of_forks)
            some.copy_(combine(some, part) if i else part)
        return values.index_select(1, blocks.of_node)

    def reduce_apart(self, blocks: Sequence[torch.Tensor], reduction: Reduction) -> list[torch.Tensor]:
        """`reduce` of each block of rows, computed at once for those of one type; no two results share memory."""
        results: list[torch.Tensor] = [torch.empty(0)] * len(blocks)
        for dtype in _FLOATS:
            chosen = [i for i, rows in enumerate(blocks) if rows.dtype == dtype]
            if chosen:
                reduced = self.reduce(torch.cat([blocks[i] for i in chosen]), reduction)
                parts = reduced.split([len(blocks[i]) for i in chosen])
                for i, part in zip(chosen, parts, strict=True):
                    results[i] = part.clone() if len(chosen) > 1 else part
        return results

    def reduce_segments(self, rows: torch.Tensor, segments: Segments, reduction: Reduction) -> torch.Tensor:
        """(n, n_segments), in the type of the rows."""
        return reduce_tensor_segments(rows, segments, reduction)

    def reduce_segments_apart(
        self, blocks: Sequence[torch.Tensor], segments: Sequence[Segments], reduction: Reduction
    ) -> list[torch.Tensor]:
        """`reduce_segments` of each block of rows, computed at once for those of one type; no two share memory."""
        results: list[torch.Tensor] = [torch.empty(0)] * len(blocks)
        for dtype in _FLOATS:
            chosen = [i for i, rows in enumerate(blocks) if rows.dtype == dtype]
            if chosen:
                one_row = torch.cat([blocks[i].reshape(-1) for i in chosen])[None]
                per_row = [segments[i] for i in chosen for _ in range(len(blocks[i]))]
                reduced = reduce_tensor_segments(one_row, _in_one_row(per_row, self._layout.n_tokens), reduction)[0]
                shapes = [(len(blocks[i]), len(segments[i].lengths)) for i in chosen]
                parts = reduced.split([n_rows * n_segments for n_rows, n_segments in shapes])
                for i, part, shape in zip(chosen, parts, shapes, strict=True):
                    results[i] = part.reshape(shape).clone()
        return results

    @cached_property
    def _blocks(self) -> _Blocks:
        return _find_blocks(self._layout, self.device)


class _Blocks(NamedTuple):
    """Runs of 2**k leaves, level after level, and of which of them the leaves of each fork consist.

    Attributes:
        token: (n_tokens,) the token of each leaf, in the order of the trie.
        n_blocks: Of all levels; level 0 are the leaves, and an odd block at the end of a level has none above it.
        n_forks: Nodes with several children.
        of_forks: The first block of every fork, the second block of every fork that has two, and so on; forks with more
            blocks come first.
        of_node: (n_nodes,) where the value of each node is, among blocks and then forks.
    """

    token: torch.Tensor
    n_blocks: int
    n_forks: int
    of_forks: list[torch.Tensor]
    of_node: torch.Tensor


def _find_blocks(layout: Layout, device: torch.device) -> _Blocks:
    forks = layout.forks
    starts, ends = (positions[forks.node].astype(np.int64) for positions in layout.leaf_range)
    found: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = []  # forks, and a block of each
    first_of_level, length = 0, layout.n_tokens
    while length:
        for edge, step in ((starts, 1), (ends, -1)):  # an odd edge: its block belongs to no block above within the run
            is_odd = np.flatnonzero((edge % 2 == 1) & (starts < ends))
            found.append((is_odd, first_of_level + edge[is_odd] - (step < 0)))
            edge[is_odd] += step
        starts, ends = starts // 2, ends // 2
        first_of_level, length = first_of_level + length, length // 2
    fork = np.concatenate([forks_of_level for forks_of_level, _ in found])
    block = np.concatenate([blocks_of_level for _, blocks_of_level in found])
    n_of_fork = np.bincount(fork, minlength=len(forks.node))
    by_number = np.argsort(-n_of_fork, kind="stable")
    rank_of_fork = np.empty_like(by_number)
    rank_of_fork[by_number] = np.arange(len(by_number))
    order = np.argsort(fork, kind="stable")
    nth = np.empty(len(fork), np.int64)  # the how manieth block of its fork each is
    nth[order] = np.arange(len(fork)) - np.repeat(np.cumsum(n_of_fork) - n_of_fork, n_of_fork)
    order = np.lexsort((rank_of_fork[fork], nth))
    rounds = np.split(block[order], np.cumsum(np.bincount(nth))[:-1]) if len(fork) else []
    place = np.append(np.arange(layout.n_tokens), first_of_level + rank_of_fork)

    def on_device(array: npt.NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(device)

    return _Blocks(
        on_device(layout.token_of_leaf_position),
        first_of_level,
        len(forks.node),
        [on_device(blocks) for blocks in rounds],
        on_device(place[forks.value_of_node]),
    )


# ---- a few nodes, without the rest of the trie


def _in_one_row(segments_of_rows: Sequence[Segments], n_tokens: int) -> Segments:
    """The segments of several rows, as segments of the row that has these rows one after another."""
    tokens = [of_row.token + np.int64(r * n_tokens) for r, of_row in enumerate(segments_of_rows)]
    lengths = [of_row.lengths for of_row in segments_of_rows]
    none = np.empty(0, np.int64)
    return Segments(np.concatenate([none, *tokens]), np.concatenate([none, *lengths]))


def reduce_array_segments(rows: Rows, segments: Segments, reduction: Reduction) -> npt.NDArray[np.float64]:
    """Each group of tokens reduced in float64: (n, n_segments); -inf or 0 for an empty one."""
    out = np.full((len(rows), len(segments.lengths)), _IDENTITY[reduction])
    is_filled = segments.lengths > 0
    lengths = segments.lengths[is_filled]
    if not len(lengths):
        return out
    starts = np.cumsum(lengths) - lengths
    weights = rows[:, segments.token].astype(np.float64)
    if reduction == "sum":
        out[:, is_filled] = np.add.reduceat(weights, starts, axis=1)
        return out
    top = np.maximum.reduceat(weights, starts, axis=1)
    if reduction == "logsumexp":
        scale = np.where(np.isfinite(top), top, 0.0)
        with np.errstate(over="ignore", divide="ignore"):  # an infinite weight makes an infinite sum
            total = np.add.reduceat(np.exp(weights - np.repeat(scale, lengths, axis=1)), starts, axis=1)
            top = np.log(total) + scale
    out[:, is_filled] = top
    return out


def reduce_tensor_segments(rows: torch.Tensor, segments: Segments, reduction: Reduction) -> torch.Tensor:
    """Each group of tokens reduced: (n, n_segments) where the rows are and in their type; -inf or 0 for an empty one.

    Sums are accumulated in float64 where the device has it.
    """
    device = rows.device
    wide = torch.float32 if device.type == "mps" else torch.float64
    lengths = torch.from_numpy(segments.lengths).to(device)
    group = torch.repeat_interleave(lengths, output_size=len(segments.token))
    weights = rows.index_select(1, torch.from_numpy(segments.token).to(device))
    shape = (len(rows), len(segments.lengths))
    if reduction == "sum":
        return torch.zeros(shape, dtype=wide, device=device).index_add_(1, group, weights.to(wide)).to(rows.dtype)
    top = weights.new_full(shape, -torch.inf)
    top.scatter_reduce_(1, group.expand(len(rows), -1), weights, "amax")
    if reduction == "logsumexp":
        scale = torch.where(top.isfinite(), top, 0.0).to(wide)
        scaled = (weights.to(wide) - scale.index_select(1, group)).exp_()
        total = torch.zeros(shape, dtype=wide, device=device).index_add_(1, group, scaled)
        top = total.log_().add_(scale).to(rows.dtype)
    return top


# ---- weights as they come


def checked_reduction(reduction: str) -> Reduction:
    """The name of a reduction.

    Raises:
        ValueError: There is no such.
    """
    for known in get_args(Reduction):
        if reduction == known:
            return known  # type: ignore[no-any-return]
    raise ValueError(f"Unknown reduction: {reduction!r}; expected one of {', '.join(get_args(Reduction))}")


def checked_rows(weights: Weights, n_tokens: int, n_dimensions: int) -> torch.Tensor | Rows:
    """Weights as (n, n_tokens) rows, float32 or float64, where they are; not copied unless they must be converted.

    Raises:
        WeightsMismatch: They are no real numbers, or not of this shape.
    """
    plain = plain_weights(weights)
    shape = tuple(plain.shape)
    if n_dimensions == 1 and shape == (n_tokens,):
        return plain[None]
    if n_dimensions == 2 and len(shape) == 2 and shape[1] == n_tokens:
        return plain
    if n_dimensions == 2 and shape == (0,):
        return plain.reshape(0, n_tokens) if not n_tokens else np.empty((0, n_tokens))
    expected = (
        f"({n_tokens},), one for each token" if n_dimensions == 1 else f"(batch, {n_tokens}), one row for each batch"
    )
    raise WeightsMismatch(f"weights of shape {shape}", expected)


def plain_weights(weights: Weights) -> torch.Tensor | Rows:
    """Weights as a float32 or float64 tensor, if they are tensors, else as an array of any shape.

    float16 and bfloat16 become float32, which holds them exactly; integers and everything else become float64.

    Raises:
        WeightsMismatch: They are no real numbers, or nested lists of different lengths.
    """
    if isinstance(weights, list | tuple) and any(isinstance(row, torch.Tensor) for row in weights):
        return _stacked([plain_weights(row) for row in weights])
    if isinstance(weights, torch.Tensor):
        if weights.is_complex() or weights.layout != torch.strided:
            raise WeightsMismatch(
                f"weights as a {weights.layout} tensor of {weights.dtype}", "a dense one of real numbers"
            )
        tensor = weights.detach().resolve_neg()
        if tensor.dtype in _FLOATS:
            return tensor
        return tensor.float() if tensor.is_floating_point() or tensor.device.type == "mps" else tensor.double()
    try:
        array = np.asarray(weights)
    except ValueError as error:
        raise WeightsMismatch(f"weights that are no array ({error})", "rows of one length") from error
    if array.dtype.kind not in "fiub":
        raise WeightsMismatch(f"weights of type {array.dtype}", "real numbers")
    if array.dtype in (np.float16, np.float32):
        return array.astype(np.float32, copy=False)
    return array.astype(np.float64, copy=False)


def _stacked(rows: list[torch.Tensor | Rows]) -> torch.Tensor:
    shapes = sorted({tuple(row.shape) for row in rows})
    if len(shapes) > 1:
        raise WeightsMismatch(f"rows of shapes {', '.join(map(str, shapes))}", "rows of one shape")
    tensors = [_as_tensor(row) for row in rows]
    widest = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    return torch.stack([tensor.to(tensors[0].device, widest) for tensor in tensors])


def _as_tensor(rows: torch.Tensor | Rows) -> torch.Tensor:
    if isinstance(rows, torch.Tensor):
        return rows
    if not rows.flags.carray or min(rows.strides, default=0) < 0:  # torch has no such strides, and warns of read-only
        rows = rows.copy()
    return torch.from_numpy(rows)


_IDENTITY: dict[Reduction, float] = {"sum": 0.0, "max": -np.inf, "logsumexp": -np.inf}
_COMBINE: dict[Reduction, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "sum": torch.add,
    "max": torch.maximum,
    "logsumexp": torch.logaddexp,
}
