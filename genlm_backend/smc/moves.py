"""Moves: a kernel changes each particle after resampling without changing the law, so that copies differ again.

`regenerate` is the general one: keep the choices before a random one, draw the rest anew, accept by Metropolis and
Hastings. A kernel of your own is an async function of a `Move`: it makes candidates with `await move.candidate(k)` and
returns one of them, or None to stay.

Why `regenerate` is right. The law after t steps is, up to a constant, q(x) W(x): what the program proposes times the
weight of the steps. A candidate y keeps the first k choices of x, k being uniform among the n(x) of them, and draws the
rest from q. In the ratio of Metropolis and Hastings q cancels: accept with probability min(1, W(y) n(x) / (W(x) n(y))).
Random weights (AWRS) stay right: they are part of what is drawn anew.

Source: Gilks, Berzuini 2001, "Following a moving target: Monte Carlo inference for dynamic Bayesian models"; the move
is that of Wingate, Stuhlmueller, Goodman 2011, "Lightweight implementations of probabilistic programming languages via
transformational compilation", with everything after the site drawn anew.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from genlm_backend import sampling
from genlm_backend.errors import InferenceFailed, NonFiniteWeight, ParticleFailed
from genlm_backend.smc.programs import Start
from genlm_backend.smc.recording import Recording
from genlm_backend.smc.strands import Live, Strand, close_all
from genlm_backend.smc.trace import Path


class Candidate(NamedTuple):
    """A particle that may replace another one.

    Attributes:
        path: Where it came from, to the same step.
        log_weight: The sum of its increments, nats; -inf if it died on the way.
    """

    path: Path
    log_weight: float
    strand: Live


Kernel = Callable[["Move"], Awaitable[Candidate | None]]


class Move:
    """What a kernel sees of one particle.

    Attributes:
        path: The particle as it is.
        log_weight: The sum of its increments, nats.
    """

    def __init__(self, start: Start, path: Path, n_steps: float, seed: int, recording: Recording | None) -> None:
        self.path = path
        self._n_steps = n_steps
        self.log_weight = math.fsum(path.log_increments)
        self.candidates: list[Candidate] = []
        self._start, self._seed, self._recording = start, seed, recording
        self._n_keys = 0

    def uniform(self) -> float:
        """A random number, 0 <= u < 1; another one each time."""
        self._n_keys += 1
        return (sampling.draw_key(self._seed, (), self._n_keys, "move") >> 11) * 2.0**-53

    async def candidate(self, n_kept: int) -> Candidate:
        """The particle with its first `n_kept` choices, and all after them drawn anew, to the same step."""
        seed = sampling.draw_key(self._seed, (), len(self.candidates), "candidate")
        entries = self.path.entries
        at = [i for i, entry in enumerate(entries) if entry.kind == "sample"]
        cut = at[n_kept] if n_kept < len(at) else len(entries)
        n_whole = sum(entry.kind == "checkpoint" for entry in entries[:cut])
        begin = self.path.first(n_whole)
        kept = entries[len(begin.entries) : cut]
        strand = Live.of_path(self._start, seed, begin, self._recording, kept)
        step = n_whole
        try:
            while strand.status == "running" and step < self._n_steps:
                await strand.advance(0, step)
                step += 1
        finally:
            made = Candidate(strand.path(), math.fsum(strand.log_increments), strand)
            self.candidates.append(made)
        return made


async def regenerate(move: Move) -> Candidate | None:
    """Draw everything after a random choice anew; see the top of this file."""
    n = len(move.path.choices)
    if n == 0:
        return None
    candidate = await move.candidate(int(move.uniform() * n))
    log_ratio = candidate.log_weight - move.log_weight + math.log(n) - math.log(max(1, len(candidate.path.choices)))
    return candidate if math.log(max(move.uniform(), 1e-300)) < log_ratio else None


async def move(
    kernel: Kernel, start: Start, strand: Strand, seed: int, particle: int, step: int, recording: Recording | None
) -> Strand:
    """The strand after a kernel: the same one, or that of the candidate it chose.

    Raises:
        NonFiniteWeight, ParticleFailed: What the kernel or a candidate raised, naming this step and particle.
    """
    offer = Move(start, strand.path(), step + 1, sampling.draw_key(seed, (particle,), step, "move"), recording)
    try:
        chosen = await _chosen(kernel, offer)
    except (NonFiniteWeight, ParticleFailed) as error:
        raise type(error)(step, particle, f"{error.data[2]} (in a candidate of the kernel)") from error.__cause__
    except Exception as error:
        raise ParticleFailed(step, particle, f"{type(error).__name__}: {error} (in the kernel)") from error
    if chosen is None:
        return strand
    try:
        await strand.close()
    except BaseException:
        await chosen.strand.close()
        raise
    chosen.strand.context.seed = seed
    return chosen.strand


async def move_path(kernel: Kernel, start: Start, path: Path, seed: int) -> Path:
    """A complete path after a kernel, whose candidates run to their end.

    Raises:
        NonFiniteWeight, ParticleFailed: What the kernel or a candidate raised.
    """
    try:
        chosen = await _chosen(kernel, Move(start, path, math.inf, seed, None))
    except InferenceFailed:
        raise
    except Exception as error:
        n_steps = len(path.log_increments)
        raise ParticleFailed(n_steps, 0, f"{type(error).__name__}: {error} (in the kernel)") from error
    return path if chosen is None else chosen.path


async def _chosen(kernel: Kernel, offer: Move) -> Candidate | None:
    chosen = None
    try:
        chosen = await kernel(offer)
    finally:
        await close_all(candidate.strand for candidate in offer.candidates if candidate is not chosen)
    return chosen
