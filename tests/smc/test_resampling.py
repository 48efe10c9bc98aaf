"""Every scheme: exactly n out, never one of weight zero, unbiased counts; and the bounds each scheme promises.

Unbiasedness: the mean count of each particle over R runs is within 5.9 standard errors (one failure in 2.7e8 per
number by the normal tail, about 4e-7 over all numbers of this file); standard errors from
the runs themselves. Seeds are fixed.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from genlm_backend.errors import InvalidWeights
from genlm_backend.smc import resampling
from genlm_backend.smc.resampling import SCHEMES, conditional_multinomial, optimal, resample
from genlm_backend.smc.weights import normalized

pytestmark = pytest.mark.thorough

EQUAL_WEIGHTS = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
WEIGHTS = [
    [0.4, 0.0, 0.3, 0.2, 0.05, 0.05],
    [1.0, 1.0, 1.0, 1.0],
    [0.0, 0.0, 1.0],
    [0.5, 0.25, 0.125, 0.125],
    [1e-300, 1e-300, 3e-300],
    [0.9, 0.09, 0.01],
]


def log(weights):
    with np.errstate(divide="ignore"):
        return np.log(np.array(weights))


def deviation(samples: np.ndarray, expected: np.ndarray) -> float:
    """Largest distance of a mean from its expectation, in standard errors; inf where it never varies and is off."""
    off = np.abs(samples.mean(0) - expected)
    error = samples.std(0, ddof=1) / math.sqrt(len(samples))
    return float(np.max(np.where(off < 1e-9, 0.0, off / np.maximum(error, 1e-300))))


def counts_of(scheme, weights, n, n_runs, seed=0):
    rng = np.random.default_rng(seed)
    m = len(weights)
    return np.stack([np.bincount(scheme(rng, log(weights), n), minlength=m) for _ in range(n_runs)]).astype(float)


@EQUAL_WEIGHTS
@pytest.mark.parametrize("n", [1, 3, 8])
def test_expected_counts_are_n_times_the_weights(scheme, n):
    for weights in WEIGHTS:
        assert deviation(counts_of(scheme, weights, n, 600), n * normalized(log(weights))) < 5.9


def test_a_biased_scheme_is_rejected():
    def shifted(rng, log_weights, n):  # one stratum too far
        weights = normalized(log_weights)
        points = np.minimum((np.arange(n) + 0.5 + rng.random(n) / 2) / n, 0.999)
        return np.searchsorted(weights.cumsum(), points, side="right")

    assert deviation(counts_of(shifted, WEIGHTS[0], 3, 600), 3 * normalized(log(WEIGHTS[0]))) > 5.9


@pytest.mark.parametrize("name", ["systematic", "ssp"])
def test_counts_are_the_floor_or_the_ceiling(name):
    for weights in WEIGHTS:
        for n in (1, 3, 8):
            expected = n * normalized(log(weights))
            counts = counts_of(SCHEMES[name], weights, n, 300)
            assert (counts >= np.floor(expected - 1e-9)).all() and (counts <= np.ceil(expected + 1e-9)).all()


def test_residual_gives_at_least_the_floor_and_stratified_is_within_two():
    for weights in WEIGHTS:
        expected = 8 * normalized(log(weights))
        assert (counts_of(SCHEMES["residual"], weights, 8, 300) >= np.floor(expected - 1e-9)).all()
        assert (np.abs(counts_of(SCHEMES["stratified"], weights, 8, 300) - expected) < 2).all()


@pytest.mark.parametrize("n", [1, 2, 3])
def test_optimal_resampling_is_unbiased_and_without_replacement(n):
    rng = np.random.default_rng(1)
    for weights in WEIGHTS:
        total = np.zeros((600, len(weights)))
        for run in range(600):
            drawn = optimal(rng, log(weights), n)
            if np.count_nonzero(weights) >= n:
                assert len(set(drawn.ancestors.tolist())) == n
            np.add.at(total[run], drawn.ancestors, np.exp(drawn.log_weights))
        assert deviation(total / np.sum(weights), normalized(log(weights))) < 5.9


def test_optimal_resampling_keeps_heavy_particles_exactly_and_gives_the_others_one_weight():
    drawn = optimal(np.random.default_rng(0), log([0.5, 0.3, 0.1, 0.06, 0.04]), 3)
    assert drawn.ancestors[0] == 0 and drawn.ancestors[1] == 1
    np.testing.assert_allclose(np.exp(drawn.log_weights), [0.5, 0.3, 0.2])


def test_optimal_resampling_splits_where_too_few_are_alive():
    drawn = optimal(np.random.default_rng(0), log([0.0, 0.75, 0.25]), 4)
    assert drawn.ancestors.tolist() == [1, 1, 1, 2]
    np.testing.assert_allclose(np.exp(drawn.log_weights), [0.25] * 4)


def test_the_errors_of_systematic_and_optimal_are_below_that_of_multinomial():
    weights = WEIGHTS[0]
    variance = {name: counts_of(SCHEMES[name], weights, 4, 600).var(0).sum() for name in SCHEMES}
    assert max(variance["systematic"], variance["ssp"], variance["residual"]) < 0.7 * variance["multinomial"]


def test_conditional_multinomial_keeps_the_first():
    rng = np.random.default_rng(0)
    drawn = np.stack([conditional_multinomial(rng, log(WEIGHTS[0]), 5) for _ in range(600)])
    assert (drawn[:, 0] == 0).all()
    counts = np.stack([np.bincount(row[1:], minlength=6) for row in drawn]).astype(float)
    assert deviation(counts, 4 * normalized(log(WEIGHTS[0]))) < 5.9


@pytest.mark.parametrize("name", [*SCHEMES, "optimal"])
@pytest.mark.parametrize("bad", [[math.nan, 0.0], [math.inf, 0.0], [-math.inf, -math.inf], []])
def test_weights_without_a_law_are_named(name, bad):
    with pytest.raises(InvalidWeights, match="expected no NaN"):
        resample(np.random.default_rng(0), bad, 2, name)


@pytest.mark.parametrize("name", [*SCHEMES, "optimal"])
def test_the_sum_of_the_weights_is_kept(name):
    for weights in WEIGHTS:
        drawn = resample(np.random.default_rng(0), log(weights), 4, name)
        np.testing.assert_allclose(
            np.exp(drawn.log_weights).sum(), np.sum(weights), rtol=0.6 if name == "optimal" else 1e-9
        )


class LastPoint:
    """A generator whose numbers are the largest below 1."""

    def random(self, n=None):
        largest = np.nextafter(1.0, 0.0)
        return largest if n is None else np.full(n, largest)


class FirstPoint:
    """A generator whose numbers are 0."""

    def random(self, n=None):
        return 0.0 if n is None else np.zeros(n)


@pytest.mark.parametrize("name", [*SCHEMES, "optimal"])
@pytest.mark.parametrize("rng", [LastPoint(), FirstPoint()])
def test_extreme_random_numbers_choose_no_particle_without_weight(name, rng):
    for weights in [*WEIGHTS, [0.0, 1.0, 0.0], [0.0] * 5 + [0.1] * 10 + [0.0] * 5]:
        for n in (1, 2, 5, 16):
            ancestors = resample(rng, log(weights), n, name).ancestors
            assert len(ancestors) == n and (np.array(weights)[ancestors] > 0).all()


def random_weights(rng: np.random.Generator) -> np.ndarray:
    """Vectors of every nasty kind: zeros, subnormal, one-hot, equal, huge ranges; at least one positive."""
    m = int(rng.integers(1, 9))
    kind = rng.integers(6)
    with np.errstate(divide="ignore"):
        if kind == 0:
            weights = np.log(rng.random(m))
        elif kind == 1:
            weights = rng.normal(0, 300, m)
        elif kind == 2:
            weights = np.where(np.arange(m) == rng.integers(m), rng.normal(), -np.inf)
        elif kind == 3:
            weights = np.log(rng.integers(1, 1000, m) * 5e-324)
        elif kind == 4:
            weights = np.log(rng.integers(0, 4, m).astype(float))
        else:
            weights = np.zeros(m) - 700.0 * rng.integers(0, 3, m)
    weights[rng.random(m) < 0.2] = -np.inf
    if not np.isfinite(weights).any():
        weights[rng.integers(m)] = rng.normal()
    return weights


def check_many(n_vectors: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    names = [*SCHEMES, "optimal"]
    for i in range(n_vectors):
        weights, n = random_weights(rng), int(rng.integers(1, 9))
        name = names[i % len(names)]
        if name == "optimal":
            ancestors, log_weights = resampling.optimal(rng, weights, n)
            assert np.isfinite(log_weights).all()
            assert np.exp(weights - weights.max()).astype(bool).sum() < n or (ancestors[1:] > ancestors[:-1]).all(), (
                name,
                weights,
                n,
            )
        else:
            ancestors = SCHEMES[name](rng, weights, n)
        assert len(ancestors) == n, (name, weights, n)
        assert (weights[ancestors] > -np.inf).all(), (name, weights, n)
        assert (ancestors[1:] >= ancestors[:-1]).all(), (name, weights, n)


def test_thousands_of_random_weight_vectors():
    check_many(6_000, seed=0)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_million_random_weight_vectors():
    check_many(1_000_000, seed=1)
