"""Log-weights: sums that neither over- nor underflow, effective sample size, and descent."""

from __future__ import annotations

import math

import numpy as np
import pytest

from genlm_backend.smc.genealogy import coalescence, eves, lineage, survivors
from genlm_backend.smc.weights import (
    effective_sample_size,
    log_mean_exp,
    log_sum_exp,
    normalized,
    relative_variance,
)


def test_sums_of_tiny_and_huge_weights():
    assert log_sum_exp([-1000.0, -1000.0]) == pytest.approx(-1000 + math.log(2))
    assert log_sum_exp([1000.0, -math.inf]) == 1000.0
    assert log_sum_exp([]) == log_mean_exp([]) == log_sum_exp([-math.inf]) == -math.inf
    assert log_mean_exp([0.0, -math.inf]) == pytest.approx(math.log(0.5))


def test_normalized_weights_sum_to_one_or_are_all_zero():
    assert normalized([-800.0, -800.0, -math.inf]).tolist() == [0.5, 0.5, 0.0]
    assert normalized([-math.inf]).tolist() == [0.0]


@pytest.mark.parametrize(("weights", "expected"), [([1, 1, 1, 1], 4), ([1, 0, 0], 1), ([3, 1], 1.6), ([0, 0], 0)])
def test_effective_sample_size(weights, expected):
    with np.errstate(divide="ignore"):
        assert effective_sample_size(np.log(weights)) == pytest.approx(expected)


def test_without_resampling_the_variance_is_that_of_a_mean():
    weights = np.array([0.5, 1.5, 1.0, 0.2])
    expected = weights.var(ddof=1) / weights.mean() ** 2 / 4
    assert relative_variance(np.log(weights), np.arange(4), 0, 4) == pytest.approx(expected)


def test_one_common_ancestor_knows_nothing_about_the_variance():
    assert relative_variance(np.zeros(4), [2, 2, 2, 2], 3, 4) == 1.0
    assert math.isnan(relative_variance([0.0], [0], 0, 1))


def test_descent():
    generations = [[0, 0, 2], [1, 2, 2]]
    assert lineage(generations, 0) == [0, 1, 0]
    assert lineage(generations, 2) == [2, 2, 2]
    assert eves(generations, 3).tolist() == [0, 2, 2]
    assert survivors(generations, 3) == [2, 2, 3]
    assert coalescence(generations, 3) is None
    assert coalescence([*generations, [1, 1, 2]], 3) == 2
