"""Compiled passes over rows of log-probabilities on the CPU: the exponential race behind `draw`, and masked sums.

Importing this file imports numba (about half a second), so `sampling` does it when a row is first drawn, not before.

The race. Token v has a number x_v in (0, 1) made from the row's key and v alone, the waiting time E_v = -log(1 - x_v),
and the score w_v - log(E_v) with w_v = (logprob_v - highest logprob) / temperature; the highest score is the draw.
Two logarithms per token would cost 20 ns. Because E_v >= x_v, the score is at most w_v - log(x_v); and -log2(x) is at
most the straight-line reading of x's floating-point bits (log2(1 + m) >= m for a mantissa m). This ceiling takes a few
vector instructions, and only the tokens whose ceiling reaches the best score so far (a few dozen per row, starting from
the score of the most probable token) are scored in full. The pruning only ever drops tokens that have lost: the result
is the token of the plain race.

Each row is walked in a fixed order by one thread and touches nothing else, so results do not depend on the batch.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from genlm_backend.compiled import compiled

Float32s = npt.NDArray[np.float32]

_BLOCK = 256  # tokens whose ceilings are computed together; 64 to 1,024 measured alike

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


@compiled()
def draw_rows(
    rows: Float32s,
    row_stride: int,
    n_tokens: int,
    row_of_draw: npt.NDArray[np.int64],
    keys: npt.NDArray[np.uint64],
    temperatures: npt.NDArray[np.float64],
    masks: npt.NDArray[np.bool_],
    mask_of_draw: npt.NDArray[np.int64],
) -> npt.NDArray[np.int64]:
    """The token of each draw.

    Args:
        rows: flat float32; row i starts at `i * row_stride` and has `n_tokens` entries.
        row_stride: In entries.
        n_tokens: Of a row.
        row_of_draw: (n,) int64; which row each draw is from.
        keys: (n,) uint64.
        temperatures: (n,) float64, each 0 (the most probable token) or from 1e-30 to 1e30.
        masks: (k, n_tokens) bool.
        mask_of_draw: (n,) int64; which mask each draw is under, -1 for none.

    Returns:
        (n,) int64; -1 where no token is possible, or one is NaN or +inf.
    """
    token_ids = np.empty(keys.size, np.int64)
    scratch = np.empty(n_tokens, np.float32)
    for i in range(keys.size):
        start = row_of_draw[i] * row_stride
        row = rows[start : start + n_tokens]
        if mask_of_draw[i] >= 0:
            _mask_row(row, masks[mask_of_draw[i]], scratch)
            row = scratch
        token_ids[i] = _draw_row(row, highest(row), keys[i], temperatures[i])
    return token_ids


@compiled()
def draw_with_mass_rows(
    rows: Float32s,
    row_stride: int,
    n_tokens: int,
    row_of_group: npt.NDArray[np.int64],
    temperatures: npt.NDArray[np.float64],
    masks: npt.NDArray[np.bool_],
    mask_of_group: npt.NDArray[np.int64],
    first_of_group: npt.NDArray[np.int64],
    keys: npt.NDArray[np.uint64],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Draws in groups of one row, temperature and mask: (n,) tokens as of `draw_rows`, (k,) as of `log_mass_rows`.

    Args:
        row_of_group, temperatures, mask_of_group: (k,), else as in `draw_rows`.
        first_of_group: (k + 1,) int64; the draws of a group are those from its first to before that of the next.
        keys: (n,) uint64.
    """
    token_ids, log_masses = np.empty(keys.size, np.int64), np.empty(row_of_group.size, np.float64)
    scratch = np.empty(n_tokens, np.float32)
    for group in range(row_of_group.size):
        row = rows[row_of_group[group] * row_stride : row_of_group[group] * row_stride + n_tokens]
        if mask_of_group[group] >= 0:
            _mask_row(row, masks[mask_of_group[group]], scratch)
            row = scratch
        top = highest(row)
        log_masses[group] = _log_mass(row, top, temperatures[group])
        for i in range(first_of_group[group], first_of_group[group + 1]):
            token_ids[i - first_of_group[0]] = _draw_row(row, top, keys[i - first_of_group[0]], temperatures[group])
    return token_ids, log_masses


@compiled()
def draw_among(
    token_ids: npt.NDArray[np.int64], log_scores: npt.NDArray[np.float64], keys: npt.NDArray[np.uint64]
) -> npt.NDArray[np.int64]:
    """Where in each row of a few tokens the drawn one is; each token has the noise that it has in `draw_rows`.

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
            score = log_scores[i, j] + noise_of(bits_of(keys[i], token_ids[i, j]))
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
    masks: npt.NDArray[np.bool_],
    mask_of_sum: npt.NDArray[np.int64],
) -> npt.NDArray[np.float64]:
    """Log of the sum of exp(logprob / temperature) over a row's allowed tokens; arguments as in `draw_rows`.

    Returns:
        (n,) float64; -inf where no token is possible, NaN where one is NaN. At temperature 0, the limit.
    """
    log_masses = np.empty(temperatures.size, np.float64)
    scratch = np.empty(n_tokens, np.float32)
    for i in range(temperatures.size):
        start = row_of_sum[i] * row_stride
        row = rows[start : start + n_tokens]
        if mask_of_sum[i] >= 0:
            _mask_row(row, masks[mask_of_sum[i]], scratch)
            row = scratch
        log_masses[i] = _log_mass(row, highest(row), temperatures[i])
    return log_masses


@compiled()
def _log_mass(row: Float32s, top: np.float32, temperature: float) -> float:
    if math.isinf(top) or math.isnan(top):
        return np.float64(top)
    if temperature == 0.0:
        return 0.0 if top == 0.0 else math.copysign(np.inf, top)
    return np.float64(top) / temperature + math.log(sum_of_exp(row, top, np.float32(1.0 / temperature)))


@compiled()
def _mask_row(row: Float32s, mask: npt.NDArray[np.bool_], masked: Float32s) -> None:
    for v in range(row.size):
        masked[v] = row[v] if mask[v] else np.float32(-np.inf)


@compiled()
def _draw_row(row: Float32s, top: np.float32, key: np.uint64, temperature: float) -> int:
    if not -np.inf < top < np.inf:
        return -1
    best = 0
    while row[best] != top:
        best += 1
    if temperature == 0.0:
        return best
    best_score = _score(row[best], top, temperature, bits_of(key, best))
    hurdle = np.float32(best_score) - _SLACK
    shrunk_inverse = np.float32(_SHRINK / temperature)
    for start in range(0, row.size, _BLOCK):
        stop = min(start + _BLOCK, row.size)
        if not _any_reaches(row, start, stop, key, top, shrunk_inverse, hurdle):
            continue
        for v in range(start, stop):
            bits = bits_of(key, v)
            if _ceiling(row[v], top, shrunk_inverse, bits) >= hurdle:
                score = _score(row[v], top, temperature, bits)
                if score > best_score or (score == best_score and v < best):
                    best, best_score = v, score
                    hurdle = np.float32(best_score) - _SLACK
    return best


@compiled()
def highest(row: Float32s) -> np.float32:
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
def _any_reaches(
    row: Float32s,
    start: int,
    stop: int,
    key: np.uint64,
    top: np.float32,
    shrunk_inverse: np.float32,
    hurdle: np.float32,
) -> bool:
    n_reaching = np.int32(0)
    for v in range(start, stop):
        n_reaching += np.int32(_ceiling(row[v], top, shrunk_inverse, bits_of(key, v)) >= hurdle)
    return bool(n_reaching > 0)


@compiled()
def bits_of(key: np.uint64, token_id: int) -> np.uint64:
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
    score: float = (np.float64(logprob) - np.float64(top)) / temperature + noise_of(bits)
    return score


@compiled()
def noise_of(bits: np.uint64) -> float:
    """The Gumbel noise that these bits stand for."""
    x = min((np.float64(np.int64(bits >> _ONE)) + 0.5) * 2.0**-63, 1.0 - 2.0**-53)
    return -math.log(-math.log1p(-x))


@compiled(fastmath={"reassoc", "contract"})
def sum_of_exp(row: Float32s, top: np.float32, inverse: np.float32) -> float:
    """The sum of exp((entry - top) * inverse), no entry above `top`; to about 3e-7."""
    total = 0.0
    for start in range(0, row.size, _BLOCK):
        block = np.float32(0.0)
        for v in range(start, min(start + _BLOCK, row.size)):
            block += _exp((row[v] - top) * inverse)
        total += np.float64(block)
    return total


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
