"""Frames: a run as a sequence of populations to look at, one after moving and one after each resampling."""

from __future__ import annotations

import math
from typing import NamedTuple

from genlm_backend.smc.result import Result
from genlm_backend.smc.weights import effective_sample_size, log_sum_exp, normalized


class Frame(NamedTuple):
    """A population at one moment.

    Attributes:
        step: From 0; -1 before the first.
        label: What happened.
        parents: The place of each one's parent in the frame before.
        weights: Normalised.
        log_weights: nats; None for the dead.
        statuses: One letter each, as in `Step`.
        texts: What each has written.
        ess: Effective sample size.
        log_evidence: Estimate up to here, nats; None if all are dead.
    """

    step: int
    label: str
    parents: list[int]
    weights: list[float]
    log_weights: list[float | None]
    statuses: str
    texts: list[str]
    ess: float
    log_evidence: float | None


def frames(result: Result) -> list[Frame]:
    """The frames of a run, the beginning first."""
    n = result.settings.n_particles
    made = [_frame(result, -1, "start", list(range(n)), [0.0] * n, "r" * n, [""] * n)]
    for i, step in enumerate(result.steps):
        m = len(step.log_weights)
        parents = list(range(m)) if step.parents is None else list(step.parents)
        log_weights, texts = list(step.log_weights), list(step.texts)
        made.append(_frame(result, i, "moved", parents, log_weights, step.statuses, texts))
        if step.ancestors is not None and step.log_weights_after is not None:
            statuses = "".join(step.statuses[a] for a in step.ancestors)
            moved = "" if step.n_accepted is None else f", {step.n_accepted} moved by the kernel"
            after = [texts[a] for a in step.ancestors]
            label = f"resampled{moved}"
            made.append(_frame(result, i, label, list(step.ancestors), list(step.log_weights_after), statuses, after))
    return made


def _frame(
    result: Result, step: int, label: str, parents: list[int], log_weights: list[float], statuses: str, texts: list[str]
) -> Frame:
    n = 1 if result.settings.method == "beam" else result.settings.n_particles
    log_evidence = log_sum_exp(log_weights) - math.log(n)
    return Frame(
        step,
        label,
        parents,
        [round(float(weight), 6) for weight in normalized(log_weights)],
        [round(w, 4) if w > -math.inf else None for w in log_weights],
        statuses,
        texts,
        round(effective_sample_size(log_weights), 3),
        round(log_evidence, 4) if log_evidence > -math.inf else None,
    )
