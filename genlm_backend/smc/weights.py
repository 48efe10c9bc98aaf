"""Log-weights of a population: evidence, effective sample size, and the variance of the evidence from one run.

A population is `log_weights`, nats, unnormalised; -inf is a dead particle. Their mean estimates the evidence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def log_sum_exp(log_weights: npt.ArrayLike) -> float:
    """Log of the sum of the weights, nats; -inf for none, or if all are zero."""
    values = np.asarray(log_weights, np.float64)
    top = float(values.max(initial=-math.inf))
    if not math.isfinite(top):
        return top
    return top + math.log(math.fsum(np.exp(values - top)))


def log_mean_exp(log_weights: npt.ArrayLike) -> float:
    """Log of the mean weight, nats: the log-evidence of a population. -inf for no weight at all."""
    n = len(np.asarray(log_weights))
    return log_sum_exp(log_weights) - math.log(n) if n else -math.inf


def normalized(log_weights: npt.ArrayLike) -> Floats:
    """The weights, (n,) float64 with sum 1; all zero if all are zero."""
    values = np.asarray(log_weights, np.float64)
    top = values.max(initial=-math.inf)
    if top == -math.inf:
        return np.zeros(values.shape)
    weights = np.exp(values - top)
    return np.asarray(weights / weights.sum())


def effective_sample_size(log_weights: npt.ArrayLike) -> float:
    """(sum w)^2 / sum w^2, from 1 to n; 0 if all weights are zero.

    Source: Kong, Liu, Wong 1994, "Sequential imputations and Bayesian missing data problems".
    """
    weights = normalized(log_weights)
    return 1.0 / float(weights @ weights) if weights.any() else 0.0


def relative_variance(log_weights: npt.ArrayLike, eves: Sequence[int] | Ints, n_resamplings: int, n: int) -> float:
    """Estimate, from one run, of Var(Z_hat) / Z^2 where Z_hat is the run's evidence.

    With multinomial resampling, exactly unbiased for Var(Z_hat) when multiplied by Z_hat^2; with the other schemes, an
    over-estimate. Its square root estimates the standard error of the log-evidence. When all particles descend from
    one at the start it says 1 and knows nothing.

    Args:
        log_weights: Final weights, (m,).
        eves: For each particle, which of the first generation it descends from, (m,).
        n_resamplings: How often the population was resampled.
        n: Size of the population.

    Returns:
        A number from 0 (clipped) up; NaN where fewer than two particles leave nothing to estimate from.

    Source: Lee, Whiteley 2018, "Variance estimation in the particle filter", equation 6; without resampling it is the
        sample variance of the weights over their squared mean and n.
    """
    if n < 2:
        return math.nan
    weights = normalized(log_weights)
    if not weights.any():
        return math.nan
    per_eve = np.bincount(np.asarray(eves, np.int64), weights)
    between = 1.0 - float(per_eve @ per_eve)
    return max(0.0, 1.0 - (n / (n - 1)) ** (n_resamplings + 1) * between)
