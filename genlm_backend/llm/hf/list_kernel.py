"""Compiled attention of single queries on a CPU: each reads the slots of its own ancestors where they lie in the pool.

torch copies what a group of queries reads and multiplies all of the group with all of it. Where each query has its own
tail, most of that is copied once and masked away; here nothing is copied and nothing masked. Sums are float32 for every
type, and a query's result depends on nothing but its own slots.

Importing this file imports numba. Inner loops run over unsigned indices, and `_exp` is a copy: see the top of `race`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from genlm_backend.compiled import compiled

Float32s = npt.NDArray[np.float32]
Int64s = npt.NDArray[np.int64]

_AHEAD = np.uint64(16)  # columns between asking for memory and reading it; 8 to 32 measured alike
_LINE = np.uint64(64)  # bytes that come together

_LOG2_E = np.float32(1.0 / math.log(2.0))
_LN2 = np.float32(math.log(2.0))
_ONE, _TWO, _THREE, _FOUR = np.uint64(1), np.uint64(2), np.uint64(3), np.uint64(4)


@intrinsic  # type: ignore[untyped-decorator]
def _prefetch(context: Any, array: Any, index: Any) -> Any:
    """Ask for the memory of an entry of a one-dimensional array."""
    from numba.np import arrayobj

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        made = arrayobj.make_array(signature.args[0])(context, builder, arguments[0])
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        function_type = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        function = builder.module.declare_intrinsic("llvm.prefetch", [byte], function_type)
        place = builder.bitcast(builder.gep(made.data, [arguments[1]]), byte)
        builder.call(function, [place, number(0), number(3), number(1)])  # to read, into all caches, data
        return context.get_dummy_value()

    return types.void(array, index), generate


@compiled(fastmath={"reassoc", "contract", "nsz"})
def attend(
    queries: Float32s,
    keys: Any,
    values: Any,
    shift: np.uint32,
    starts: Int64s,
    slots: npt.NDArray[np.uint64],
    shape: tuple[int, int, int, int, int],
    scaling: np.float32,
    out: Float32s,
) -> None:
    """softmax(scaling q k) v of each query over its own slots; arrays are flat.

    Args:
        queries: (n, heads, key_dim).
        keys: (kv_heads, capacity, key_dim), the bits of floats: uint32 of float32, or uint16 of bfloat16.
        values: (kv_heads, capacity, value_dim), likewise.
        shift: What widens these bits to float32's: 0 or 16.
        starts: (n + 1,); the slots of query i are those from its start to before the next one's, one or more.
        slots: Of all queries, one after the other.
        shape: heads, kv_heads, capacity, key_dim, value_dim.
        scaling: Of the products.
        out: (n, heads, value_dim), written.
    """
    n_heads, n_kv_heads, capacity, key_dim, value_dim = shape
    n_most = 0
    for i in range(starts.size - 1):
        n_most = max(n_most, starts[i + 1] - starts[i])
    n_repeats, d, e = np.uint64(n_heads // n_kv_heads), np.uint64(key_dim), np.uint64(value_dim)
    scores = np.empty(np.int64(n_repeats) * n_most, np.float32)
    wide = np.empty(key_dim, np.float32)
    per_line = _LINE // np.uint64(keys.itemsize)
    for i in range(starts.size - 1):
        first, n = np.uint64(starts[i]), np.uint64(starts[i + 1] - starts[i])
        for head in range(n_kv_heads):
            at_key, at_value = np.uint64(head * capacity) * d, np.uint64(head * capacity) * e
            of_head = np.uint64(i * n_heads) + np.uint64(head) * n_repeats
            for c in range(n):
                if c + _AHEAD < n:
                    slot = slots[first + c + _AHEAD]
                    for j in range(np.uint64(0), d, per_line):
                        _prefetch(keys, at_key + slot * d + j)
                    for j in range(np.uint64(0), e, per_line):
                        _prefetch(values, at_value + slot * e + j)
                key = at_key + slots[first + c] * d
                for j in range(d):
                    wide[j] = np.uint32(np.uint32(keys[key + j]) << shift).view(np.float32)
                for r in range(n_repeats):
                    query, product = (of_head + r) * d, np.float32(0.0)
                    for j in range(d):
                        product += queries[query + j] * wide[j]
                    scores[r * n + c] = product * scaling
            for r in range(n_repeats):
                _softmax(scores[r * n : r * n + n])
            for j in range(of_head * e, (of_head + n_repeats) * e):
                out[j] = np.float32(0.0)
            whole = n - n % _FOUR
            for c in range(np.uint64(0), whole, _FOUR):
                slot = first + c
                v0, v1 = at_value + slots[slot] * e, at_value + slots[slot + _ONE] * e
                v2, v3 = at_value + slots[slot + _TWO] * e, at_value + slots[slot + _THREE] * e
                for r in range(n_repeats):
                    to, at = (of_head + r) * e, r * n + c
                    w0, w1, w2, w3 = scores[at], scores[at + _ONE], scores[at + _TWO], scores[at + _THREE]
                    for j in range(e):
                        out[to + j] += (
                            w0 * np.uint32(np.uint32(values[v0 + j]) << shift).view(np.float32)
                            + w1 * np.uint32(np.uint32(values[v1 + j]) << shift).view(np.float32)
                            + w2 * np.uint32(np.uint32(values[v2 + j]) << shift).view(np.float32)
                            + w3 * np.uint32(np.uint32(values[v3 + j]) << shift).view(np.float32)
                        )
            for c in range(whole, n):
                value = at_value + slots[first + c] * e
                for r in range(n_repeats):
                    to, weight = (of_head + r) * e, scores[r * n + c]
                    for j in range(e):
                        out[to + j] += weight * np.uint32(np.uint32(values[value + j]) << shift).view(np.float32)


@compiled(fastmath={"reassoc", "contract", "nsz"})
def _softmax(scores: Float32s) -> None:
    """In place. NaN or an infinity anywhere makes all NaN."""
    bits = scores.view(np.int32)
    top = np.int32(-0x80000000)  # integers are compared: their maximum becomes vector instructions
    for c in range(bits.size):
        top = max(top, bits[c] ^ ((bits[c] >> np.int32(31)) & np.int32(0x7FFFFFFF)))
    highest = np.int32(top ^ ((top >> np.int32(31)) & np.int32(0x7FFFFFFF))).view(np.float32)
    total, wrong = np.float32(0.0), np.float32(0.0)
    for c in range(scores.size):
        wrong += scores[c] * np.float32(0.0)  # 0, or NaN, which `_exp` may swallow
        scores[c] = _exp(scores[c] - highest)
        total += scores[c]
    inverse = np.float32(1.0) / total + wrong
    for c in range(scores.size):
        scores[c] *= inverse


@compiled()
def _exp(x: np.float32) -> np.float32:
    """exp(x) for x <= 0, to 3e-7 of the largest term; 0 below -87.7. A whole power of 2 times a short series."""
    octaves = max(x * _LOG2_E, np.float32(-127.0))
    whole = np.floor(octaves + np.float32(0.5))
    r = (octaves - whole) * _LN2
    series = np.float32(1 / 5040)
    series = series * r + np.float32(1 / 720)
    series = series * r + np.float32(1 / 120)
    series = series * r + np.float32(1 / 24)
    series = series * r + np.float32(1 / 6)
    series = series * r + np.float32(0.5)
    series = series * r + np.float32(1.0)
    series = series * r + np.float32(1.0)
    power = np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)
    return np.float32(series * power)
