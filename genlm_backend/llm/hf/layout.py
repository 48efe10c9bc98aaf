"""How the queries of one forward are dealt into groups, so that each group reads few columns, or into lists.

Pure; no torch.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from genlm_backend.cache.prefix_tree import Slots
from genlm_backend.llm.hf.plan import View

# Measured on two cores with bfloat16, 9 heads of 64 (docs/decisions.md): one query against one column costs as much as
# copying 0.8 columns, and each group as much as copying 400. Only the ratios matter.
COPY_COST = 1.25
GROUP_COST = 500.0
GROUP_SIZES = (4, 8, 16)
MOST_LISTED = 128  # queries; with more, as in prompts, products are wide and cost less than that


class Layout(NamedTuple):
    """Queries and columns of one forward.

    Attributes:
        columns: (groups, columns) slots, or None when one group reads a slice of the pool.
        first: Start of that slice.
        visible: (groups, queries, columns) bool; a padding query sees the first column.
    """

    columns: Slots | None
    first: int
    visible: npt.NDArray[np.bool_]


class Lists(NamedTuple):
    """What each query sees, one query after the other.

    Attributes:
        starts: (queries + 1,) int64; those of query i are from its start to before the next one's.
        slots: (total,) int64.
    """

    starts: npt.NDArray[np.int64]
    slots: Slots

    def only(self, is_kept: npt.NDArray[np.bool_]) -> Lists:
        """Without some of the slots; `is_kept` is (total,)."""
        n_kept = np.concatenate(([0], np.cumsum(is_kept)))
        return Lists(n_kept[self.starts], self.slots[is_kept])

    def query_of_slot(self) -> npt.NDArray[np.int64]:
        """(total,): the query of each."""
        return np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))


def make_layout(view: View, list_cost: float = math.inf) -> Layout | Lists:
    """The cheapest of: a slice of the pool, one group of gathered columns, groups of a few queries, lists.

    Args:
        view: Who sees what.
        list_cost: Of one query against one slot of its list, in the units of this file.
    """
    n_queries, n_columns = view.visible.shape
    low, high = int(view.slots[0]), int(view.slots[-1]) + 1
    n_span = high - low
    costs = {1: n_queries * n_columns + COPY_COST * n_columns + GROUP_COST, 0: n_queries * n_span + GROUP_COST}
    if n_queries > GROUP_SIZES[0] and n_columns > 2 * n_queries:
        for size in GROUP_SIZES:
            needed = _in_groups(view.visible, size).any(1).sum(1)
            n_most = int(needed.max())
            costs[size] = len(needed) * (n_most * (size + COPY_COST) + GROUP_COST)
    best = min(costs, key=lambda size: costs[size])
    if n_queries <= MOST_LISTED and list_cost * np.count_nonzero(view.visible) < costs[best]:
        return _lists(view)
    if best == 0:
        visible = np.zeros((1, n_queries, n_span), np.bool_)
        visible[0, :, view.slots - low] = view.visible.T
        return Layout(None, low, visible)
    if best == 1:
        return Layout(view.slots[None], 0, view.visible[None])
    return _grouped(view, best)


def _lists(view: View) -> Lists:
    queries, columns = view.visible.nonzero()
    return Lists(np.searchsorted(queries, np.arange(len(view.visible) + 1)), view.slots[columns])


def _grouped(view: View, size: int) -> Layout:
    dealt = _in_groups(view.visible, size)
    used: npt.NDArray[np.bool_] = np.any(dealt, axis=1)
    n_most = int(used.sum(1).max())
    columns = np.full((len(dealt), n_most), view.slots[0], np.int64)
    visible = np.zeros((len(dealt), size, n_most), np.bool_)
    for group, is_used in enumerate(used):
        at = np.flatnonzero(is_used)
        columns[group, : len(at)] = view.slots[at]
        visible[group, :, : len(at)] = dealt[group][:, at]
    n_padding = len(dealt) * size - len(view.visible)
    if n_padding:
        visible[-1, size - n_padding :, 0] = True
    return Layout(columns, 0, visible)


def _in_groups(visible: npt.NDArray[np.bool_], size: int) -> npt.NDArray[np.bool_]:
    """(queries, columns) -> (groups, size, columns), padded with rows that see nothing."""
    n_queries, n_columns = visible.shape
    n_groups = -(-n_queries // size)
    if n_groups * size == n_queries:
        return visible.reshape(n_groups, size, n_columns)
    padded = np.zeros((n_groups * size, n_columns), np.bool_)
    padded[:n_queries] = visible
    return padded.reshape(n_groups, size, n_columns)
