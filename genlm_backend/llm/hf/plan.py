"""What one batch has to compute: every new token once, parents before children. Pure; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from genlm_backend.cache.prefix_tree import PrefixTree, Slots
from genlm_backend.llm.service import Context

ANCHORED = -1


class Plan(NamedTuple):
    """New tokens of a batch, in an order in which parents come first. All lists but the last two have one entry each.

    Attributes:
        tokens: Token ids.
        positions: Place of each in its sequence.
        parents: Index of the token before it in this plan, or `ANCHORED` if that one is known already.
        anchors: For anchored tokens the context whose known prefix it continues; else `ANCHORED`.
        known: For each context the slots of its known prefix, one array per node of the tree.
        n_known: For each context the length of its known prefix.
        targets: For each context the index of its last token.
    """

    tokens: list[int]
    positions: list[int]
    parents: list[int]
    anchors: list[int]
    known: list[list[Slots]]
    n_known: list[int]
    targets: list[int]


def make_plan(tree: PrefixTree, contexts: Sequence[Context], max_new: int, tick: int) -> Plan:
    """The plan for as many of the first contexts as have at most `max_new` new tokens together, at least one context.

    The last token of a context is always new, since its row is what is asked.
    """
    plan = Plan([], [], [], [], [], [], [])
    children: dict[tuple[object, int], int] = {}
    for number, context in enumerate(contexts):
        ids = context.token_ids
        match = tree.match(context.adapter, ids, len(ids) - 1, tick)
        if number and len(plan.tokens) + len(ids) - match.length > max_new:
            break
        # Where a known prefix ends is named by its last slot: equal prefixes end in the same one.
        place: object = (context.adapter, int(match.parts[-1][-1]) if match.parts else None)
        parent = ANCHORED
        for position in range(match.length, len(ids)):
            token = ids[position]
            at = children.get((place, token))
            if at is None:
                at = children[place, token] = len(plan.tokens)
                plan.tokens.append(token)
                plan.positions.append(position)
                plan.parents.append(parent)
                plan.anchors.append(number if parent == ANCHORED else ANCHORED)
            place = parent = at
        plan.known.append(match.parts)
        plan.n_known.append(match.length)
        plan.targets.append(parent)
    return plan


class View(NamedTuple):
    """Which slots a run of new tokens sees.

    Attributes:
        slots: (columns,) slots, in increasing order, that any of them sees.
        visible: (tokens, columns) bool.
    """

    slots: Slots
    visible: npt.NDArray[np.bool_]


def make_view(plan: Plan, slots: Slots, start: int, end: int) -> View:
    """What the new tokens `start` to `end` of a plan see: their ancestors and themselves.

    Args:
        plan: The plan.
        slots: A slot for each token of the plan.
        start: First token.
        end: One past the last.
    """
    seen_by_row = {
        row: _ancestor_slots(plan, slots, start + row)
        for row in range(end - start)
        if plan.parents[start + row] < start
    }
    own = slots[start:end]
    everything = np.concatenate([own, *(part for parts in seen_by_row.values() for part in parts)])
    low, high = int(everything.min()), int(everything.max()) + 1
    is_used = np.zeros(high - low, np.bool_)
    is_used[everything - low] = True
    columns = np.flatnonzero(is_used)
    column_of = np.empty(high - low, np.int64)
    column_of[columns] = np.arange(len(columns))
    own_columns = column_of[own - low]
    visible = np.zeros((end - start, len(columns)), np.bool_)
    for row in range(end - start):
        parts = seen_by_row.get(row)
        if parts is None:
            visible[row] = visible[plan.parents[start + row] - start]
        else:
            for part in parts:
                visible[row, column_of[part - low]] = True
        visible[row, own_columns[row]] = True
    return View(columns + low, visible)


def _ancestor_slots(plan: Plan, slots: Slots, token: int) -> list[Slots]:
    """Slots of all ancestors of a new token, as a few arrays."""
    new = []
    while plan.parents[token] != ANCHORED:
        token = plan.parents[token]
        new.append(token)
    parts = plan.known[plan.anchors[token]]
    return [*parts, slots[np.array(new, np.int64)]] if new else parts
