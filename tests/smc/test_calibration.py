"""Simulation-based calibration and the joint test of Geweke, exact for any number of particles.

Both rest on particle Gibbs leaving the posterior invariant. theta is drawn from the prior and y from theta; then theta
is a draw from the posterior given y, and a chain of particle Gibbs that begins there stays in law.

- Ranks: with L forward steps split at a uniform place into steps before and after theta (the kernel is reversible), the
  rank of theta among its chain is uniform. Checked by Weissman's bound at delta = 1e-9.
- Geweke: alternating theta | y by the kernel and y | theta, the pair keeps its joint law, also by Weissman's bound.

Sources: Talts et al. 2018, arXiv 1804.06788; Gandy, Scott 2020, arXiv 2001.06465 (ranks of chains); Geweke 2004,
"Getting it right".
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from genlm_backend.smc import Categorical, gibbs, particle_gibbs, program
from genlm_backend.smc.enumeration import Exact
from genlm_backend.smc.trace import Entry, Path
from tests.smc.oracle import law_distance, law_distance_bound

pytestmark = pytest.mark.thorough

VALUES = tuple(range(6))
PRIOR = (3, 2, 2, 1, 1, 3)


def likelihood(theta: int) -> Categorical:
    return Categorical((0, 1, 2), [8.0 if y == theta % 3 else 1.0 + y for y in range(3)])


@program
async def observed(ctx, data):
    theta = await ctx.sample(Categorical(VALUES, PRIOR))
    for y in data:
        await ctx.checkpoint()
        ctx.observe(likelihood(theta), y)
    return theta


def path_of(theta: int, data) -> Path:
    """The path on which the program drew this value."""
    entries = (Entry("sample", theta), *(Entry("checkpoint") for _ in data))
    return Path(entries, (0.0, *(likelihood(theta).logprob(y) for y in data)), "done", theta)


def joint(rng: np.random.Generator):
    theta = int(rng.choice(VALUES, p=np.array(PRIOR) / sum(PRIOR)))
    return theta, draw_data(rng, theta)


def draw_data(rng: np.random.Generator, theta: int):
    weights = np.array(likelihood(theta).weights)
    return tuple(int(y) for y in rng.choice(3, size=2, p=weights / weights.sum()))


async def ranks(n_sims: int, length: int = 5) -> list[int]:
    rng = np.random.default_rng(0)
    found = []
    for sim in range(n_sims):
        theta, data = joint(rng)
        n_before = int(rng.integers(0, length + 1))
        begin = path_of(theta, data)
        others = []
        for part, n in enumerate((n_before, length - n_before)):
            if n:
                visited = await particle_gibbs(
                    observed(data), 3, n, seed=2 * sim + part, initial=begin, ess_threshold=1.0
                )
                others += visited.values
        own = (theta, rng.random())  # equal values in random order
        found.append(sum((value, rng.random()) < own for value in others))
    return found


async def geweke(n_chains: int) -> list[tuple]:
    rng = np.random.default_rng(1)
    pairs = []
    for chain in range(n_chains):
        theta, data = joint(rng)
        for sweep in range(2):
            begin = path_of(theta, data)
            visited = await particle_gibbs(
                observed(data), 3, 1, seed=2 * chain + sweep, initial=begin, ess_threshold=1.0
            )
            theta = visited.values[-1]
            data = draw_data(rng, theta)
        pairs.append((theta, data[0]))
    return pairs


def joint_law() -> Exact:
    law = {}
    for theta, p in zip(VALUES, PRIOR, strict=True):
        for y in range(3):
            law[theta, y] = p / sum(PRIOR) * math.exp(likelihood(theta).logprob(y))
    return Exact(0.0, law)


SIZES = pytest.mark.parametrize(
    "n",
    [pytest.param(150, id="few"), pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(900)], id="many")],
)


@SIZES
async def test_ranks_are_uniform(n):
    uniform = Exact(0.0, dict.fromkeys(range(6), 1 / 6))
    assert law_distance(await ranks(n), uniform) < law_distance_bound(6, n)


@SIZES
async def test_the_joint_law_is_kept(n):
    assert law_distance(await geweke(n), joint_law()) < law_distance_bound(18, n)


async def test_a_chain_that_moves_to_the_largest_value_fails_both(monkeypatch):
    def largest(result, key):
        return max(result.paths, key=lambda path: path.value)

    monkeypatch.setattr(gibbs, "draw_path", largest)
    uniform = Exact(0.0, dict.fromkeys(range(6), 1 / 6))
    assert law_distance(await ranks(300), uniform) > law_distance_bound(6, 300)
    assert law_distance(await geweke(300), joint_law()) > law_distance_bound(18, 300)
