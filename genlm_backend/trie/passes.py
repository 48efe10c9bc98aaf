"""Compiled passes over a vocabulary's trie on the CPU: building it, and sums, maxima and log-sums of every node.

Importing this file imports numba (about half a second), so `layout` and `sums` do it when the first trie is built.

Building. Letters are inserted token by token through a hash table keyed by (node, letter), so neither many children
nor long tokens cost more than their letters, and nothing recurses. Nodes are then numbered in post-order, children in
the order in which tokens brought them, which is the numbering of genlm-backend.

Reducing. A node with one child has that child's value. Only leaves and nodes with several children ("forks") hold one
of their own: 72,506 of the 149,591 nodes of SmolLM2's vocabulary. The values are the weights in the order of their
leaves, and then those of the forks, by height and then by number of children, so that loops have the same length many
times in a row; at the end they are spread over all nodes. Half of the time of one row goes into the spreading,
a third into the forks. Four rows at a time share the reading of the indices.
Measured and rejected: weights in the order of the vocabulary, where spreading reads all over (0.18 instead of 0.14 ms,
and three times as long for 32 rows of 150,000 entries); `values[parent] += values[node]` over all nodes in post-order,
where each addition waits for the store just before it; leaves and forks together in post-order (0.155 ms); writing each
value several times in a row instead of reading an index for each node (0.20 ms). Unsigned positions count: with signed
ones, each looked at whether it is negative, the forks take 0.066 instead of 0.047 ms.

Each kernel runs in the calling thread alone and releases the interpreter lock. numba's own `parallel=True` is not used:
some of its threading layers abort when two threads enter at once, or in a forked child.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from genlm_backend.compiled import compiled

Int32s = npt.NDArray[np.int32]
UInt32s = npt.NDArray[np.uint32]  # as indices they need no look at whether they are negative
UInt64s = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float32] | npt.NDArray[np.float64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # Knuth's multiplicative hashing: 2**64 / golden ratio
_NONE, _ONE, _TWO = np.uint64(0), np.uint64(1), np.uint64(2)  # a literal beside an unsigned number makes it a float


@compiled()
def insert_tokens(codes: Int32s, ends: npt.NDArray[np.int64]) -> tuple[Int32s, Int32s, Int32s, Int32s, Int32s]:
    """The trie of a vocabulary, nodes in post-order.

    Args:
        codes: the letters of all tokens, one after another, as numbers >= 0.
        ends: (n_tokens,) where in `codes` each token ends.

    Returns:
        parent: (n_nodes,) int32; -1 for the root, which is last.
        code: (n_nodes,) int32; the letter from the parent to the node, -1 for a leaf and the root.
        leaf: (n_tokens,) int32.
        child_start: (n_nodes + 1,) int32; the children of node n are
        child: (n_nodes - 1,) int32; `child[child_start[n]:child_start[n + 1]]`, ascending.
    """
    most = codes.size + ends.size + 1
    up = np.empty(most, np.int32)
    letter = np.empty(most, np.int32)
    first = np.full(most, -1, np.int32)
    last = np.full(most, -1, np.int32)
    sibling = np.full(most, -1, np.int32)
    leaf = np.empty(ends.size, np.int32)
    table_size, shift = 2, np.uint64(63)
    while table_size < 2 * (codes.size + 1):
        table_size *= 2
        shift -= np.uint64(1)
    keys = np.full(table_size, -1, np.int64)
    nodes = np.empty(table_size, np.int32)
    up[0] = letter[0] = -1
    n_nodes, position = 1, 0
    for i in range(ends.size):
        node = 0
        while position < ends[i]:
            key = (np.int64(node) << np.int64(32)) | np.int64(codes[position])
            slot = np.int64((np.uint64(key) * _GOLDEN) >> shift)
            while keys[slot] != -1 and keys[slot] != key:
                slot = (slot + 1) & (table_size - 1)
            if keys[slot] == -1:
                keys[slot] = key
                nodes[slot] = n_nodes
                letter[n_nodes] = codes[position]
                _append(node, n_nodes, up, first, last, sibling)
                n_nodes += 1
            node = nodes[slot]
            position += 1
        letter[n_nodes] = -1
        _append(node, n_nodes, up, first, last, sibling)
        leaf[i] = n_nodes
        n_nodes += 1
    number = _post_order(up, first, sibling, n_nodes)
    parent = np.empty(n_nodes, np.int32)
    code = np.empty(n_nodes, np.int32)
    for node in range(n_nodes):
        parent[number[node]] = number[up[node]] if node else -1
        code[number[node]] = letter[node]
    for i in range(ends.size):
        leaf[i] = number[leaf[i]]
    child_start, child = _children(parent)
    return parent, code, leaf, child_start, child


@compiled()
def _append(node: int, child: int, up: Int32s, first: Int32s, last: Int32s, sibling: Int32s) -> None:
    """Make `child` the last child of `node`."""
    up[child] = node
    if last[node] >= 0:
        sibling[last[node]] = child
    else:
        first[node] = child
    last[node] = child


@compiled()
def _post_order(up: Int32s, first: Int32s, sibling: Int32s, n_nodes: int) -> Int32s:
    number = np.empty(n_nodes, np.int32)
    node, n = 0, 0
    while True:
        while first[node] >= 0:
            node = first[node]
        number[node] = n
        n += 1
        while node != 0 and sibling[node] < 0:
            node = up[node]
            number[node] = n
            n += 1
        if node == 0:
            return number
        node = sibling[node]


@compiled()
def _children(parent: Int32s) -> tuple[Int32s, Int32s]:
    """Start of each node's children, and the children of all nodes; a parent of -1 or len(parent) is none."""
    n = parent.size
    start = np.zeros(n + 1, np.int32)
    for node in range(n - 1):
        start[parent[node] + 1] += 1
    for node in range(n):
        start[node + 1] += start[node]
    child = np.empty(n - 1, np.int32)
    filled = start.copy()
    for node in range(n - 1):
        child[filled[parent[node]]] = node
        filled[parent[node]] += 1
    return start, child


@compiled()
def count_leaves(parent: Int32s, leaf: Int32s) -> Int32s:
    """How many leaves are at or below each node: (n_nodes,) int32."""
    n_leaves = np.zeros(parent.size, np.int32)
    for i in range(leaf.size):
        n_leaves[leaf[i]] = 1
    for node in range(parent.size - 1):
        n_leaves[parent[node]] += n_leaves[node]
    return n_leaves


@compiled()
def find_nodes(codes: Int32s, ends: npt.NDArray[np.int64], code: Int32s, child_start: Int32s, child: Int32s) -> Int32s:
    """The inner nodes that some prefixes lead to, -1 where no token starts so: (n_prefixes,) int32.

    Args:
        codes, ends: The letters of the prefixes, as for `insert_tokens`; letters that no token has are below -1.
        code, child_start, child: As `insert_tokens` gives them.
    """
    found = np.empty(ends.size, np.int32)
    position = 0
    for i in range(ends.size):
        node = code.size - 1
        while position < ends[i] and node >= 0:
            below = -1
            for k in range(child_start[node], child_start[node + 1]):
                if code[child[k]] == codes[position]:
                    below = child[k]
                    break
            node = below
            position += 1
        position = ends[i]
        found[i] = node
    return found


@compiled()
def find_holders(parent: Int32s, child_start: Int32s) -> tuple[Int32s, Int32s, Int32s, Int32s, Int32s]:
    """The nodes that hold a value of their own: leaves and forks, numbered in post-order; the root's holder is last.

    Returns:
        holder: (n_nodes,) int32; which holder has the value of each node.
        bottom: (n_holders,) int32; the node that holds.
        above: (n_holders,) int32; the next holder towards the root, -1 for the last.
        n_children: (n_holders,) int32; 0 for leaves.
        height: (n_holders,) int32; 1 + that of the highest child, 0 for leaves.
    """
    n_nodes = parent.size
    holder = np.empty(n_nodes, np.int32)
    bottom = np.empty(n_nodes, np.int32)
    n_children = np.empty(n_nodes, np.int32)
    n = 0
    for node in range(n_nodes):
        n_below = child_start[node + 1] - child_start[node]
        if n_below == 1:
            holder[node] = n - 1
        else:
            holder[node] = n
            bottom[n] = node
            n_children[n] = n_below
            n += 1
    above = np.full(n, -1, np.int32)
    for node in range(n_nodes - 1):
        if holder[node] != holder[parent[node]]:
            above[holder[node]] = holder[parent[node]]
    height = np.zeros(n, np.int32)
    for h in range(n - 1):
        height[above[h]] = max(height[above[h]], height[h] + 1)
    return holder, bottom[:n].copy(), above, n_children[:n].copy(), height


@compiled()
def sum_rows(
    rows: Floats,
    value_of_token: UInt32s,
    child: UInt32s,
    group_start: Int32s,
    group_size: UInt64s,
    value_of_node: UInt32s,
    out: Floats,
) -> None:
    """The sum of the weights below each node, in float64, rounded once to the type of `out`.

    Args:
        rows: (n, n_tokens), contiguous.
        value_of_token, child, group_start, group_size, value_of_node: See `layout.Forks`.
        out: (n, n_nodes), written.
    """
    n_tokens, n_values = rows.shape[1], rows.shape[1] + group_start[-1]
    n_fours = rows.shape[0] // 4 * 4
    if n_fours:
        four = np.empty((n_values, 4), np.float64)
        for r in range(0, n_fours, 4):
            _take_four(rows, r, value_of_token, four)
            first = _NONE
            for g in range(group_size.size):
                size = group_size[g]
                for fork in range(n_tokens + group_start[g], n_tokens + group_start[g + 1]):
                    i = child[first]
                    a, b, c, d = four[i, 0], four[i, 1], four[i, 2], four[i, 3]
                    for j in range(first + _ONE, first + size):
                        i = child[j]
                        a += four[i, 0]
                        b += four[i, 1]
                        c += four[i, 2]
                        d += four[i, 3]
                    four[fork, 0], four[fork, 1], four[fork, 2], four[fork, 3] = a, b, c, d
                    first += size
            _spread_four(four, value_of_node, r, out)
    one = np.empty(n_values, np.float64)
    for r in range(n_fours, rows.shape[0]):
        _take(rows[r], value_of_token, one)
        first = _NONE
        for g in range(group_size.size):
            size = group_size[g]
            for fork in range(n_tokens + group_start[g], n_tokens + group_start[g + 1]):
                total = one[child[first]] + one[child[first + _ONE]]
                for j in range(first + _TWO, first + size):
                    total += one[child[j]]
                one[fork] = total
                first += size
        _spread(one, value_of_node, out[r])


@compiled()
def max_rows(
    rows: Floats,
    value_of_token: UInt32s,
    child: UInt32s,
    group_start: Int32s,
    group_size: UInt64s,
    value_of_node: UInt32s,
    out: Floats,
) -> None:
    """The largest weight below each node, NaN if one is; arguments as in `sum_rows`. Exact in the type of the rows."""
    n_tokens, n_values = rows.shape[1], rows.shape[1] + group_start[-1]
    n_fours = rows.shape[0] // 4 * 4
    if n_fours:
        four = np.empty((n_values, 4), rows.dtype)
        for r in range(0, n_fours, 4):
            _take_four(rows, r, value_of_token, four)
            first = _NONE
            for g in range(group_size.size):
                size = group_size[g]
                for fork in range(n_tokens + group_start[g], n_tokens + group_start[g + 1]):
                    i = child[first]
                    a, b, c, d = four[i, 0], four[i, 1], four[i, 2], four[i, 3]
                    for j in range(first + _ONE, first + size):
                        i = child[j]
                        a = _larger(a, four[i, 0])
                        b = _larger(b, four[i, 1])
                        c = _larger(c, four[i, 2])
                        d = _larger(d, four[i, 3])
                    four[fork, 0], four[fork, 1], four[fork, 2], four[fork, 3] = a, b, c, d
                    first += size
            _spread_four(four, value_of_node, r, out)
    one = np.empty(n_values, rows.dtype)
    for r in range(n_fours, rows.shape[0]):
        _take(rows[r], value_of_token, one)
        first = _NONE
        for g in range(group_size.size):
            size = group_size[g]
            for fork in range(n_tokens + group_start[g], n_tokens + group_start[g + 1]):
                top = _larger(one[child[first]], one[child[first + _ONE]])
                for j in range(first + _TWO, first + size):
                    top = _larger(top, one[child[j]])
                one[fork] = top
                first += size
        _spread(one, value_of_node, out[r])


@compiled()
def logsumexp_rows(
    rows: Floats,
    value_of_token: UInt32s,
    child: UInt32s,
    group_start: Int32s,
    group_size: UInt64s,
    value_of_node: UInt32s,
    out: Floats,
) -> None:
    """Log of the sum of exp(weight) below each node; arguments as in `sum_rows`.

    Each fork is scaled by its own largest child, so no node underflows however improbable it is.
    """
    n_tokens = rows.shape[1]
    one = np.empty(n_tokens + group_start[-1], np.float64)
    for r in range(rows.shape[0]):
        _take(rows[r], value_of_token, one)
        first = _NONE
        for g in range(group_size.size):
            size = group_size[g]
            for fork in range(n_tokens + group_start[g], n_tokens + group_start[g + 1]):
                top = one[child[first]]
                for j in range(first + _ONE, first + size):
                    top = _larger(top, one[child[j]])
                if math.isfinite(top):
                    total = 0.0
                    for j in range(first, first + size):
                        total += math.exp(one[child[j]] - top)
                    top += math.log(total)
                one[fork] = top
                first += size
        _spread(one, value_of_node, out[r])


@compiled()
def sum_segments(rows: Floats, token: Int32s, lengths: npt.NDArray[np.int64], out: npt.NDArray[np.float64]) -> None:
    """The sum of the weights of each group of tokens, in float64.

    Args:
        rows: (n, n_tokens), contiguous.
        token, lengths: See `sums.Segments`.
        out: (n, n_segments), written.
    """
    for r in range(rows.shape[0]):
        first = 0
        for s in range(lengths.size):
            total = 0.0
            for k in range(first, first + lengths[s]):
                total += rows[r, token[k]]
            out[r, s] = total
            first += lengths[s]


@compiled()
def max_segments(rows: Floats, token: Int32s, lengths: npt.NDArray[np.int64], out: npt.NDArray[np.float64]) -> None:
    """The largest weight of each group of tokens, NaN if one is, -inf of none; arguments as in `sum_segments`."""
    for r in range(rows.shape[0]):
        first = 0
        for s in range(lengths.size):
            top = -math.inf
            for k in range(first, first + lengths[s]):
                top = _larger(top, rows[r, token[k]])
            out[r, s] = top
            first += lengths[s]


@compiled()
def _larger(a: float, b: float) -> float:
    return b if (b > a) | (b != b) else a


@compiled()
def _take(row: Floats, value_of_token: UInt32s, values: Floats) -> None:
    for i in range(row.size):
        values[value_of_token[i]] = row[i]


@compiled()
def _take_four(rows: Floats, r: int, value_of_token: UInt32s, values: Floats) -> None:
    for i in range(rows.shape[1]):
        v = value_of_token[i]
        values[v, 0] = rows[r, i]
        values[v, 1] = rows[r + 1, i]
        values[v, 2] = rows[r + 2, i]
        values[v, 3] = rows[r + 3, i]


@compiled()
def _spread(values: Floats, value_of_node: UInt32s, out: Floats) -> None:
    for node in range(value_of_node.size):
        out[node] = values[value_of_node[node]]


@compiled()
def _spread_four(values: Floats, value_of_node: UInt32s, r: int, out: Floats) -> None:
    for node in range(value_of_node.size):
        i = value_of_node[node]
        out[r, node] = values[i, 0]
        out[r + 1, node] = values[i, 1]
        out[r + 2, node] = values[i, 2]
        out[r + 3, node] = values[i, 3]
