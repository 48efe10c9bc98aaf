"""Overlay: the probability that was removed below each prefix, as an immutable tree private to its walks.

A node says which share of the probability of its prefix is left, `alive`, between 0 and 1. A prefix without a node
has all of it. Drawing the next token of prefix u from

    q(v | u) alive(u v) keep(u) / alive(u)        alive(u) = keep(u) . sum over v of q(v | u) alive(u v)

gives texts with the law of q conditioned on none of the removed prefixes, where a penalty leaves the share `keep` of
those below its prefix; without one, `keep` is 1. Removing a prefix is therefore a change of `alive` along its path: a
few numbers, no model. Every change makes new nodes along the path and shares the others, so a walk that began with an
older root is not disturbed by what others remove meanwhile.

Source: adaptive sampling with approximate expected futures, Park et al. 2024 (arXiv 2405.21047), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

GONE = 1e-12  # less alive than this is a rounding error of sums in float64


class Node(NamedTuple):
    """What is left of a prefix.

    Attributes:
        alive: The share of its probability that is left.
        children: token id -> node, where something was removed below.
        gone: (vocab,) bool, tokens of which nothing is left besides those in `children`; None if there are none.
        keep: The share that a penalty of this prefix itself leaves, a factor of `alive`; 1 if it has none.
    """

    alive: float
    children: dict[int, Node]
    gone: npt.NDArray[np.bool_] | None = None
    keep: float = 1.0

    def child(self, token_id: int) -> Node:
        """The node of the prefix with one more token."""
        if self.gone is not None and self.gone[token_id]:
            return NOTHING
        return self.children.get(token_id, WHOLE)

    @property
    def is_whole(self) -> bool:
        """Whether nothing was removed from its children."""
        return not self.children and self.gone is None

    @property
    def settled(self) -> bool:
        """Whether this prefix was met before and its penalty is part of `alive`."""
        return self.keep < 1


WHOLE = Node(1.0, {})
NOTHING = Node(0.0, {})


class Overlay:
    """What walks of one prompt have removed, to be shared by them: each makes the later ones cheaper.

    Only for mode `exact`, and for walks with the same model, prompt, rules, temperature, filters, `max_new_tokens`,
    `stop` and `eos`: what is wrong where a text ends is removed as well. A walk reads it when it is made and after each
    objection, and works on the tree that it read, so concurrent walks stay exact.
    """

    def __init__(self) -> None:
        self.root = WHOLE

    @property
    def alive(self) -> float:
        """The share of the model's texts that is left: at the end of many walks, an upper bound of the mass of C."""
        return self.root.alive


class Siblings(NamedTuple):
    """Tokens to remove besides the last one of a path.

    Attributes:
        mask: (vocab,) bool.
        token_ids: Of the entries of `q`; None if they are all tokens in order.
        q: Probabilities given the prefix.
    """

    mask: npt.NDArray[np.bool_]
    token_ids: npt.NDArray[np.int64] | None
    q: npt.NDArray[np.floating[Any]]


def at(root: Node, path: Sequence[int]) -> Node:
    """The node of a prefix."""
    node = root
    for token_id in path:
        node = node.child(token_id)
        if node is WHOLE or node is NOTHING:
            return node
    return node


def removed(
    root: Node,
    path: Sequence[int],
    probabilities: Sequence[float],
    keep: float = 0.0,
    siblings: Siblings | None = None,
) -> Node:
    """The tree in which a prefix has only the share `keep` of what it had; done twice it gives the same.

    Args:
        root: Not changed.
        path: The tokens of the prefix below the root, at least one.
        probabilities: Of each token given those before, under what is drawn from. 0 for a token that was not drawn but
            written: then nothing is removed above it.
        keep: 0 bans the prefix; more is a penalty, of which a prefix has one only.
        siblings: Also removed.
    """
    nodes = [root]
    for token_id in path:
        nodes.append(nodes[-1].child(token_id))
    old = nodes[-1]
    if keep > 0 and old.settled:
        return root
    new = old._replace(alive=old.alive * keep, keep=keep) if keep > 0 else NOTHING
    for depth in range(len(path) - 1, -1, -1):
        parent, token_id = nodes[depth], path[depth]
        lost = probabilities[depth] * (old.alive - new.alive)
        gone = parent.gone
        if depth == len(path) - 1 and siblings is not None:
            lost += _mass(parent, siblings, token_id)
            gone = siblings.mask if gone is None else gone | siblings.mask
        alive = parent.alive - parent.keep * lost
        children = parent.children | {token_id: new}
        old, new = parent, Node(alive if alive > GONE else 0.0, children, gone, parent.keep)
    return new


def _mass(node: Node, siblings: Siblings, token_id: int) -> float:
    """What is left of the siblings of a token, given the prefix of all of them."""
    chosen = siblings.mask.copy()
    chosen[token_id] = False
    if node.gone is not None:
        chosen &= ~node.gone
    token_ids, q = siblings.token_ids, siblings.q
    total = float(q[chosen if token_ids is None else chosen[token_ids]].sum())
    for child_id, child in node.children.items():
        if chosen[child_id]:
            where = child_id if token_ids is None else np.flatnonzero(token_ids == child_id)
            total -= float(np.sum(q[where])) * (1.0 - child.alive)
    return total
