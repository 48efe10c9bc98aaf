"""A backtracking walk as the proposal of a particle follows the law of the model under its rules."""

from __future__ import annotations

import itertools
import math

import pytest

from genlm_backend.backtracking import Keep, Rule, Undo
from genlm_backend.errors import InvalidProgram
from genlm_backend.smc import WalkProposal, program, smc
from genlm_backend.smc.enumeration import Exact
from genlm_backend.testing import FakeEngine, fake_language_model
from tests.smc.oracle import Z_LIMIT, worst_z


def law(engine: FakeEngine, n: int) -> Exact:
    """Sequences of n tokens of 3 after [1], without token 2 after token 0, by enumeration."""
    masses = {}
    for ids in itertools.product(range(3), repeat=n):
        if all(pair != (0, 2) for pair in itertools.pairwise(ids)):
            masses[ids] = math.exp(sum(float(engine.row([1, *ids[:i]])[ids[i]]) for i in range(n)))
    total = math.fsum(masses.values())
    return Exact(math.log(total), {ids: mass / total for ids, mass in masses.items()})


class NoTwoAfterZero(Rule[int]):
    """Objects to token 2 after token 0."""

    reach = 1

    def init(self, prompt):
        return -1

    def step(self, last, step):
        return step.token_id, Undo(1) if (last, step.token_id) == (0, 2) else Keep()


@pytest.mark.parametrize(
    "n_runs",
    [pytest.param(60, id="few"), pytest.param(400, marks=[pytest.mark.slow, pytest.mark.timeout(600)], id="many")],
)
async def test_particles_that_walk_follow_the_law(n_runs):
    engine = FakeEngine(3)
    async with fake_language_model(engine, n_vocab=3) as llm:

        @program
        async def walking(ctx):
            ids = await ctx.sample(WalkProposal(llm, NoTwoAfterZero(), max_new_tokens=2, eos=()), [1])
            await ctx.checkpoint()
            row = await ctx.logprobs(llm, [1, *ids])
            last = await ctx.sample(row)
            ctx.condition((ids[-1], last) != (0, 2))
            return (*ids, last)

        run = lambda seed: smc(walking(), 4, seed=seed, ess_threshold=1.0, on_failure="mark")  # noqa: E731
        assert await worst_z(run, law(engine, 3), n_runs) < Z_LIMIT


async def test_a_mode_without_a_weight_is_refused():
    async with fake_language_model(FakeEngine(3), n_vocab=3) as llm:
        with pytest.raises(InvalidProgram, match="has no weight"):
            WalkProposal(llm, mode="local")


@pytest.mark.parametrize("filters", [{"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.1}])
async def test_filters_that_leave_texts_out_are_refused(filters):
    async with fake_language_model(FakeEngine(3), n_vocab=3) as llm:
        with pytest.raises(InvalidProgram, match="never draws some of the model's texts"):
            WalkProposal(llm, **filters)
        WalkProposal(llm, **dict.fromkeys(filters), temperature=0.5)
