"""Exact enumeration: a small program's posterior and evidence, by running it once for every sequence of choices.

The oracle for samplers: with d draws of k values it takes k ** d runs.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any, NamedTuple

from genlm_backend.errors import InvalidProgram
from genlm_backend.smc.context import Context, Died
from genlm_backend.smc.programs import start_of
from genlm_backend.smc.strands import drive, end_program


class Exact(NamedTuple):
    """The law of a program.

    Attributes:
        log_evidence: nats.
        posterior: Probability of each value.
    """

    log_evidence: float
    posterior: dict[Any, float]


async def enumerate_exactly(model: Any, max_runs: int = 100_000) -> Exact:
    """The exact law of a program whose draws are from rows, potentials, or distributions with a `support()`.

    Args:
        model: As for `smc`.
        max_runs: Most runs of the program.

    Raises:
        InvalidProgram: A draw cannot be enumerated, or there are more than `max_runs` sequences of choices.
    """
    start = start_of(model)
    masses: dict[Hashable, list[float]] = {}
    todo: list[tuple[int, ...]] = [()]
    n_runs = 0
    while todo:
        ranks = todo.pop()
        n_runs += 1
        if n_runs > max_runs:
            raise InvalidProgram(f"more than {max_runs} sequences of choices", "enumerate a smaller program")
        context = Context(0)
        context.begin_step(0, 0, ranks)
        is_done, value = await _run(start(context), context)
        if is_done:
            masses.setdefault(value, []).append(math.exp(context.log_increment))
        last = context.entries[-1] if context.entries else None
        is_no_choice = last is not None and last.kind == "sample" and last.log_weight == -math.inf
        if ranks and not (is_no_choice and context.n_ranked == len(ranks)):
            todo.append((*ranks[:-1], ranks[-1] + 1))
        n_valid = context.n_ranked - is_no_choice
        todo += [(*ranks, *[0] * (depth - len(ranks)), 1) for depth in range(len(ranks), n_valid)]
    totals = {value: math.fsum(parts) for value, parts in masses.items()}
    evidence = math.fsum(totals.values())
    if evidence == 0.0:
        return Exact(-math.inf, {})
    return Exact(math.log(evidence), {value: mass / evidence for value, mass in totals.items() if mass > 0})


async def _run(coroutine: Any, context: Context) -> tuple[bool, Any]:
    try:
        while True:
            is_over, value = await drive(coroutine)
            if is_over:
                context.take_twist_back()
                return True, value
            context.step += 1
    except Died:
        return False, None
    finally:
        await end_program(coroutine)
