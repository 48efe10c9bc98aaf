"""Pictures of a run with matplotlib."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from genlm_backend.errors import BackendUnavailable
from genlm_backend.smc.frames import frames

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from genlm_backend.smc.result import Result

_DARK, _LIGHT, _ACCENT = "#1f3a5f", "#b9c4d0", "#c8553d"


def plot_run(result: Result) -> Figure:
    """Three panels by step: effective sample size, log-evidence, normalised weights; dashed where resampled.

    Raises:
        BackendUnavailable: matplotlib is not installed.
    """
    figure, axes = _figure(3, (7.0, 6.4))
    found, n = result.diagnostics, result.settings.n_particles
    steps = np.arange(len(result.steps))
    for axis in axes:
        for i, step in enumerate(result.steps):
            if step.ancestors is not None:
                axis.axvline(i, color=_LIGHT, linestyle="--", linewidth=0.8, zorder=0)
    axes[0].plot(steps, found.ess, color=_DARK, marker="o", markersize=3)
    if result.settings.ess_threshold:
        axes[0].axhline(result.settings.ess_threshold * n, color=_ACCENT, linewidth=0.8)
    axes[0].set(ylabel="effective\nsample size", ylim=(0, None))
    axes[1].plot(steps, np.where(np.isfinite(found.log_evidence), found.log_evidence, np.nan), color=_DARK)
    error = result.log_evidence_error
    if not math.isnan(error) and math.isfinite(result.log_evidence) and len(steps):
        axes[1].errorbar(
            [steps[-1]], [result.log_evidence], [error], color=_ACCENT, capsize=4, marker="o", markersize=4
        )
    axes[1].set(ylabel="log-evidence\n(nats)")
    for i, frame in enumerate(frame for frame in frames(result) if frame.label == "moved"):
        weights = np.array([weight for weight in frame.weights if weight > 0])
        axes[2].plot(np.full(len(weights), i), weights, ".", color=_DARK, alpha=0.35, markersize=4)
    axes[2].set(ylabel="weights", xlabel="step", yscale="log")
    axes[2].xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(f"{result.settings.method}, {n} particles, seed {result.settings.seed}", fontsize=10)
    return figure


def plot_genealogy(result: Result) -> Figure:
    """Each line leads from a particle to its child in the next step; dark ones lead to the final population.

    Raises:
        BackendUnavailable: matplotlib is not installed.
    """
    figure, (axis,) = _figure(1, (8.0, 4.4))
    made = frames(result)
    survives = [set[int]() for _ in made]
    survives[-1] = {i for i, weight in enumerate(made[-1].weights) if weight > 0}
    for t in range(len(made) - 1, 0, -1):
        survives[t - 1] = {made[t].parents[i] for i in survives[t]}
    for t in range(1, len(made)):
        for child, parent in enumerate(made[t].parents):
            is_kept = child in survives[t]
            color, width = (_DARK, 1.3) if is_kept else (_LIGHT, 0.7)
            axis.plot([t - 1, t], [parent, child], color=color, linewidth=width, zorder=1 + is_kept)
    for t, frame in enumerate(made):
        sizes = [4 + 120 * weight for weight in frame.weights]
        axis.scatter([t] * len(sizes), range(len(sizes)), s=sizes, color=_ACCENT, zorder=3, linewidths=0)
    ticks = [t for t, frame in enumerate(made) if frame.label == "moved"]
    axis.set_xticks(ticks, [str(made[t].step) for t in ticks])
    axis.set(xlabel="step", ylabel="particle")
    axis.invert_yaxis()
    axis.yaxis.get_major_locator().set_params(integer=True)
    return figure


def _figure(n_panels: int, size: tuple[float, float]) -> tuple[Figure, Any]:
    try:
        from matplotlib.figure import Figure as NewFigure  # without pyplot: no window, no global state
    except ImportError as error:
        raise BackendUnavailable("matplotlib", "pip install matplotlib") from error
    figure = NewFigure(figsize=size, layout="constrained")
    return figure, figure.subplots(n_panels, 1, sharex=n_panels > 1, squeeze=False)[:, 0]
