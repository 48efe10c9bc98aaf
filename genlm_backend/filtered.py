"""Compiled passes that keep the most probable tokens of rows on the CPU: top-k, top-p and min-p, and draws from them.

No row is sorted. The tokens that may be kept are collected first, by their runs: where the highest entry of a run of
tokens is too low, and that takes a few vector instructions, so is the rest of it. Only what was collected is sorted.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from genlm_backend.compiled import compiled
from genlm_backend.race import Float32s, bits_of, highest, noise_of, sum_of_exp

Int64s = npt.NDArray[np.int64]

_RUN = 64  # tokens of which the highest is found first
_FIRST_DEPTH = 4.0  # nats below the best token among which a nucleus is sought first; doubled until it is there
_LOWEST = np.int32(-0x80000000)


@compiled()
def draw_filtered(
    rows: Float32s,
    row_stride: int,
    n_tokens: int,
    row_of_draw: Int64s,
    keys: npt.NDArray[np.uint64],
    temperatures: npt.NDArray[np.float64],
    top_ks: Int64s,
    top_ps: npt.NDArray[np.float64],
    min_ps: npt.NDArray[np.float64],
    masks: npt.NDArray[np.bool_],
    mask_of_draw: Int64s,
) -> tuple[Int64s, npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Draws from rows after temperature, min-p, top-k and top-p in this order, then under masks.

    Each token has the noise that it has in `race.draw_rows`.

    Args:
        rows, row_stride, n_tokens, row_of_draw, keys, masks, mask_of_draw: As in `race.draw_rows`.
        temperatures: As there; at 0 the filters see temperature 1, and the most probable allowed token is taken.
        top_ks: (n,) int64, from n_tokens on: all.
        top_ps: (n,) float64 in (0, 1], 1: all.
        min_ps: (n,) float64 in [0, 1], 0: all.

    Returns:
        (n,) int64 tokens, -1 where none is possible, or one is NaN or +inf; (n,) float64, the log-probability of each
        among what the filters kept and the mask allows; (n,) float64, the log of the part of what the filters kept
        that the mask allows.
    """
    n_draws = keys.size
    token_ids = np.full(n_draws, -1)
    log_qs, log_masses = np.full(n_draws, -np.inf), np.full(n_draws, -np.inf)
    maxima, found = _scratch(n_tokens)
    for i in range(n_draws):
        row = rows[row_of_draw[i] * row_stride : row_of_draw[i] * row_stride + n_tokens]
        top = highest(row)
        if not -np.inf < top < np.inf:
            continue
        inverse = 1.0 if temperatures[i] == 0.0 else 1.0 / temperatures[i]
        kept = _kept(row, top, inverse, top_ks[i], top_ps[i], min_ps[i], maxima, found)
        total, allowed, first, best, best_score = 0.0, 0.0, 0.0, -1, -np.inf
        for v in kept:
            weight = (np.float64(row[v]) - np.float64(top)) * inverse
            total += math.exp(weight)
            if mask_of_draw[i] >= 0 and not masks[mask_of_draw[i], v]:
                continue
            if best < 0:
                first = weight  # the highest: sums relative to it do not vanish
            allowed += math.exp(weight - first)
            score = weight + noise_of(bits_of(keys[i], v))
            if best < 0 or (temperatures[i] > 0.0 and score > best_score):
                best, best_score = v, score
        if best >= 0:
            token_ids[i] = best
            if temperatures[i] == 0.0:
                log_qs[i] = 0.0
            else:
                log_qs[i] = (np.float64(row[best]) - np.float64(top)) * inverse - first - math.log(allowed)
            log_masses[i] = first + math.log(allowed) - math.log(total)
    return token_ids, log_qs, log_masses


@compiled()
def top_rows(rows: Float32s, row_stride: int, n_rows: int, n_tokens: int, k: int) -> tuple[Int64s, Float32s]:
    """The k highest entries of each row, highest first, of equals the lowest ids: (n, k) int64 and (n, k) float32.

    Args:
        rows: flat float32, as in `race.draw_rows`.
        k: 1 to n_tokens.
    """
    token_ids, values = np.empty((n_rows, k), np.int64), np.empty((n_rows, k), np.float32)
    maxima, found = _scratch(n_tokens)
    for i in range(n_rows):
        row = rows[i * row_stride : i * row_stride + n_tokens]
        best = _best(row, k, maxima, found)
        for place in range(k):
            token_ids[i, place], values[i, place] = best[place], row[best[place]]
    return token_ids, values


@compiled()
def _scratch(n_tokens: int) -> tuple[Int64s, Int64s]:
    n_runs = (n_tokens + _RUN - 1) // _RUN
    return np.empty(n_runs, np.int64), np.empty(n_tokens, np.int64)


@compiled()
def _kept(
    row: Float32s,
    top: np.float32,
    inverse: float,
    top_k: int,
    top_p: float,
    min_p: float,
    maxima: Int64s,
    found: Int64s,
) -> Int64s:
    """Tokens that the filters keep, most probable first, of equals the lowest ids; none of probability 0."""
    lowest = math.log(min_p) if min_p > 0.0 else -np.inf
    needed = -1.0  # mass that top-p asks for; of what the other filters keep, unless it is the only one
    if top_k < row.size:
        kept = _best(row, top_k, maxima, found)
    elif min_p > 0.0:
        # A little more than is kept: the comparison below is exact.
        kept = _reaching(row, np.float32(top + lowest / inverse - 1e-3), maxima, found)
    else:
        needed = top_p * sum_of_exp(row, top, np.float32(inverse)) if top_p < 1.0 else np.inf
        depth = _FIRST_DEPTH
        while True:
            kept = _reaching(row, np.float32(top - depth / inverse), maxima, found)
            if kept.size == row.size or depth == np.inf:
                break
            mass = 0.0
            for v in kept:
                mass += math.exp((np.float64(row[v]) - np.float64(top)) * inverse)
            if mass >= needed:
                break
            depth = depth * 2.0 if depth < 64.0 else np.inf
    n = 0
    for v in kept:
        weight = (np.float64(row[v]) - np.float64(top)) * inverse
        if weight == -np.inf or weight < lowest:
            break
        n += 1
    if top_p < 1.0:
        if needed < 0.0:
            total = 0.0
            for v in kept[:n]:
                total += math.exp((np.float64(row[v]) - np.float64(top)) * inverse)
            needed = top_p * total
        before, n_all = 0.0, n
        n = 0
        while n < n_all and (n == 0 or before < needed):
            before += math.exp((np.float64(row[kept[n]]) - np.float64(top)) * inverse)
            n += 1
    most: Int64s = kept[:n]
    return most


@compiled()
def _best(row: Float32s, k: int, maxima: Int64s, found: Int64s) -> Int64s:
    """The k highest entries, highest first, of equals the lowest ids: they are in the k runs with the highest."""
    _find_maxima(row, maxima)
    hurdle = _LOWEST
    if k <= maxima.size:
        in_order = maxima.copy()
        in_order.sort()
        hurdle = np.int32(in_order[maxima.size - k])
    best: Int64s = _sorted(row, hurdle, maxima, found)[:k]
    return best


@compiled()
def _reaching(row: Float32s, threshold: np.float32, maxima: Int64s, found: Int64s) -> Int64s:
    """The entries of at least so much, highest first, of equals the lowest ids."""
    _find_maxima(row, maxima)
    lowest = np.empty(1, np.float32)
    lowest[0] = threshold
    reaching: Int64s = _sorted(row, _rank(lowest.view(np.int32)[0]), maxima, found)
    return reaching


@compiled()
def _find_maxima(row: Float32s, maxima: Int64s) -> None:
    """The rank of the highest entry of each run. Integers are compared: their maximum becomes vector instructions."""
    bits = row.view(np.int32)
    for run in range(maxima.size):
        most = _LOWEST
        for v in range(run * _RUN, min((run + 1) * _RUN, row.size)):
            most = max(most, bits[v] ^ ((bits[v] >> np.int32(31)) & np.int32(0x7FFFFFFF)))
        maxima[run] = most


@compiled()
def _sorted(row: Float32s, hurdle: np.int32, maxima: Int64s, found: Int64s) -> Int64s:
    """Tokens of at least this rank. One integer holds a token's rank, turned over, above its id, and is what is sorted:
    numba needs seconds to compile a partition or a stable sort.
    """
    bits = row.view(np.int32)
    n = 0
    for run in range(maxima.size):
        if maxima[run] >= hurdle:
            for v in range(run * _RUN, min((run + 1) * _RUN, row.size)):
                rank = _rank(bits[v])
                if rank >= hurdle:
                    found[n] = ((-np.int64(rank) - 1) << 32) | v
                    n += 1
    in_order = found[:n]
    in_order.sort()
    for i in range(n):
        in_order[i] &= 0xFFFFFFFF
    return in_order


@compiled()
def _rank(bits: np.int32) -> np.int32:
    """An integer that sorts as the float32 with these bits does."""
    return np.int32(bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))
