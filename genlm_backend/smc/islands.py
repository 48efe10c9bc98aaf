"""Islands: several populations that never wait for each other; only their evidences are put together.

Each resamples by itself, so there is no barrier across the whole, while whatever all of them ask is still computed in
common batches. Each island's weighted particles are unbiased, so all of them together are.

Source: Verge, Dubarry, Del Moral, Moulines 2015, "On parallel implementation of sequential Monte Carlo methods: the
island particle model".
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import numpy as np

from genlm_backend import sampling
from genlm_backend.errors import AllParticlesDead
from genlm_backend.smc.engine import Model, smc
from genlm_backend.smc.result import Result
from genlm_backend.smc.weights import log_mean_exp, normalized


class Islands(NamedTuple):
    """Independent runs of one program."""

    results: tuple[Result, ...]

    @property
    def log_evidence(self) -> float:
        """Log of the mean of the islands' evidences, nats."""
        return log_mean_exp([result.log_evidence for result in self.results])

    @property
    def log_evidence_error(self) -> float:
        """Standard error of `log_evidence`, nats, from how the islands differ; NaN for a single one."""
        if len(self.results) < 2 or self.log_evidence == -math.inf:
            return math.nan
        relative = np.exp([result.log_evidence - self.log_evidence for result in self.results])
        return float(relative.std(ddof=1) / math.sqrt(len(relative)))

    def posterior(self, of: Callable[[Any], Hashable] | None = None) -> dict[Any, float]:
        """As `Result.posterior`, each island weighing as much as its evidence."""
        masses: dict[Any, float] = {}
        for result, share in zip(self.results, normalized([r.log_evidence for r in self.results]), strict=True):
            for value, probability in result.posterior(of).items():
                masses[value] = masses.get(value, 0.0) + float(share) * probability
        return dict(sorted(masses.items(), key=lambda item: -item[1]))


async def islands(model: Model, n_islands: int, n_particles: int, *, seed: int = 0, **options: Any) -> Islands:
    """Run `n_islands` populations of `n_particles` at once.

    An island that dies out counts with evidence 0.

    Args:
        model: As for `smc`.
        n_islands: How many.
        n_particles: On each.
        seed: With the model it fixes all of them.
        options: For `smc`.

    Raises:
        InvalidProgram, NonFiniteWeight, ParticleFailed: As from `smc`; the other islands were stopped.
    """
    runs = [
        asyncio.create_task(_island(model, n_particles, sampling.draw_key(seed, (i,), 0, "island"), options))
        for i in range(n_islands)
    ]
    try:
        return Islands(tuple(await asyncio.gather(*runs)))
    except BaseException:
        for run in runs:
            run.cancel()
        await asyncio.gather(*runs, return_exceptions=True)
        raise


async def _island(model: Model, n_particles: int, seed: int, options: dict[str, Any]) -> Result:
    try:
        return await smc(model, n_particles, seed=seed, **options)
    except AllParticlesDead as dead:
        result: Result = dead.result
        return result
