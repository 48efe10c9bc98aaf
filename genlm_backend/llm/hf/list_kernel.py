"""Compiled attention of single queries on a CPU: each reads the slots of its own ancestors where they lie in the pool.

torch copies what a group of queries reads and multiplies all of the group with all of it. Where each query has its own
tail, most of that is copied once and masked away; here nothing is copied and nothing masked. Sums are float32 for every
type, and a query's result depends on nothing but its own slots.

Importing this file imports numba. Inner loops run over unsigned indices: see the top of `race`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import carray

from genlm_backend.bits import LOG2_E, count_up, pointer, power_of_2, prefetch, to_bits, widened
from genlm_backend.compiled import compiled
from genlm_backend.team import TeamFunction, Work

_AHEAD = np.uint64(16)  # columns between asking for memory and reading it; 8 to 32 measured alike
_LINE = np.uint64(64)  # bytes that come together
_ONE, _TWO, _THREE, _FOUR = np.uint64(1), np.uint64(2), np.uint64(3), np.uint64(4)
_UINT64 = np.uint64(0)
_OPTIONS: dict[str, Any] = {"fastmath": {"reassoc", "contract", "nsz"}, "error_model": "numpy"}


@compiled(**_OPTIONS)
def _attend(kind: Any, work: Work) -> None:
    n, n_heads, n_kv_heads, capacity = work[8], work[9], work[10], work[11]
    d, e, most = np.uint64(work[12]), np.uint64(work[13]), work[14]
    scaling = np.uint32(work[15]).view(np.float32)
    n_repeats, item = np.uint64(n_heads // n_kv_heads), np.uint64(work[7])
    queries = carray(pointer(work[1], kind), n * n_heads * work[12])
    keys = carray(pointer(work[2], kind), n_kv_heads * capacity * work[12])
    values = carray(pointer(work[3], kind), n_kv_heads * capacity * work[13])
    starts = carray(pointer(work[4], _UINT64), n + 1)
    slots = carray(pointer(work[5], _UINT64), np.int64(starts[n]))
    out = carray(pointer(work[6], kind), n * n_heads * work[13])
    scores = np.empty(np.int64(n_repeats) * most, np.float32)
    query, wide = np.empty(np.int64(n_repeats * d), np.float32), np.empty(np.int64(d), np.float32)
    sums = np.empty(np.int64(n_repeats * e), np.float32)
    while True:
        task = count_up(work)
        if task >= n * n_kv_heads:
            return
        i, head = np.uint64(task % n), np.uint64(task // n)  # neighbours share a trunk, read once from afar
        first, n_slots = starts[i], starts[i + _ONE] - starts[i]
        at_key, at_value = head * np.uint64(capacity) * d, head * np.uint64(capacity) * e
        for r in range(n_repeats):
            at = ((head * n_repeats + r) * np.uint64(n) + i) * d
            for j in range(d):
                query[r * d + j] = widened(queries[at + j]) * scaling
        for c in range(n_slots):
            if c + _AHEAD < n_slots:
                slot = slots[first + c + _AHEAD]
                for j in range(np.uint64(0), d * item, _LINE):
                    prefetch(np.uint64(work[2]) + (at_key + slot * d) * item + j)
                for j in range(np.uint64(0), e * item, _LINE):
                    prefetch(np.uint64(work[3]) + (at_value + slot * e) * item + j)
            key = at_key + slots[first + c] * d
            for j in range(d):
                wide[j] = widened(keys[key + j])
            for r in range(n_repeats):
                at, product = r * d, np.float32(0.0)
                for j in range(d):
                    product += query[at + j] * wide[j]
                scores[r * n_slots + c] = product
        for r in range(n_repeats):
            _softmax(scores[r * n_slots : r * n_slots + n_slots])
        for j in range(n_repeats * e):
            sums[j] = np.float32(0.0)
        whole = n_slots - n_slots % _FOUR
        for c in range(np.uint64(0), whole, _FOUR):
            slot = first + c
            v0, v1 = at_value + slots[slot] * e, at_value + slots[slot + _ONE] * e
            v2, v3 = at_value + slots[slot + _TWO] * e, at_value + slots[slot + _THREE] * e
            for r in range(n_repeats):
                to, at = r * e, r * n_slots + c
                w0, w1, w2, w3 = scores[at], scores[at + _ONE], scores[at + _TWO], scores[at + _THREE]
                for j in range(e):
                    sums[to + j] += (
                        w0 * widened(values[v0 + j])
                        + w1 * widened(values[v1 + j])
                        + w2 * widened(values[v2 + j])
                        + w3 * widened(values[v3 + j])
                    )
        for c in range(whole, n_slots):
            value = at_value + slots[first + c] * e
            for r in range(n_repeats):
                to, weight = r * e, scores[r * n_slots + c]
                for j in range(e):
                    sums[to + j] += weight * widened(values[value + j])
        to = (i * np.uint64(n_heads) + head * n_repeats) * e
        for j in range(n_repeats * e):
            out[to + j] = to_bits(sums[j], kind)


@compiled(**_OPTIONS)
def _softmax(scores: npt.NDArray[np.float32]) -> None:
    """In place. NaN or an infinity anywhere makes all NaN."""
    bits = scores.view(np.int32)
    top = np.int32(-0x80000000)  # integers are compared: their maximum becomes vector instructions
    for c in range(bits.size):
        top = max(top, bits[c] ^ ((bits[c] >> np.int32(31)) & np.int32(0x7FFFFFFF)))
    highest = np.int32(top ^ ((top >> np.int32(31)) & np.int32(0x7FFFFFFF))).view(np.float32)
    total, wrong = np.float32(0.0), np.float32(0.0)
    for c in range(scores.size):
        wrong += scores[c] * np.float32(0.0)  # 0, or NaN, which the power may swallow
        scores[c] = power_of_2(max((scores[c] - highest) * LOG2_E, np.float32(-126.0)))
        total += scores[c]
    inverse = np.float32(1.0) / total + wrong
    for c in range(scores.size):
        scores[c] *= inverse


def _attend_lists(work: Work) -> None:
    """softmax(scaling q k) v of each query over its own slots.

    Args:
        work: A counter at 0; then addresses of
            queries: (heads, n, key_dim);
            keys: (kv_heads, capacity, key_dim);
            values: (kv_heads, capacity, value_dim);
            starts: (n + 1,) int64; slots of query i are those from its start to before the next one's, one or more;
            slots: uint64, of all queries, one after the other;
            out: (n, heads, value_dim), written;
            then the numbers of bytes of a float, queries, heads, kv_heads, capacity, key_dim, value_dim, the most
            slots of a query; and the bits of the float32 that scales the products.
    """
    if work[7] == 4:
        _attend(np.uint32(0), work)
    else:
        _attend(np.uint16(0), work)


attend = TeamFunction(_attend_lists, **_OPTIONS)
