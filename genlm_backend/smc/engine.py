"""smc: moves all particles at once, weighs them, resamples them; every algorithm is this loop with other settings.

    propose   each particle runs to its next checkpoint, all concurrently: whatever they ask becomes one batch
    weigh     the step's increments are added
    resample  when the effective sample size is below a share of n; all weights become their mean

Randomness: each draw has a key made of seed, step, place in the population and its number within the step; each
resampling one of seed and step. So nothing depends on who is answered first.
"""

from __future__ import annotations

import asyncio
import math
import platform
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Literal

import numpy as np
import torch

import genlm_backend
from genlm_backend import sampling
from genlm_backend.errors import AllParticlesDead, InferenceFailed, InvalidProgram
from genlm_backend.smc.context import Context
from genlm_backend.smc.moves import Kernel, move
from genlm_backend.smc.programs import Particle, Program, Start, start_of
from genlm_backend.smc.recording import Recording
from genlm_backend.smc.resampling import SCHEMES, Resampled, conditional_multinomial, resample
from genlm_backend.smc.result import Result, Settings, Step
from genlm_backend.smc.strands import Live, Retained, Strand, close_all
from genlm_backend.smc.trace import Path, text_of
from genlm_backend.smc.weights import effective_sample_size, log_sum_exp

Method = Literal["smc", "importance", "best_of_n", "beam", "steer"]
Model = Particle | Program | Callable[[Context], Coroutine[Any, Any, Any]]

METHODS: tuple[str, ...] = ("smc", "importance", "best_of_n", "beam", "steer")


async def smc(
    model: Model,
    n_particles: int,
    *,
    ess_threshold: float = 0.5,
    resampling: str = "systematic",
    seed: int = 0,
    method: Method = "smc",
    n_branches: int = 2,
    kernel: Kernel | None = None,
    retained: Path | None = None,
    max_steps: int | None = None,
    on_failure: Literal["raise", "mark"] = "raise",
    on_step: Callable[[Step, int], None] | None = None,
    recording: Recording | None = None,
) -> Result:
    """Run a population of particles to their end.

    Args:
        model: A `Particle`, what a `@program` function returned, or an async function of a context.
        n_particles: Size of the population.
        ess_threshold: Resample when the effective sample size is below this share of `n_particles`; 0 never, 1 always.
            Where nothing is to be resampled no particle waits for another.
        resampling: "systematic", "stratified", "residual", "ssp" or "multinomial".
        seed: With the program it fixes the result.
        method: "smc"; "importance": never resample; "best_of_n": the same, and all weight to the best particle;
            "beam": each particle's `n_branches` most probable continuations, the best `n_particles` kept;
            "steer": each particle is copied `n_branches` times before it moves, then `n_particles` are kept without
            replacement.
        n_branches: For "beam" and "steer".
        kernel: After each resampling, moves every particle without changing the law; see `moves`.
        retained: Conditional SMC: this path, a complete one, is the first particle and survives; resampling is then
            multinomial. Without `kernel`: one that moves only the others would change the law.
        max_steps: Stop after so many steps, with a paused result.
        on_failure: What happens when all particles die, a weight is not a number or a program raises: "raise" the
            error, with the result up to the last whole step as its `result`; or "mark" that result as failed.
        on_step: Called after each step with what happened and the step's number from 0.
        recording: Keeps what is asked and drawn; or, loaded or `replay()`ed, answers instead of model and randomness.

    Raises:
        InvalidProgram: An argument has no meaning; nothing was run.
        AllParticlesDead, NonFiniteWeight, ParticleFailed: See `on_failure`. The others were stopped, and have ended,
            when the error leaves. Cancelled, the run does the same.
    """
    threshold = ess_threshold if method == "smc" else 0.0
    settings = Settings(n_particles, method, threshold, resampling, seed, n_branches, retained is not None)
    _check(settings, ess_threshold, max_steps, kernel, retained)
    start = start_of(model)
    strands: list[Strand] = [Live(start, Context(seed, recording)) for _ in range(n_particles)]
    if retained is not None:
        strands[0] = Retained(start, seed, retained, recording)
    run = _Run(settings, strands, [0.0] * n_particles, [], start, kernel, on_step, recording)
    return await run.to_end(max_steps, on_failure)


async def resume(
    model: Model,
    result: Result,
    *,
    kernel: Kernel | None = None,
    max_steps: int | None = None,
    on_failure: Literal["raise", "mark"] = "raise",
    on_step: Callable[[Step, int], None] | None = None,
    recording: Recording | None = None,
) -> Result:
    """Go on with a paused or failed run: the result is that of a run that was never interrupted.

    The programs run again to where they were, answered from the record; settings are those of the run.

    Args:
        model: The same as before.
        result: From `smc(..., max_steps=...)`, from an error's `result`, or loaded.
        kernel: The same as before.
        max_steps: Stop when the run has so many steps in all.
        on_failure: As in `smc`, like the rest.
        on_step: As in `smc`.
        recording: As in `smc`.

    Raises:
        InvalidProgram: The run was a conditional one.
        ReplayMismatch: From the run, as the cause of a ParticleFailed: the program is not the same as before.
    """
    if result.settings.is_conditional:
        raise InvalidProgram("a conditional run cannot be resumed", "run it again with its retained path")
    start = start_of(model)
    paths, log_weights, steps = _alive(result)
    strands: list[Strand] = [Live.of_path(start, result.settings.seed, path, recording) for path in paths]
    run = _Run(result.settings, strands, log_weights, steps, start, kernel, on_step, recording)
    return await run.to_end(max_steps, on_failure)


def _alive(result: Result) -> tuple[list[Path], list[float], list[Step]]:
    """Paths, log-weights and steps to go on from: where all have died, those before the step that killed the last."""
    steps = list(result.steps)
    if not steps or max(result.log_weights) > -math.inf:
        return list(result.paths), list(result.log_weights), steps
    n_steps, last = len(steps) - 1, steps.pop()
    paths = [path.first(n_steps) for path in result.paths]
    if steps:
        log_weights = list(steps[-1].log_weights_after or steps[-1].log_weights)
    else:
        log_weights = [0.0] * result.settings.n_particles
    if last.parents is not None:  # of its copies one each; who had died before had none, nor have a beam's first others
        of_parent = dict(zip(last.parents, paths, strict=True))
        without = Path(status="dead") if steps else Path()
        paths = [of_parent.get(parent, without) for parent in range(len(log_weights))]
    return paths, log_weights, steps


class _Run:
    """The population between two steps."""

    def __init__(
        self,
        settings: Settings,
        strands: list[Strand],
        log_weights: list[float],
        steps: list[Step],
        start: Start,
        kernel: Kernel | None,
        on_step: Callable[[Step, int], None] | None,
        recording: Recording | None,
    ) -> None:
        self.settings = settings
        self.strands = strands
        self.log_weights = log_weights
        self.steps = steps
        self._start = start
        self._kernel = kernel
        self._on_step = on_step
        self._recording = recording

    async def to_end(self, max_steps: int | None, on_failure: str) -> Result:
        is_free = self.settings.method in ("importance", "best_of_n", "smc") and self.settings.ess_threshold == 0
        try:
            if is_free and self._on_step is None:
                await self._run_freely(math.inf if max_steps is None else max_steps)
            else:
                while self._is_running() and (max_steps is None or len(self.steps) < max_steps):
                    await self._step()
        except InferenceFailed as error:
            failed = self._result("failed", error.message(*error.data))
            if on_failure == "raise":
                error.result = failed
                raise
            return failed
        finally:
            await close_all(self.strands)
        return self._result("paused" if self._is_running() else "complete", None)

    async def _step(self) -> None:
        step = len(self.steps)
        before = self.strands, self.log_weights
        try:
            parents = await self._advance(step)
            await self._weigh_and_resample(step, parents)
        except BaseException:
            if len(self.steps) == step:  # not a whole step: back to the one before; what ran on is cut off
                after, (self.strands, self.log_weights) = self.strands, before
                await close_all([*after, *self.strands])
            raise
        if self._on_step is not None:
            self._on_step(self.steps[-1], step)

    async def _advance(self, step: int) -> tuple[int, ...] | None:
        parents = await self._branch()
        running = [i for i, strand in enumerate(self.strands) if strand.status == "running"]
        await _together([self.strands[i].advance(i, step, self._rank(i, parents)) for i in running], names=running)
        return parents

    async def _weigh_and_resample(self, step: int, parents: tuple[int, ...] | None) -> None:
        moved = [
            log_weight + (strand.log_increments[-1] if len(strand.log_increments) == step + 1 else 0.0)
            for log_weight, strand in zip(self.log_weights, self.strands, strict=True)
        ]
        texts = tuple(strand.text.decode("utf-8", "replace") for strand in self.strands)
        statuses = "".join(_LETTERS[strand.status] for strand in self.strands)
        if max(moved) == -math.inf:
            self.log_weights = moved
            self.steps.append(Step(parents, tuple(moved), None, None, statuses, texts))
            raise AllParticlesDead(step, len(moved))
        drawn = self._resampled(step, moved)
        n_accepted = None
        if drawn is None:
            self.log_weights = moved
        else:
            await self._become(drawn)
            if self._kernel is not None:
                n_accepted = await self._rejuvenate(step)
        ancestors = None if drawn is None else tuple(drawn.ancestors.tolist())
        after = None if drawn is None else tuple(self.log_weights)
        self.steps.append(Step(parents, tuple(moved), ancestors, after, statuses, texts, n_accepted))

    async def _run_freely(self, max_steps: float) -> None:
        """Without resampling no particle waits for another; the steps are told afterwards."""
        n_before = len(self.steps)

        async def run(i: int, strand: Strand) -> None:
            step = n_before
            while strand.status == "running" and step < max_steps:
                await strand.advance(i, step)
                step += 1

        failure: InferenceFailed | None = None
        try:
            await _together([run(i, s) for i, s in enumerate(self.strands)], names=range(len(self.strands)))
        except InferenceFailed as error:
            failure = error
        paths = [strand.path() for strand in self.strands]
        lengths = [len(path.log_increments) for path in paths]
        n_whole = max(lengths, default=0)
        if failure is not None:
            n_whole = min((n for n, path in zip(lengths, paths, strict=True) if path.status == "running"), default=0)
        self._tell([path.first(n_whole) for path in paths], n_before, n_whole)
        if failure is not None:
            raise failure
        if max(self.log_weights, default=0.0) == -math.inf:
            raise AllParticlesDead(n_whole - 1, len(paths))

    def _tell(self, paths: Sequence[Path], n_before: int, n_whole: int) -> None:
        texts = [text_of(b"", path.first(n_before).entries) for path in paths]
        for step in range(n_before, n_whole):
            statuses = ""
            for i, path in enumerate(paths):
                n = len(path.log_increments)
                if step < n:
                    self.log_weights[i] += path.log_increments[step]
                    begin, end = len(path.first(step).entries), len(path.first(step + 1).entries)
                    texts[i] = text_of(texts[i], path.entries[begin:end])
                statuses += _LETTERS[path.status if step >= n - 1 else "running"]
            shown = tuple(text.decode("utf-8", "replace") for text in texts)
            self.steps.append(Step(None, tuple(self.log_weights), None, None, statuses, shown))

    async def _branch(self) -> tuple[int, ...] | None:
        """Copies before the step, for the methods that have them; the place of each one's parent."""
        if self.settings.method not in ("beam", "steer"):
            return None
        n = self.settings.n_branches
        parents: list[int] = []
        log_weights: list[float] = []
        strands: list[Strand] = []
        for i, (strand, log_weight) in enumerate(zip(self.strands, self.log_weights, strict=True)):
            if len(self.steps) == 0 and self.settings.method == "beam" and i > 0:
                await strand.close()  # all begin alike: one of them has all the branches
                continue
            if strand.status == "dead":
                continue
            copies = n if strand.status == "running" else 1
            if len(self.steps) == 0 and self.settings.method == "beam":
                copies = max(n, self.settings.n_particles)
            share = log_weight - (math.log(copies) if self.settings.method == "steer" else 0.0)
            forks = [strand, *(strand.fork() for _ in range(copies - 1))]
            parents += [i] * copies
            log_weights += [share] * copies
            strands += forks
        self.strands, self.log_weights = strands, log_weights
        return tuple(parents)

    def _rank(self, i: int, parents: Sequence[int] | None) -> tuple[int, ...] | None:
        """Which of its parent's most probable continuations a particle takes; None draws."""
        if self.settings.method != "beam" or parents is None:
            return None
        return (i - parents.index(parents[i]),)

    def _resampled(self, step: int, log_weights: list[float]) -> Resampled | None:
        if self._recording is not None and self._recording.is_replay:
            return self._recording.known_resampling(step)
        drawn = self._resample(step, log_weights)
        if drawn is not None and self._recording is not None:
            self._recording.keep_resampling(step, drawn)
        return drawn

    def _resample(self, step: int, log_weights: list[float]) -> Resampled | None:
        n, method, threshold, scheme = self.settings[:4]
        if method == "beam":
            best = np.argsort(-np.array(log_weights), kind="stable")[:n]
            kept = np.sort(best[np.array(log_weights)[best] > -math.inf])
            return Resampled(kept, np.array(log_weights)[kept])
        if method == "steer":
            return resample(self._rng(step), log_weights, n, "optimal") if len(log_weights) > n else None
        if not self._is_running() or threshold == 0:
            return None
        if threshold < 1 and effective_sample_size(log_weights) >= threshold * n:
            return None
        rng = self._rng(step)
        if self.settings.is_conditional:
            ancestors = conditional_multinomial(rng, log_weights, n)
            return Resampled(ancestors, np.full(n, log_sum_exp(log_weights) - math.log(n)))
        return resample(rng, log_weights, n, scheme)

    def _rng(self, step: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(sampling.draw_key(self.settings.seed, (), step, "resample")))

    async def _become(self, drawn: Resampled) -> None:
        """The first child of each takes over its coroutine, the others are copies; who has none ends."""
        before, taken = self.strands, set[int]()
        after: list[Strand] = []
        for ancestor in drawn.ancestors.tolist():
            after.append(before[ancestor].fork() if ancestor in taken else before[ancestor])
            taken.add(ancestor)
        if isinstance(before[0], Retained) and self.settings.is_conditional and after[0] is not before[0]:
            raise AssertionError("the retained particle survives")
        self.strands, self.log_weights = after, drawn.log_weights.tolist()
        await close_all(strand for i, strand in enumerate(before) if i not in taken)

    async def _rejuvenate(self, step: int) -> int:
        assert self._kernel is not None
        before, self.strands = self.strands, list(self.strands)
        kernel = self._kernel

        async def move_one(i: int) -> None:
            self.strands[i] = await move(kernel, self._start, before[i], self.settings.seed, i, step, self._recording)

        everyone = range(len(before))
        await _together([move_one(i) for i in everyone], names=everyone)
        return sum(new is not old for new, old in zip(self.strands, before, strict=True))

    def _is_running(self) -> bool:
        return any(
            strand.status == "running" and log_weight > -math.inf
            for strand, log_weight in zip(self.strands, self.log_weights, strict=True)
        )

    def _result(self, status: str, failure: str | None) -> Result:
        return Result(
            self.settings,
            status,
            tuple(strand.path().first(len(self.steps)) for strand in self.strands),
            tuple(self.log_weights),
            tuple(self.steps),
            failure,
            {
                "genlm_backend": genlm_backend.__version__,
                "python": platform.python_version(),
                "numpy": np.__version__,
                "torch": torch.__version__,
                "threads": str(torch.get_num_threads()),
            },
        )


_LETTERS = {"running": "r", "done": "d", "dead": "x"}


async def _together(coroutines: Sequence[Coroutine[Any, Any, Any]], names: Sequence[int]) -> list[Any]:
    """Results in order. The first failure, or being cancelled, stops the others; it leaves when they have ended."""
    tasks = [
        asyncio.create_task(coroutine, name=f"particle {name}")
        for coroutine, name in zip(coroutines, names, strict=True)
    ]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def _check(
    settings: Settings, ess_threshold: float, max_steps: int | None, kernel: object, retained: Path | None
) -> None:
    if settings.n_particles < 1:
        raise InvalidProgram(f"n_particles is {settings.n_particles}", "run at least one particle")
    if settings.method not in METHODS:
        raise InvalidProgram(f"method is {settings.method!r}", f"choose one of {', '.join(METHODS)}")
    if settings.resampling not in SCHEMES:
        raise InvalidProgram(f"resampling is {settings.resampling!r}", f"choose one of {', '.join(SCHEMES)}")
    if not 0 <= ess_threshold <= 1:
        raise InvalidProgram(f"ess_threshold is {ess_threshold}", "give a share of n_particles, from 0 to 1")
    if settings.n_branches < 1 or (max_steps is not None and max_steps < 0):
        raise InvalidProgram(f"n_branches={settings.n_branches}, max_steps={max_steps}", "neither can be negative or 0")
    if settings.is_conditional and settings.method != "smc":
        raise InvalidProgram(f"a retained path with method {settings.method!r}", "conditional runs are method 'smc'")
    if kernel is not None and settings.method != "smc":
        raise InvalidProgram(f"a kernel with method {settings.method!r}", "moves follow resampling: use method 'smc'")
    if retained is None:
        return
    if kernel is not None:
        raise InvalidProgram(
            "a kernel with a retained path", "leave it out, or use particle_gibbs, which moves whole paths"
        )
    if retained.status != "done" or not all(map(math.isfinite, retained.log_increments)):
        what = f"a retained path that is {retained.status} with the weights {list(retained.log_increments)}"
        raise InvalidProgram(what, "retain the path of a particle that is done and alive, such as `draw_path` gives")
