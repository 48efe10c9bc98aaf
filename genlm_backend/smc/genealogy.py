"""Who descends from whom: ancestors of each generation, as plain data and pure functions.

A genealogy is a list of generations; each is (n,) integers, the index of each particle's parent in the generation
before, the first in the population that the run began with. A step without resampling has `range(n)`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from genlm_backend.smc.weights import Ints

Generations = Sequence[Sequence[int] | Ints]


def lineage(generations: Generations, particle: int) -> list[int]:
    """The index of a particle of the last generation and of its ancestors, oldest first: n_generations + 1 integers."""
    line = [particle]
    for parents in reversed(generations):
        line.append(int(parents[line[-1]]))
    return line[::-1]


def eves(generations: Generations, n: int) -> Ints:
    """For each particle of the last generation, its ancestor in the first population of n."""
    current = np.arange(n)
    for parents in generations:
        current = current[np.asarray(parents, np.int64)]
    return current


def survivors(generations: Generations, n: int) -> list[int]:
    """How many of each population, oldest first, have a descendant in the last one: n_generations + 1 integers."""
    sizes = [n, *(len(parents) for parents in generations)]
    alive = np.arange(sizes[-1])
    counts = [len(alive)]
    for parents in reversed(generations):
        alive = np.unique(np.asarray(parents, np.int64)[alive])
        counts.append(len(alive))
    return counts[::-1]


def coalescence(generations: Generations, n: int) -> int | None:
    """How many generations ago the last population has one common ancestor; None if it has none."""
    counts = survivors(generations, n)
    together = [i for i, count in enumerate(counts) if count == 1]
    return len(counts) - 1 - together[-1] if together else None
