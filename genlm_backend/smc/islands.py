"""Islands: several populations that never wait for each other; only their evidences are put together.

Each resamples by itself, so there is no barrier across the whole, while whatever all of them ask is still computed in
common batches. Each island's weighted particles are unbiased, so all of them together are.

Source: Verge, Dubarry, Del Moral, Moulines 2015, "On parallel implementation of sequential Monte Carlo methods: the
island particle model".
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine, Hashable, Sequence
from pathlib import Path as FilePath
from typing import Any, NamedTuple

import numpy as np

from genlm_backend import sampling
from genlm_backend.errors import AllParticlesDead, InvalidProgram
from genlm_backend.smc import plain
from genlm_backend.smc.engine import Model, resume, smc
from genlm_backend.smc.result import Result
from genlm_backend.smc.weights import log_mean_exp, normalized

_FORM = "genlm_backend islands 1"


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

    def save(self, path: str | FilePath) -> None:
        """Write them as JSON; `Islands.load` gives equal ones, and `resume_islands` goes on from them.

        Raises:
            TypeError: A value or a drawn choice is not plain data.
        """
        plain.save(path, _FORM, {"results": [result.as_plain() for result in self.results]})

    @classmethod
    def load(cls, path: str | FilePath) -> Islands:
        """Saved islands.

        Raises:
            ValueError: The file holds something else.
        """
        return cls(tuple(Result.of_plain(data) for data in plain.load(path, _FORM)["results"]))


async def islands(model: Model, n_islands: int, n_particles: int, *, seed: int = 0, **options: Any) -> Islands:
    """Run `n_islands` populations of `n_particles` at once.

    An island that dies out counts with evidence 0.

    Args:
        model: As for `smc`.
        n_islands: How many.
        n_particles: On each.
        seed: With the model it fixes all of them.
        options: For `smc`; with `max_steps` each island pauses after so many steps, see `resume_islands`.

    Raises:
        InvalidProgram, NonFiniteWeight, ParticleFailed: As from `smc`; the other islands were stopped. To keep what
            they had, take `on_failure="mark"` and resume.
        InvalidProgram: A `recording` was given: it is of one population.
    """
    _check(options)
    seeds = [sampling.draw_key(seed, (i,), 0, "island") for i in range(n_islands)]

    async def start(own: int) -> Result:
        return await _or_dead(smc(model, n_particles, seed=own, **options))

    return await _all([start(own) for own in seeds])


async def resume_islands(model: Model, saved: Islands, **options: Any) -> Islands:
    """Go on with paused or failed islands: the result is that of islands that were never interrupted.

    Those that are complete, or have died out, stay as they are.

    Args:
        model: The same as before.
        saved: From `islands(..., max_steps=...)`, or loaded.
        options: For `resume`; the kernel is the same as before.

    Raises:
        InvalidProgram, NonFiniteWeight, ParticleFailed: As from `resume`; the other islands were stopped.
    """
    _check(options)

    async def go_on(result: Result) -> Result:
        is_over = result.status == "complete" or max(result.log_weights) == -math.inf
        return result if is_over else await _or_dead(resume(model, result, **options))

    return await _all([go_on(result) for result in saved.results])


def _check(options: dict[str, Any]) -> None:
    if options.get("recording") is not None:
        raise InvalidProgram("islands with one recording", "record runs of `smc`; it keeps the draws of one population")


async def _or_dead(run: Coroutine[Any, Any, Result]) -> Result:
    try:
        return await run
    except AllParticlesDead as dead:
        result: Result = dead.result
        return result


async def _all(coroutines: Sequence[Coroutine[Any, Any, Result]]) -> Islands:
    """All at once. The first failure, or being cancelled, stops the others; it leaves when they have ended."""
    runs = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        return Islands(tuple(await asyncio.gather(*runs)))
    except BaseException:
        for run in runs:
            run.cancel()
        await asyncio.gather(*runs, return_exceptions=True)
        raise
