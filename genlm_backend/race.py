"""Compiled passes over rows of log-probabilities on the CPU: the exponential race behind `draw`, masked sums, filters.

Importing this file imports numba (about half a second), so `sampling` does it when a row is first drawn, not before.

The race. Token v has a number x_v in (0, 1) made from the row's key and v alone, the waiting time E_v = -log(1 - x_v),
and the score w_v - log(E_v) with w_v = (logprob_v - highest logprob) / temperature; the highest score is the draw.
Two logarithms per token would cost 20 ns. Because E_v >= x_v, the score is at most w_v - log(x_v); and -log2(x) is at
most the straight-line reading of x's floating-point bits (log2(1 + m) >= m for a mantissa m). This ceiling takes a few
vector instructions, and only the tokens whose ceiling reaches the best score so far (a few dozen per row, starting from
the score of the most probable token) are scored in full. The pruning only ever drops tokens that have lost: the result
is the token of the plain race.

Filters. No row is sorted for top-k, top-p or min-p. The tokens that may be kept are collected first, by their runs:
where the highest entry of a run of tokens is too low, and that takes a few vector instructions, so is the rest of it.
Only what was collected is sorted.

Each row is walked in a fixed order by one thread and touches nothing else, so results do not depend on the batch. All
of it is one file, because numba keeps the code of a function as long as its own file is unchanged.

Inner loops run over slices, from 0 on: an index that might be negative, as numba sees it, is turned around first, and
then entries are gathered one by one instead of read as vectors, which takes two to five times as long.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt
from numba import carray

from genlm_backend.bits import count_up, pointer, power_of_2, widened
from genlm_backend.compiled import compiled
from genlm_backend.packed_mask import Words
from genlm_backend.team import TeamFunction, Work, threads_for

Float32s = npt.NDArray[np.float32]
Float64s = npt.NDArray[np.float64]
Int64s = npt.NDArray[np.int64]
UInt64s = npt.NDArray[np.uint64]

_FLOAT32, _FLOAT64 = np.float32(0), np.float64(0)
_INT64, _UINT64, _UINT32, _UINT16 = np.int64(0), np.uint64(0), np.uint32(0), np.uint16(0)

_BLOCK = 256  # tokens whose ceilings are computed together; 64 to 1,024 measured alike

_FEW = 8  # where a mask allows no more than one in so many tokens, only those are looked at
_RUN = 64  # tokens of which the highest is found first
_FIRST_DEPTH = 4.0  # nats below the best token among which a nucleus is sought first; doubled until it is there
_LOWEST = np.int32(-0x80000000)

# SplitMix64: Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators", with Stafford's variant 13.
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)
_SHIFT_1 = np.uint64(30)
_SHIFT_2 = np.uint64(27)
_SHIFT_3 = np.uint64(31)
_ONE = np.uint64(1)
_TO_31_BITS = np.uint64(33)

_LN2 = np.float32(math.log(2.0))
_LOG2_E = np.float32(1.0 / math.log(2.0))
_PER_OCTAVE = np.float32(2.0**-23)  # one step of float32's bits, in octaves
_EXPONENT_OF_1 = np.float32(127 + 31)  # the bias of float32, and the 31 bits of the integer read as a fraction
_SHRINK = 1.0 - 1e-5  # keeps the ceiling above the score in spite of float32 rounding, in proportion to w_v
_SLACK = np.float32(1e-3)  # ... and on the rest: the float32 ceiling is off by less than 1e-4


class Groups(NamedTuple):
    """Draws in groups of one row, temperature and mask.

    Attributes:
        row_of_group: (k,) int64.
        temperatures: (k,) float64, each 0 (the most probable token) or from 1e-30 to 1e30.
        mask_of_group: (k,) int64; which mask each group is under, -1 for none.
        first_of_group: (k + 1,) int64; the draws of a group are those from its first to before that of the next.
    """

    row_of_group: Int64s
    temperatures: Float64s
    mask_of_group: Int64s
    first_of_group: Int64s


def draw(
    rows: Float32s,
    row_stride: int,
    n_tokens: int,
    groups: Groups,
    masks: Words,
    keys: UInt64s,
    *,
    is_weighed: bool,
) -> tuple[Int64s, Float64s]:
    """The token of each draw, and the log-mass of what the draws of each group are from.

    Args:
        rows: flat float32; row i starts at `i * row_stride` and has `n_tokens` entries.
        row_stride: In entries.
        n_tokens: Of a row.
        groups: Of the draws.
        masks: (m, ceil(n_tokens / 32)) uint32, as in `packed_mask`.
        keys: (n,) uint64, of the draws.
        is_weighed: Whether masses are wanted.

    Returns:
        (n,) int64; -1 where no token is possible, or one is NaN or +inf; (k,) float64, as of `log_mass_rows`, or none.
    """
    n_groups = len(groups.row_of_group)
    token_ids, log_masses = np.empty(keys.size, np.int64), np.empty(n_groups if is_weighed else 0, np.float64)
    n_threads = threads_for(n_groups)
    if n_threads == 1 or not is_compiled():
        scratch, few = np.empty(n_tokens, np.float32), np.empty(n_tokens // _FEW, np.int64)
        out = token_ids, log_masses, scratch, few
        _draw_groups(0, n_groups, rows, row_stride, n_tokens, *groups, masks, keys, *out)
    else:
        arrays = [np.ascontiguousarray(array) for array in (rows, *groups, masks, keys, token_ids, log_masses)]
        sizes = row_stride, n_tokens, n_groups, len(rows), len(masks), len(keys), len(log_masses)
        _draw_by_team()([*sizes, *(array.ctypes.data for array in arrays)], n_threads)
    return token_ids, log_masses


def is_compiled() -> bool:
    """Whether compiled functions are: not where NUMBA_DISABLE_JIT is set, to find faults."""
    return not numba.config.DISABLE_JIT


def prepare() -> None:
    """Compile, or load, what several threads run; runs nothing."""
    if is_compiled():
        _draw_by_team()
        _normalize_by_team()


@cache
def _draw_by_team() -> TeamFunction:
    return TeamFunction(_draw_tasks)


def _draw_tasks(work: Work) -> None:
    """Draws of one group after another; arguments as `draw` gives them."""
    row_stride, n_tokens, n_groups = work[1], work[2], work[3]
    rows = carray(pointer(work[8], _FLOAT32), work[4])
    row_of_group = carray(pointer(work[9], _INT64), n_groups)
    temperatures = carray(pointer(work[10], _FLOAT64), n_groups)
    mask_of_group = carray(pointer(work[11], _INT64), n_groups)
    first_of_group = carray(pointer(work[12], _INT64), n_groups + 1)
    masks = carray(pointer(work[13], _UINT32), (work[5], (n_tokens + 31) // 32))
    keys = carray(pointer(work[14], _UINT64), work[6])
    token_ids = carray(pointer(work[15], _INT64), work[6])
    log_masses = carray(pointer(work[16], _FLOAT64), work[7])
    scratch, few = np.empty(n_tokens, np.float32), np.empty(n_tokens // _FEW, np.int64)
    while True:
        task = count_up(work)
        if task >= n_groups:
            return
        _draw_groups(
            task,
            task + 1,
            rows,
            row_stride,
            n_tokens,
            row_of_group,
            temperatures,
            mask_of_group,
            first_of_group,
            masks,
            keys,
            token_ids,
            log_masses,
            scratch,
            few,
        )


@compiled()
def _draw_groups(
    start: int,
    stop: int,
    rows: Float32s,
    row_stride: int,
    n_tokens: int,
    row_of_group: Int64s,
    temperatures: Float64s,
    mask_of_group: Int64s,
    first_of_group: Int64s,
    masks: Words,
    keys: UInt64s,
    token_ids: Int64s,
    log_masses: Float64s,
    scratch: Float32s,
    few: Int64s,
) -> None:
    for group in range(start, stop):
        row = rows[row_of_group[group] * row_stride : row_of_group[group] * row_stride + n_tokens]
        n = -1
        if mask_of_group[group] >= 0:
            n = _mask_row(row, masks[mask_of_group[group]], scratch, few)
            row = scratch[:n] if n >= 0 else scratch
        top = _highest(row)
        if log_masses.size > 0:
            log_masses[group] = _log_mass(row, top, temperatures[group])
        for i in range(first_of_group[group], first_of_group[group + 1]):
            if n >= 0:
                token_ids[i] = _draw_few(few[:n], row, top, keys[i], temperatures[group])
            else:
                token_ids[i] = _draw_row(row, top, keys[i], temperatures[group])


@compiled()
def draw_among(
    token_ids: npt.NDArray[np.int64], log_scores: npt.NDArray[np.float64], keys: npt.NDArray[np.uint64]
) -> npt.NDArray[np.int64]:
    """Where in each row of a few tokens the drawn one is; each token has the noise that it has in `draw`.

    Args:
        token_ids: (n, k) int64.
        log_scores: (n, k) float64, nats, normalised or not.
        keys: (n,) uint64.

    Returns:
        (n,) int64; -1 where none is possible.
    """
    places = np.full(keys.size, -1)
    for i in range(keys.size):
        best_score = -np.inf
        for j in range(token_ids.shape[1]):
            score = log_scores[i, j] + _noise(_bits(keys[i], token_ids[i, j]))
            if score > best_score:
                places[i], best_score = j, score
    return places


@compiled()
def log_mass_rows(
    rows: Float32s,
    row_stride: int,
    n_tokens: int,
    row_of_sum: npt.NDArray[np.int64],
    temperatures: npt.NDArray[np.float64],
    masks: Words,
    mask_of_sum: npt.NDArray[np.int64],
) -> npt.NDArray[np.float64]:
    """Log of the sum of exp(logprob / temperature) over a row's allowed tokens.

    Args:
        rows, row_stride, n_tokens, masks: As in `draw`.
        row_of_sum: (n,) int64; which row each sum is of.
        temperatures: (n,) float64, as in `Groups`.
        mask_of_sum: (n,) int64; which mask each sum is under, -1 for none.

    Returns:
        (n,) float64; -inf where no token is possible, NaN where one is NaN. At temperature 0, the limit.
    """
    log_masses = np.empty(temperatures.size, np.float64)
    scratch, few = np.empty(n_tokens, np.float32), np.empty(n_tokens // _FEW, np.int64)
    for i in range(temperatures.size):
        start = row_of_sum[i] * row_stride
        row = rows[start : start + n_tokens]
        if mask_of_sum[i] >= 0:
            n = _mask_row(row, masks[mask_of_sum[i]], scratch, few)
            row = scratch[:n] if n >= 0 else scratch
        log_masses[i] = _log_mass(row, _highest(row), temperatures[i])
    return log_masses


@compiled()
def _log_mass(row: Float32s, top: np.float32, temperature: float) -> float:
    if math.isinf(top) or math.isnan(top):
        return np.float64(top)
    if temperature == 0.0:
        return 0.0 if top == 0.0 else math.copysign(np.inf, top)
    return np.float64(top) / temperature + math.log(_sum_of_exp(row, top, np.float32(1.0 / temperature)))


@compiled()
def _mask_row(row: Float32s, words: Words, masked: Float32s, few: Int64s) -> int:
    """Write the row with -inf where the mask forbids; or, where it allows no more than `few` has places, only what it
    allows, the tokens into `few`.

    Returns:
        How many tokens it allows, if only those were written, else -1.
    """
    n_allowed = np.int64(0)
    for w in range(words.size):
        n_allowed += np.int64(_n_bits(words[w]))
    if n_allowed <= few.size:
        n = 0
        for w in range(words.size):
            left = words[w]
            while left != 0:
                below = left & (~left + np.uint32(1))  # the lowest bit that is left
                allowed = np.int64(w * 32) + np.int64(_n_bits(np.uint32(below - np.uint32(1))))
                if allowed < row.size:
                    few[n], masked[n] = allowed, row[allowed]
                    n += 1
                left = np.uint32(left ^ below)
        return n
    for w in range(row.size // 32):
        word, start = words[w], w * 32
        for b in range(32):
            is_allowed = (word >> np.uint32(b)) & np.uint32(1)
            masked[start + b] = row[start + b] if is_allowed else np.float32(-np.inf)
    for v in range(row.size // 32 * 32, row.size):
        masked[v] = row[v] if _has(words, v) else np.float32(-np.inf)
    return -1


@compiled()
def _has(words: Words, token_id: int) -> bool:
    return bool((words[token_id >> 5] >> np.uint32(token_id & 31)) & np.uint32(1))


@compiled()
def _n_bits(word: np.uint32) -> np.uint32:
    word = word - ((word >> np.uint32(1)) & np.uint32(0x55555555))
    word = (word & np.uint32(0x33333333)) + ((word >> np.uint32(2)) & np.uint32(0x33333333))
    word = (word + (word >> np.uint32(4))) & np.uint32(0x0F0F0F0F)
    return np.uint32((word * np.uint32(0x01010101)) >> np.uint32(24)) & np.uint32(0xFF)  # numba widens the product


@compiled()
def _draw_row(row: Float32s, top: np.float32, key: np.uint64, temperature: float) -> int:
    if not -np.inf < top < np.inf:
        return -1
    best: int = _first(row, top)
    if temperature == 0.0:
        return best
    best_score = _score(row[best], top, temperature, _bits(key, best))
    hurdle = np.float32(best_score) - _SLACK
    shrunk_inverse = np.float32(_SHRINK / temperature)
    for start in range(0, row.size, _BLOCK):
        block = row[start : start + _BLOCK]
        if not _any_reaches(block, start, key, top, shrunk_inverse, hurdle):
            continue
        for v in range(start, start + block.size):
            bits = _bits(key, v)
            if _ceiling(row[v], top, shrunk_inverse, bits) >= hurdle:
                score = _score(row[v], top, temperature, bits)
                if score > best_score or (score == best_score and v < best):
                    best, best_score = v, score
                    hurdle = np.float32(best_score) - _SLACK
    return best


@compiled()
def _draw_few(few: Int64s, logprobs: Float32s, top: np.float32, key: np.uint64, temperature: float) -> int:
    """As `_draw_row`, of some tokens in increasing order only."""
    if not -np.inf < top < np.inf:
        return -1
    best: int = _first(logprobs, top)
    if temperature == 0.0:
        token_id: int = few[best]
        return token_id
    best_score = _score(top, top, temperature, _bits(key, few[best]))
    hurdle = np.float32(best_score) - _SLACK
    shrunk_inverse = np.float32(_SHRINK / temperature)
    for j in range(few.size):
        bits = _bits(key, few[j])
        if _ceiling(logprobs[j], top, shrunk_inverse, bits) >= hurdle:
            score = _score(logprobs[j], top, temperature, bits)
            if score > best_score or (score == best_score and j < best):
                best, best_score = j, score
                hurdle = np.float32(best_score) - _SLACK
    token_id = few[best]
    return token_id


@compiled()
def _highest(row: Float32s) -> np.float32:
    """The largest entry; NaN if any is; -inf for an empty row.

    Integers are compared, because a maximum of integers becomes vector instructions and one of floats does not: with
    the lower 31 bits of negative numbers flipped, float32 sorts as int32, NaNs outside of the two infinities.
    """
    bits = row.view(np.int32)
    lowest = np.int32(0x7FFFFFFF)
    highest = np.int32(-0x80000000)
    for v in range(bits.size):
        rank = bits[v] ^ ((bits[v] >> np.int32(31)) & np.int32(0x7FFFFFFF))
        lowest = min(lowest, rank)
        highest = max(highest, rank)
    if row.size == 0:
        return np.float32(-np.inf)
    if lowest < np.int32(-0x7F800001) or highest > np.int32(0x7F800000):
        return np.float32(np.nan)
    return np.int32(highest ^ ((highest >> np.int32(31)) & np.int32(0x7FFFFFFF))).view(np.float32)


@compiled()
def _first(row: Float32s, value: np.float32) -> int:
    """Where the row has this value first; it has it."""
    for start in range(0, row.size, _BLOCK):
        block = row[start : start + _BLOCK]
        is_here = False
        for j in range(block.size):
            is_here |= block[j] == value
        if is_here:
            break
    first: int = start
    while row[first] != value:
        first += 1
    return first


@compiled()
def _any_reaches(
    block: Float32s, start: int, key: np.uint64, top: np.float32, shrunk_inverse: np.float32, hurdle: np.float32
) -> bool:
    is_reached = False
    for j in range(block.size):
        is_reached |= _ceiling(block[j], top, shrunk_inverse, _bits(key, start + j)) >= hurdle
    return is_reached


@compiled()
def _bits(key: np.uint64, token_id: int) -> np.uint64:
    """64 random bits of a token under a key."""
    z = key + (np.uint64(token_id) + _ONE) * _GOLDEN
    z = (z ^ (z >> _SHIFT_1)) * _MULTIPLIER_1
    z = (z ^ (z >> _SHIFT_2)) * _MULTIPLIER_2
    return z ^ (z >> _SHIFT_3)


@compiled()
def _ceiling(logprob: np.float32, top: np.float32, shrunk_inverse: np.float32, bits: np.uint64) -> np.float32:
    leading = np.float32(np.int32(bits >> _TO_31_BITS)).view(np.int32)
    octaves = _EXPONENT_OF_1 - np.float32(leading) * _PER_OCTAVE
    return (logprob - top) * shrunk_inverse + _LN2 * octaves


@compiled()
def _score(logprob: np.float32, top: np.float32, temperature: float, bits: np.uint64) -> float:
    score: float = (np.float64(logprob) - np.float64(top)) / temperature + _noise(bits)
    return score


@compiled()
def _noise(bits: np.uint64) -> float:
    """The Gumbel noise that these bits stand for."""
    x = min((np.float64(np.int64(bits >> _ONE)) + 0.5) * 2.0**-63, 1.0 - 2.0**-53)
    return -math.log(-math.log1p(-x))


@compiled(fastmath={"reassoc", "contract"})
def _sum_of_exp(row: Float32s, top: np.float32, inverse: np.float32) -> float:
    """The sum of exp((entry - top) * inverse), no entry above `top`; to about 3e-7."""
    total = 0.0
    for start in range(0, row.size, _BLOCK):
        block = row[start : start + _BLOCK]
        of_block = np.float32(0.0)
        for j in range(block.size):
            of_block += _exp((block[j] - top) * inverse)
        total += np.float64(of_block)
    return total


@compiled()
def _exp(x: np.float32) -> np.float32:
    """exp(x) for x <= 0, to 3e-7 of the largest term; 0 below -87.7. A whole power of 2 times a short series.

    Not `bits.power_of_2`: that can only be compiled, and masses are to be summed under NUMBA_DISABLE_JIT too.
    """
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


# ---- normalising


def normalize(logits: int, n_bytes: int, row_stride: int, out: Float32s) -> Float64s:
    """Log-softmax of rows.

    Args:
        logits: The address of the first; entries of a row lie one after the other.
        n_bytes: Of an entry: 4, float32, or 2, bfloat16.
        row_stride: From row to row, in entries.
        out: (n_rows, n_tokens) float32, written.

    Returns:
        (n_rows,) float64, what was taken off; NaN, as is then all of the row, if one is NaN or +inf or all are -inf.
    """
    log_normalizers = np.empty(len(out), np.float64)
    arguments = n_bytes, *out.shape, row_stride, logits, out.ctypes.data, log_normalizers.ctypes.data
    _normalize_by_team()(arguments, threads_for(len(out)))
    return log_normalizers


_NORMALIZE: dict[str, Any] = {"fastmath": {"reassoc", "contract", "nsz"}, "error_model": "numpy"}


@cache
def _normalize_by_team() -> TeamFunction:
    return TeamFunction(_normalize_tasks, **_NORMALIZE)


def _normalize_tasks(work: Work) -> None:
    """Rows, one after another; arguments as `normalize` gives them."""
    if work[1] == 4:
        _normalize_rows(_UINT32, work)
    else:
        _normalize_rows(_UINT16, work)


@compiled(**_NORMALIZE)
def _normalize_rows(kind: Any, work: Work) -> None:
    n_rows, n_tokens, row_stride = work[2], work[3], work[4]
    logits = carray(pointer(work[5], kind), (n_rows - 1) * row_stride + n_tokens)
    out = carray(pointer(work[6], _FLOAT32), n_rows * n_tokens)
    log_normalizers = carray(pointer(work[7], _FLOAT64), n_rows)
    while True:
        task = count_up(work)
        if task >= n_rows:
            return
        source = logits[task * row_stride : task * row_stride + n_tokens]
        row = out[task * n_tokens : task * n_tokens + n_tokens]
        for j in range(row.size):
            row[j] = widened(source[j])
        top = _highest(row)
        total = 0.0
        for start in range(0, row.size, _BLOCK):
            block = row[start : start + _BLOCK]
            of_block = np.float32(0.0)
            for j in range(block.size):
                block[j] -= top  # first, and stored: what all entries share, however large, costs no precision
                of_block += power_of_2(max(block[j] * _LOG2_E, np.float32(-126.0)))
            total += np.float64(of_block)
        log_total = math.log(total) if -np.inf < top < np.inf else np.nan
        log_normalizers[task] = np.float64(top) + log_total
        shift = np.float32(log_total)
        for j in range(row.size):
            row[j] -= shift


# ---- filters


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
    masks: Words,
    mask_of_draw: Int64s,
) -> tuple[Int64s, npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Draws from rows after temperature, min-p, top-k and top-p in this order, then under masks.

    Each token has the noise that it has in `draw`.

    Args:
        rows, row_stride, n_tokens, masks, keys: As in `draw`.
        row_of_draw: (n,) int64; which row each draw is from.
        mask_of_draw: (n,) int64; which mask each draw is under, -1 for none.
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
        top = _highest(row)
        if not -np.inf < top < np.inf:
            continue
        inverse = 1.0 if temperatures[i] == 0.0 else 1.0 / temperatures[i]
        kept = _kept(row, top, inverse, top_ks[i], top_ps[i], min_ps[i], maxima, found)
        total, allowed, first, best, best_score = 0.0, 0.0, 0.0, -1, -np.inf
        for v in kept:
            weight = (np.float64(row[v]) - np.float64(top)) * inverse
            total += math.exp(weight)
            if mask_of_draw[i] >= 0 and not _has(masks[mask_of_draw[i]], v):
                continue
            if best < 0:
                first = weight  # the highest: sums relative to it do not vanish
            allowed += math.exp(weight - first)
            score = weight + _noise(_bits(keys[i], v))
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
        rows: flat float32, as in `draw`.
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
        needed = top_p * _sum_of_exp(row, top, np.float32(inverse)) if top_p < 1.0 else np.inf
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
        of_run = bits[run * _RUN : (run + 1) * _RUN]
        for j in range(of_run.size):
            most = max(most, of_run[j] ^ ((of_run[j] >> np.int32(31)) & np.int32(0x7FFFFFFF)))
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
