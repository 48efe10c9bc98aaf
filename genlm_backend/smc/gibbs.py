"""Particle Gibbs: a Markov chain over whole paths, each drawn by conditional SMC given the one before.

One iteration runs `smc(..., retained=path)`, in which the path is a particle that always survives, and draws the next
path by the final weights. For any number of particles from 2 up, the law of the program is invariant.

Source: Andrieu, Doucet, Holenstein 2010, "Particle Markov chain Monte Carlo methods", section 4.5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from genlm_backend import sampling
from genlm_backend.errors import AllParticlesDead, InferenceFailed
from genlm_backend.smc.engine import Model, smc
from genlm_backend.smc.moves import Kernel, move_path
from genlm_backend.smc.programs import start_of
from genlm_backend.smc.result import Result
from genlm_backend.smc.trace import Path


class Chain(NamedTuple):
    """What particle Gibbs visited.

    Attributes:
        paths: One per iteration, the last one last.
        log_evidences: Of each conditional run, nats. Not unbiased: the retained path is part of it.
    """

    paths: tuple[Path, ...] = ()
    log_evidences: tuple[float, ...] = ()

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
    chain: Chain | None = None,
    ess_threshold: float = 0.5,
    kernel: Kernel | None = None,
    on_iteration: Callable[[Chain], None] | None = None,
) -> Chain:
    """Iterate conditional SMC.

    Args:
        model: As for `smc`.
        n_particles: In each run, the retained one among them; at least 2 for the chain to move.
        n_iterations: How many paths to draw, those of `chain` included.
        seed: With the model it fixes the chain.
        initial: Where the chain begins, a complete path; None draws it with `smc`.
        chain: Go on with this one: the result is that of a chain that was never interrupted.
        ess_threshold: As in `smc`.
        kernel: Moves each path once it is drawn, complete; see `moves`.
        on_iteration: Called after each iteration with the chain so far.

    Raises:
        AllParticlesDead: No initial path was found; give one, or more particles.
        NonFiniteWeight, ParticleFailed: As from `smc`; what was visited so far is the error's `result`, a `Chain`.
    """
    so_far = Chain() if chain is None else chain
    path = so_far.paths[-1] if so_far.paths else initial
    for iteration in range(len(so_far.paths) + 1, n_iterations + 1):
        run_seed = sampling.draw_key(seed, (), iteration, "particle gibbs")
        try:
            if path is None:
                first_seed = sampling.draw_key(seed, (), 0, "particle gibbs")
                first = await smc(model, n_particles, seed=first_seed, ess_threshold=ess_threshold, kernel=kernel)
                path = draw_path(first, sampling.draw_key(seed, (), 0, "initial path"))
            run = await smc(model, n_particles, seed=run_seed, ess_threshold=ess_threshold, retained=path)
            path = draw_path(run, sampling.draw_key(seed, (), iteration, "path"))
            if kernel is not None:
                path = await move_path(kernel, start_of(model), path, sampling.draw_key(seed, (), iteration, "move"))
        except InferenceFailed as error:
            error.result = so_far
            raise
        so_far = Chain((*so_far.paths, path), (*so_far.log_evidences, run.log_evidence))
        if on_iteration is not None:
            on_iteration(so_far)
    return so_far


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
