"""Result: what a run of particles found, as plain data that saves to JSON and loads."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from genlm_backend.smc import plain
from genlm_backend.smc.genealogy import eves
from genlm_backend.smc.trace import Entry, Path
from genlm_backend.smc.weights import (
    Floats,
    Ints,
    effective_sample_size,
    log_sum_exp,
    normalized,
    relative_variance,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FORM = "genlm_backend.smc result 1"


class Step(NamedTuple):
    """What happened between two checkpoints. The population moved has m particles (n, or more with branches).

    Attributes:
        parents: (m,) for each one that moved, its place in the population before; None if each is its own.
        log_weights: (m,) after moving, before resampling; nats.
        ancestors: (n,) for each one after resampling, its place among those that moved; None if not resampled.
        log_weights_after: (n,) after resampling; None if not resampled.
        statuses: (m,) one letter each: r unning, d one, x dead.
        texts: (m,) what each has written so far.
        n_accepted: Accepted moves of the rejuvenation kernel; None without one.
    """

    parents: tuple[int, ...] | None
    log_weights: tuple[float, ...]
    ancestors: tuple[int, ...] | None
    log_weights_after: tuple[float, ...] | None
    statuses: str
    texts: tuple[str, ...]
    n_accepted: int | None = None

    @property
    def ess(self) -> float:
        """Effective sample size before resampling."""
        return effective_sample_size(self.log_weights)


class Diagnostics(NamedTuple):
    """One row per step, each (n_steps,) float64.

    Attributes:
        ess: Effective sample size before resampling.
        unique_ancestors: How many different particles survived resampling; all where there was none.
        unique_eves: How many of the first generation have descendants.
        log_evidence: Estimate up to this step, nats.
        log_weight_range: Largest minus smallest log-weight of those alive, nats.
        n_running: Particles that still run.
        n_dead: Particles of weight zero.
    """

    ess: Floats
    unique_ancestors: Floats
    unique_eves: Floats
    log_evidence: Floats
    log_weight_range: Floats
    n_running: Floats
    n_dead: Floats


class Settings(NamedTuple):
    """How the run was made; with the program it fixes the result."""

    n_particles: int
    method: str
    ess_threshold: float
    resampling: str
    seed: int
    n_branches: int
    is_conditional: bool = False


@dataclass(frozen=True, eq=False)
class Result:
    """Weighted particles and how they came about.

    Attributes:
        settings: How the run was made.
        status: "complete", "paused" (particles still run) or "failed".
        failure: What ended a failed run, in words.
        paths: One per particle, in order.
        log_weights: One per particle, nats, unnormalised: their mean estimates the evidence.
        steps: What happened, step by step.
        versions: Of what computed it.
    """

    settings: Settings
    status: str
    paths: tuple[Path, ...]
    log_weights: tuple[float, ...]
    steps: tuple[Step, ...]
    failure: str | None = None
    versions: dict[str, str] = field(default_factory=dict, compare=False)

    # ---- what was found

    @property
    def values(self) -> list[Any]:
        """What each particle's program returned; None for those that did not end."""
        return [path.value for path in self.paths]

    @property
    def texts(self) -> list[str]:
        """What each particle wrote, for people."""
        return [path.text for path in self.paths]

    @property
    def weights(self) -> Floats:
        """Normalised, (n,) float64. Best of n gives all weight to the best one."""
        if self.settings.method == "best_of_n":
            weights = np.zeros(len(self.log_weights))
            if max(self.log_weights, default=-math.inf) > -math.inf:
                weights[int(np.argmax(self.log_weights))] = 1.0
            return weights
        return normalized(self.log_weights)

    def posterior(self, of: Callable[[Any], Hashable] | None = None) -> dict[Any, float]:
        """Probability of each distinct value, most probable first; lists count as tuples.

        Args:
            of: Makes something hashable of a value; the posterior is over that.

        Raises:
            ValueError: Particles with weight still run (a paused or failed run).
            TypeError: A value is not hashable, and `of` is not given.
        """
        masses: dict[Any, float] = {}
        for path, weight in zip(self.paths, self.weights, strict=True):
            if weight == 0.0:
                continue
            if path.status == "running":
                raise ValueError("particles still run: resume this result before asking for its posterior")
            value = _frozen(path.value) if of is None else of(path.value)
            masses[value] = masses.get(value, 0.0) + float(weight)
        return dict(sorted(masses.items(), key=lambda item: -item[1]))

    def best(self) -> Any:
        """The value of the particle with the largest weight.

        Raises:
            ValueError: All are dead.
        """
        if max(self.log_weights, default=-math.inf) == -math.inf:
            raise ValueError("all particles are dead: none is best")
        return self.values[int(np.argmax(self.log_weights))]

    @property
    def log_evidence(self) -> float:
        """Log of the evidence, nats: its exponential is unbiased. -inf if all are dead.

        Beam search gives a lower bound instead: the mass of what it found.
        """
        n = 1 if self.settings.method == "beam" else self.settings.n_particles
        return log_sum_exp(self.log_weights) - math.log(n)

    @property
    def log_evidence_error(self) -> float:
        """Standard error of `log_evidence`, nats, estimated from this one run; see `weights.relative_variance`.

        NaN for beam search and with branches, and where one particle leaves nothing to estimate from.
        """
        if self.settings.method in ("beam", "steer") or self.settings.is_conditional:
            return math.nan
        n_resamplings = sum(step.ancestors is not None for step in self.steps)
        variance = relative_variance(self.log_weights, self.eves, n_resamplings, self.settings.n_particles)
        return math.sqrt(variance)

    @property
    def ess(self) -> float:
        """Effective sample size of the final weights."""
        return effective_sample_size(self.log_weights)

    # ---- how it came about

    @property
    def generations(self) -> list[list[int]]:
        """Each step's parents in the population before it, see `genealogy`."""
        found = []
        for step in self.steps:
            parents = list(range(len(step.log_weights))) if step.parents is None else list(step.parents)
            found.append(parents if step.ancestors is None else [parents[i] for i in step.ancestors])
        return found

    @property
    def eves(self) -> Ints:
        """For each particle, which one of the beginning it descends from."""
        return eves(self.generations, self.settings.n_particles)

    @property
    def diagnostics(self) -> Diagnostics:
        """One row per step."""
        n = 1 if self.settings.method == "beam" else self.settings.n_particles
        rows = []
        for i, step in enumerate(self.steps):
            alive = [w for w in step.log_weights if w > -math.inf]
            ancestors = range(len(step.log_weights)) if step.ancestors is None else step.ancestors
            rows.append(
                (
                    step.ess,
                    len(set(ancestors)),
                    len(set(eves(self.generations[: i + 1], self.settings.n_particles).tolist())),
                    log_sum_exp(step.log_weights) - math.log(n),
                    max(alive) - min(alive) if alive else 0.0,
                    step.statuses.count("r"),
                    step.statuses.count("x"),
                )
            )
        table = np.array(rows, np.float64).reshape(len(rows), len(Diagnostics._fields))
        return Diagnostics(*table.T)

    # ---- keeping it

    def save(self, path: str | FilePath) -> None:
        """Write it as JSON; `Result.load` gives an equal one, and `resume` goes on from it.

        Raises:
            TypeError: A value or a drawn choice is not plain data.
        """
        plain.save(path, _FORM, self.as_plain())

    def as_plain(self) -> dict[str, Any]:
        """What `save` writes; `of_plain` makes an equal result of it."""
        data = asdict(replace(self, paths=(), steps=()))
        data["settings"] = self.settings._asdict()
        data["paths"] = [_path_row(path) for path in self.paths]
        data["steps"] = [step._asdict() for step in self.steps]
        return data

    def __eq__(self, other: object) -> bool:
        """Whether everything is the same to the last bit, versions aside."""
        return isinstance(other, Result) and self._comparable() == other._comparable()

    def __hash__(self) -> int:
        return hash((self.settings, self.log_weights))

    @classmethod
    def load(cls, path: str | FilePath) -> Result:
        """A saved result.

        Raises:
            ValueError: The file is not one.
        """
        return cls.of_plain(plain.load(path, _FORM))

    @classmethod
    def of_plain(cls, data: dict[str, Any]) -> Result:
        """The result that `as_plain` told."""
        return cls(
            **{
                **data,
                "settings": Settings(**data["settings"]),
                "paths": tuple(_path_of(row) for row in data["paths"]),
                "steps": tuple(Step(**step) for step in data["steps"]),
            }
        )

    def _comparable(self) -> Any:
        paths = [plain.encode(_path_row(path)) for path in self.paths]
        return self.settings, self.status, self.failure, self.log_weights, self.steps, paths

    # ---- seeing it

    def plot(self) -> Figure:
        """Effective sample size, evidence and weights by step, as a matplotlib figure.

        Raises:
            BackendUnavailable: matplotlib is not installed.
        """
        from genlm_backend.smc.plots import plot_run

        return plot_run(self)

    def plot_genealogy(self) -> Figure:
        """Who descends from whom, as a matplotlib figure; thick lines lead to survivors.

        Raises:
            BackendUnavailable: matplotlib is not installed.
        """
        from genlm_backend.smc.plots import plot_genealogy

        return plot_genealogy(self)

    def html(self, title: str = "Particles") -> str:
        """A page of its own that replays the run step by step; it loads nothing from elsewhere."""
        from genlm_backend.smc.page import page

        return page(self, title)

    def _repr_html_(self) -> str:
        from genlm_backend.smc.page import inline

        return inline(self)

    def __str__(self) -> str:
        found = f"{len(self.steps)} steps, effective sample size {self.ess:.1f} of {self.settings.n_particles}"
        error = f" ± {self.log_evidence_error:.3f}" if not math.isnan(self.log_evidence_error) else ""
        failed = f"; {self.failure}" if self.failure else ""
        return (
            f"{self.settings.method} {self.status}: log-evidence {self.log_evidence:.4f}{error} nats, {found}{failed}"
        )


def _path_row(path: Path) -> dict[str, Any]:
    entries = [list(entry) if entry.piece is not None else list(entry)[:3] for entry in path.entries]
    return {**path._asdict(), "entries": entries}


def _path_of(row: dict[str, Any]) -> Path:
    return Path(**{**row, "entries": tuple(Entry(*entry) for entry in row["entries"])})


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
