"""Particle Gibbs: a Markov chain over whole paths, each drawn by conditional SMC given the one before.

One iteration runs `smc(..., retained=path)`, in which the path is a particle that always survives, and draws the next
path by the final weights. For any number of particles from 2 up, the law of the program is invariant.

Source: Andrieu, Doucet, Holenstein 2010, "Particle Markov chain Monte Carlo methods", section 4.5.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from genlm_backend import sampling
from genlm_backend.errors import AllParticlesDead
from genlm_backend.smc.engine import Model, smc
from genlm_backend.smc.moves import Kernel
from genlm_backend.smc.result import Result
from genlm_backend.smc.trace import Path


class Chain(NamedTuple):
    """What particle Gibbs visited.

    Attributes:
        paths: One per iteration, the last one last.
        log_evidences: Of each conditional run, nats. Not unbiased: the retained path is part of it.
    """

    paths: tuple[Path, ...]
    log_evidences: tuple[float, ...]

    @property
    def values(self) -> list[Any]:
        """What the program returned on each path."""
        return [path.value for path in self.paths]


async def particle_gibbs(
    model: Model,
    n_particles: int,
    n_iterations: int,
    *,
    seed: int = 0,
    initial: Path | None = None,
    ess_threshold: float = 0.5,
    kernel: Kernel | None = None,
) -> Chain:
    """Iterate conditional SMC.

    Args:
        model: As for `smc`.
        n_particles: In each run, the retained one among them; at least 2 for the chain to move.
        n_iterations: How many paths to draw.
        seed: With the model it fixes the chain.
        initial: Where the chain begins; None draws it with `smc`.
        ess_threshold: As in `smc`.
        kernel: As in `smc`; the retained path is not moved.

    Raises:
        AllParticlesDead: No initial path was found; give one, or more particles.
        NonFiniteWeight, ParticleFailed: As from `smc`.
    """
    path = initial
    if path is None:
        first_seed = sampling.draw_key(seed, (), 0, "particle gibbs")
        first = await smc(model, n_particles, seed=first_seed, ess_threshold=ess_threshold, kernel=kernel)
        path = draw_path(first, sampling.draw_key(seed, (), 0, "initial path"))
    paths, log_evidences = [], []
    for iteration in range(1, n_iterations + 1):
        run = await smc(
            model,
            n_particles,
            seed=sampling.draw_key(seed, (), iteration, "particle gibbs"),
            ess_threshold=ess_threshold,
            retained=path,
            kernel=kernel,
        )
        path = draw_path(run, sampling.draw_key(seed, (), iteration, "path"))
        paths.append(path)
        log_evidences.append(run.log_evidence)
    return Chain(tuple(paths), tuple(log_evidences))


def draw_path(result: Result, key: int) -> Path:
    """A path of a result, drawn by the weights.

    Raises:
        AllParticlesDead: None has weight.
    """
    (index,) = sampling.draw(torch.tensor([result.log_weights], dtype=torch.float64), [key]).tolist()
    if index < 0:
        raise AllParticlesDead(len(result.steps), result.settings.n_particles)
    path: Path = result.paths[index]
    return path
