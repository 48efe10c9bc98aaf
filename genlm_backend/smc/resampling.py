"""Resampling: which particles have how many descendants. Pure functions `(rng, log_weights, n) -> ancestors`.

All are unbiased: particle i has n * w_i descendants in expectation (w normalised). All give exactly n, sorted, and
never one of weight zero. They differ in how far the counts stray from n * w_i:

    multinomial    independent draws                            any count
    residual       floor(n w_i) each, the rest multinomial      at least the floor
    stratified     one draw in each of n equal strata           within 2 of n w_i, exclusive
    systematic     one draw for all strata                      the floor or the ceiling
    ssp            the fractions rounded in pairs               the floor or the ceiling, consistent in any order

`optimal` is different: it keeps distinct particles with weights that are not equal, at least squared error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from genlm_backend.errors import InvalidWeights
from genlm_backend.smc.weights import Floats, Ints, log_sum_exp

Scheme = Callable[[np.random.Generator, npt.ArrayLike, int], Ints]


class Resampled(NamedTuple):
    """A population drawn from another one.

    Attributes:
        ancestors: (n,) int64, sorted: the index of each one's parent.
        log_weights: (n,) float64, nats.
    """

    ancestors: Ints
    log_weights: Floats


def multinomial(rng: np.random.Generator, log_weights: npt.ArrayLike, n: int) -> Ints:
    """Ancestors drawn independently: (n,) int64, sorted.

    Raises:
        InvalidWeights: A weight is NaN or +inf, or all are zero. The same for every scheme.

    Source: Gordon, Salmond, Smith 1993, "Novel approach to nonlinear/non-Gaussian Bayesian state estimation".
    """
    return _at(np.sort(rng.random(n)), _weights(log_weights))


def stratified(rng: np.random.Generator, log_weights: npt.ArrayLike, n: int) -> Ints:
    """Ancestors drawn one in each of n equal strata of the cumulated weights: (n,) int64, sorted.

    Source: Kitagawa 1996, "Monte Carlo filter and smoother for non-Gaussian nonlinear state space models".
    """
    return _at((np.arange(n) + rng.random(n)) / max(n, 1), _weights(log_weights))


def systematic(rng: np.random.Generator, log_weights: npt.ArrayLike, n: int) -> Ints:
    """Ancestors at n equal distances from one random start: (n,) int64, sorted; counts are floor or ceiling of n w_i.

    Source: Carpenter, Clifford, Fearnhead 1999, "Improved particle filter for nonlinear problems".
    """
    return _at((np.arange(n) + rng.random()) / max(n, 1), _weights(log_weights))


def residual(rng: np.random.Generator, log_weights: npt.ArrayLike, n: int) -> Ints:
    """Floor(n w_i) copies of each, the missing ones drawn by what was cut off: (n,) int64, sorted.

    Source: Liu, Chen 1998, "Sequential Monte Carlo methods for dynamic systems".
    """
    counts, fractions = _split(_weights(log_weights), n)
    n_missing = n - int(counts.sum())
    if n_missing:
        counts += np.bincount(_at(np.sort(rng.random(n_missing)), fractions), minlength=len(counts))
    return np.repeat(np.arange(len(counts)), counts)


def ssp(rng: np.random.Generator, log_weights: npt.ArrayLike, n: int) -> Ints:
    """Srinivasan sampling process: the fractions of n w_i are rounded in pairs: (n,) int64, sorted.

    Counts are floor or ceiling of n w_i, and unlike those of systematic resampling negatively associated, so that its
    consistency does not depend on the order of the particles.

    Source: Gerber, Chopin, Whiteley 2019, "Negative association, ordering and convergence of resampling methods",
        section 5; the pairing is that of Deville, Tille 1998, "Unequal probability sampling without replacement
        through a splitting method".
    """
    counts, fractions = _split(_weights(log_weights), n)
    uniforms = rng.random(len(counts)).tolist()
    carrier, carried = -1, 0.0  # who may still be rounded up, and with which probability
    for i, fraction in enumerate(fractions.tolist()):
        if fraction == 0.0:
            continue
        if carrier < 0:
            carrier, carried = i, fraction
            continue
        both = carried + fraction
        if both < 1.0:  # one is rounded down, the other carries both
            if uniforms[i] * both >= carried:
                carrier = i
            carried = both
        else:  # one is rounded up, the other carries what is above 1
            if uniforms[i] * (2.0 - both) < 1.0 - fraction:
                counts[carrier] += 1
                carrier = i
            else:
                counts[i] += 1
            carried = both - 1.0
    if counts.sum() < n:  # what is carried last is 0 or 1, up to rounding errors
        counts[carrier] += 1
    return np.repeat(np.arange(len(counts)), counts)


def optimal(rng: np.random.Generator, log_weights: npt.ArrayLike, n: int) -> Resampled:
    """N particles without replacement, unbiased, with the least expected squared error of the weights.

    Particles above a threshold c keep their weight; of the others as many as are missing are drawn, each at most once,
    by systematic resampling, and all of them get the weight c. With n or fewer of positive weight, all are kept and the
    heaviest are split into equal parts, so that n come out; then nothing is random.

    Raises:
        InvalidWeights: A weight is NaN or +inf, or all are zero.

    Source: Fearnhead, Clifford 2003, "On-line inference for hidden Markov models via particle filters", section 3;
        Lew et al. 2023, "Sequential Monte Carlo steering of large language models using probabilistic programs".
    """
    weights = _weights(log_weights)
    alive = np.flatnonzero(weights)
    if n < 1:
        return Resampled(np.empty(0, np.int64), np.empty(0))
    log_scale = float(np.max(np.asarray(log_weights, np.float64)))
    if len(alive) <= n:
        counts = _shares(weights, alive, n)
        ancestors = np.repeat(np.arange(len(weights)), counts)
        return Resampled(ancestors, np.log(weights[ancestors] / counts[ancestors]) + log_scale)
    order = alive[np.argsort(-weights[alive], kind="stable")]
    ordered = weights[order]
    tails = ordered[::-1].cumsum()[::-1]  # smallest first: sums of tiny weights stay exact
    thresholds = tails[:n] / np.arange(n, 0, -1)
    n_kept = int(np.argmax(ordered[:n] <= thresholds))
    threshold = thresholds[n_kept]
    rest = np.sort(order[n_kept:])
    drawn = rest[_distinct_at(rng.random(), weights[rest] / tails[n_kept], n - n_kept)]
    ancestors = np.sort(np.concatenate([order[:n_kept], drawn]))
    return Resampled(ancestors, np.log(np.maximum(weights[ancestors], threshold)) + log_scale)


def conditional_multinomial(rng: np.random.Generator, log_weights: npt.ArrayLike, n: int) -> Ints:
    """Ancestors of which the first is 0 and the others are drawn independently: (n,) int64, sorted after the first.

    Raises:
        InvalidWeights: A weight is NaN or +inf, or all are zero.

    Source: Andrieu, Doucet, Holenstein 2010, "Particle Markov chain Monte Carlo methods", section 4.3.
    """
    return np.concatenate([[0], multinomial(rng, log_weights, n - 1)])


SCHEMES: dict[str, Scheme] = {
    "multinomial": multinomial,
    "stratified": stratified,
    "systematic": systematic,
    "residual": residual,
    "ssp": ssp,
}
"""Schemes with equal weights afterwards, by the name that `smc(resampling=...)` takes."""


def resample(rng: np.random.Generator, log_weights: npt.ArrayLike, n: int, scheme: str = "systematic") -> Resampled:
    """N particles by a named scheme, with their new log-weights: the sum of the weights is kept, in expectation.

    Args:
        rng: Where the randomness comes from.
        log_weights: (m,) nats; -inf is never chosen.
        n: How many come out.
        scheme: A name from `SCHEMES`, or "optimal".

    Raises:
        InvalidWeights: A weight is NaN or +inf, or all are zero.
        KeyError: No such scheme.
    """
    if scheme == "optimal":
        return optimal(rng, log_weights, n)
    ancestors = SCHEMES[scheme](rng, log_weights, n)
    return Resampled(ancestors, np.full(n, log_sum_exp(log_weights) - math.log(max(n, 1))))


def _weights(log_weights: npt.ArrayLike) -> Floats:
    """Weights relative to the largest one, so that no sum of them over- or underflows."""
    values = np.asarray(log_weights, np.float64)
    top = values.max(initial=-math.inf)
    if not math.isfinite(top):
        raise InvalidWeights([float(value) for value in values.ravel()[:8]], values.size)
    return np.asarray(np.exp(values - top))


def _at(points: Floats, weights: Floats) -> Ints:
    """The particle in whose share of the cumulated weights each point of [0, 1) lies; never one of weight zero."""
    cumulated = weights.cumsum()
    # A point may round up to the end; just below it lies the last particle with weight.
    positions = np.minimum(points * cumulated[-1], np.nextafter(cumulated[-1], 0.0))
    return np.asarray(np.searchsorted(cumulated, positions, side="right"), np.int64)


def _distinct_at(start: float, weights: Floats, n: int) -> Ints:
    """Systematic resampling of n where no weight is above 1 / n, so that none comes twice, also not by rounding."""
    chosen = _at((np.arange(n) + start) / n, weights)
    if np.all(chosen[1:] > chosen[:-1]):
        return chosen
    # A weight of exactly 1 / n was hit at both ends: move on to the next one, from the end back where there is none.
    forward = np.maximum.accumulate(chosen - np.arange(n)) + np.arange(n)
    return np.asarray(np.minimum(forward, len(weights) - n + np.arange(n)))


def _split(weights: Floats, n: int) -> tuple[Ints, Floats]:
    """Integer part and fraction of the expected counts."""
    expected = weights * (n / weights.sum())
    counts = np.floor(expected)
    return counts.astype(np.int64), expected - counts


def _shares(weights: Floats, alive: Ints, n: int) -> Ints:
    """How many of n each gets: one for each with weight, then always one for the largest part."""
    counts = np.zeros(len(weights), np.int64)
    counts[alive] = 1
    for _ in range(n - len(alive)):
        counts[np.argmax(weights / np.maximum(counts, 1))] += 1
    return counts
