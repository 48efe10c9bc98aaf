"""Compiled parts of a decoder layer between its products, for few rows on a CPU: norm, rotary embedding, gate.

torch needs some 25 operations for them, each with its own dispatch, which for few rows takes longer than the numbers;
here each is one call that is given addresses. Sums and products are float32 for every type; what is stored is rounded.

Importing this file imports numba. Inner loops run over unsigned indices: see the top of `race`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from genlm_backend.bits import LOG2_E, pointer, power_of_2, to_bits, widened
from genlm_backend.compiled import compiled

# Division by zero gives an infinity and no error, whose check would keep loops from becoming vector instructions.
_OPTIONS: dict[str, Any] = {"fastmath": {"reassoc", "contract", "nsz"}, "error_model": "numpy"}


@compiled(**_OPTIONS)
def add_norm(kind: Any, x: int, delta: int, total: int, weight: int, out: int, n: int, width: int, eps: float) -> None:
    """The sum x + delta as `total`, and weight * total / its root mean square as `out`, row by row.

    All but numbers are addresses of (n, width) arrays, `weight` (width,).

    Args:
        kind: A number of the type of their bits: uint32 for float32, uint16 for bfloat16.
        x: What came in.
        delta: What is added to it; 0 for nothing, then `total` is not written.
        total: Written.
        weight: Of each column.
        out: Written.
        n: Rows.
        width: Columns.
        eps: Added to the mean square.
    """
    d = np.uint64(width)
    xs, sums, outs = (
        carray(pointer(x, kind), n * width),
        carray(pointer(total, kind), n * width),
        carray(pointer(out, kind), n * width),
    )
    deltas, weights = carray(pointer(delta, kind), n * width), carray(pointer(weight, kind), width)
    row = np.empty(width, np.float32)
    for i in range(n):
        at = np.uint64(i) * d
        if delta != 0:
            for j in range(d):
                bits = to_bits(widened(xs[at + j]) + widened(deltas[at + j]), kind)
                sums[at + j] = bits
                row[j] = widened(bits)
        else:
            for j in range(d):
                row[j] = widened(xs[at + j])
        squares = np.float32(0.0)
        for j in range(d):
            squares += row[j] * row[j]
        scale = np.float32(1.0) / np.sqrt(squares / np.float32(width) + np.float32(eps))
        for j in range(d):
            outs[at + j] = to_bits(widened(weights[j]) * widened(to_bits(row[j] * scale, kind)), kind)


@compiled(**_OPTIONS)
def rotate(
    kind: Any, x: int, cos: int, sin: int, out: int, n: int, n_heads: int, n_rotated: int, head_dim: int
) -> None:
    """Heads one after the other instead of rows; the halves (a, b) of some become (a cos - b sin, b cos + a sin).

    Args:
        kind: As in `add_norm`.
        x: Address of (n, n_heads, head_dim).
        cos: Address of (n, head_dim).
        sin: Address of (n, head_dim).
        out: Address of (n_heads, n, head_dim), written.
        n: Rows.
        n_heads: Of a row.
        n_rotated: The first heads, which are rotated; the others are as they were.
        head_dim: Even.
    """
    d, half, rows, heads = np.uint64(head_dim), np.uint64(head_dim // 2), np.uint64(n), np.uint64(n_heads)
    xs, outs = carray(pointer(x, kind), n * n_heads * head_dim), carray(pointer(out, kind), n * n_heads * head_dim)
    coss, sins = carray(pointer(cos, kind), n * head_dim), carray(pointer(sin, kind), n * head_dim)
    for i in range(rows):
        for head in range(heads):
            at, to = (i * heads + head) * d, (head * rows + i) * d
            if head >= np.uint64(n_rotated):
                for j in range(d):
                    outs[to + j] = xs[at + j]
                continue
            for j in range(half):
                a, b = widened(xs[at + j]), widened(xs[at + half + j])
                low, high = i * d + j, i * d + half + j
                outs[to + j] = to_bits(a * widened(coss[low]) - b * widened(sins[low]), kind)
                outs[to + half + j] = to_bits(b * widened(coss[high]) + a * widened(sins[high]), kind)


@compiled(**_OPTIONS)
def gate(kind: Any, x: int, out: int, n: int, width: int) -> None:
    """silu(gates) * ups as `out`.

    Args:
        kind: As in `add_norm`.
        x: Address of (n, 2, width): gates, ups.
        out: Address of (n, width), written.
        n: Rows.
        width: Columns.
    """
    d = np.uint64(width)
    xs, outs = carray(pointer(x, kind), 2 * n * width), carray(pointer(out, kind), n * width)
    for i in range(np.uint64(n)):
        at, to = i * np.uint64(2) * d, i * d
        for j in range(d):
            g = widened(xs[at + j])
            # exp(-g); beyond 2^126 silu is 0 or g to the last bit
            power = power_of_2(min(max(-g * LOG2_E, np.float32(-126.0)), np.float32(126.0)))
            outs[to + j] = to_bits(g / (np.float32(1.0) + power) * widened(xs[at + d + j]), kind)
