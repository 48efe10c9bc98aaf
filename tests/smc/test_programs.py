"""What programs may do besides drawing: gather, group tasks, clean up, mix models, give NaN; and what they are told."""

from __future__ import annotations

import asyncio
import math
from contextlib import asynccontextmanager

import numpy as np
import pytest
import torch

from genlm_backend.errors import AllParticlesDead, InvalidProgram, NonFiniteWeight, ParticleFailed
from genlm_backend.potentials.base import Potential
from genlm_backend.potentials.combinators import Product
from genlm_backend.smc import (
    AWRS,
    Chain,
    Direct,
    Recording,
    TopK,
    particle_gibbs,
    program,
    regenerate,
    resume,
    sequences,
    smc,
    strict,
)
from genlm_backend.smc.enumeration import enumerate_exactly
from genlm_backend.smc.trace import Path
from genlm_backend.testing import FakeEngine, fake_language_model
from tests.smc.oracle import ROW, NoRepeat, Table, Weigh, chain, sequence_law

pytestmark = pytest.mark.thorough


# ---- tasks within a program


async def test_gathered_coroutines_ask_once_each_and_copies_get_the_same_answers():
    seen = []

    @program
    async def both(ctx):
        pair = await asyncio.gather(ctx.next_token(llm, [1]), ctx.next_token(llm, [2]))
        await ctx.checkpoint()
        seen.append(tuple(pair))
        return tuple(pair)

    async with fake_language_model(FakeEngine()) as llm:
        paused = await smc(both(), 4, seed=3, max_steps=1)
        assert await resume(both(), paused) == await smc(both(), 4, seed=3)
    assert len(set(seen)) > 1


@pytest.mark.parametrize("is_nested", [False, True])
async def test_gathered_coroutines_that_ask_again_are_refused(is_nested):
    async def two(ctx, first):
        if is_nested:
            return [await ctx.next_token(llm, [first]), *await asyncio.gather(ctx.next_token(llm, [first, 3]))]
        return [await ctx.next_token(llm, [first]), await ctx.next_token(llm, [first, 3])]

    @program
    async def interleaved(ctx):
        return tuple(await asyncio.gather(two(ctx, 1), two(ctx, 2)))

    async with fake_language_model(FakeEngine()) as llm:
        with pytest.raises(ParticleFailed, match="asked the context again, after another"):
            await smc(interleaved(), 2)


@pytest.mark.parametrize("how", ["wait_for", "shield", "task", "thread"])
async def test_helpers_in_a_task_of_their_own_ask_as_often_as_they_like(how):
    async def helper(ctx):
        first = await ctx.next_token(llm, [1])
        ctx.show(str(first))
        return first, await ctx.next_token(llm, [1, first])

    @program
    async def waiting(ctx):
        match how:
            case "wait_for":
                pair = await asyncio.wait_for(helper(ctx), 60)
            case "shield":
                pair = await asyncio.shield(helper(ctx))
            case "task":
                pair = await asyncio.create_task(helper(ctx))
            case _:
                pair = await helper(ctx)
                await asyncio.to_thread(ctx.show, "in a thread")
        await ctx.checkpoint()
        return pair

    async with fake_language_model(FakeEngine()) as llm:
        paused = await smc(waiting(), 3, seed=3, max_steps=1)
        assert await resume(waiting(), paused) == await smc(waiting(), 3, seed=3)


async def test_a_task_group_in_which_a_particle_dies_is_no_failure():
    @program
    async def grouped(ctx):
        symbol = await ctx.sample(ROW)

        async def judge():
            ctx.condition(symbol != 0)

        async with asyncio.TaskGroup() as group:
            group.create_task(judge())
        await ctx.checkpoint()
        return symbol

    result = await smc(grouped(), 20, seed=0)
    assert set(result.values) == {1, 2} and "x" in result.steps[0].statuses


async def test_an_error_in_a_task_group_is_named_by_itself():
    @program
    async def grouped(ctx):
        async def fail():
            raise OSError("disk full")

        async with asyncio.TaskGroup() as group:
            group.create_task(fail())

    with pytest.raises(ParticleFailed, match="particle 0 raised at step 0: OSError: disk full"):
        await smc(grouped(), 1)


# ---- cleaning up


async def test_what_a_particle_holds_is_given_back_by_those_that_are_dropped_too():
    log = []

    @asynccontextmanager
    async def held():
        log.append("taken")
        try:
            yield
        finally:
            await asyncio.sleep(0)
            log.append("given back")

    @program
    async def holding(ctx):
        async with held():
            symbol = await ctx.sample(ROW)
            ctx.score(-5.0 * symbol)
            await ctx.checkpoint()
            await ctx.sample(ROW)
            await ctx.checkpoint()
        return symbol

    result = await smc(holding(), 8, seed=0, ess_threshold=1.0)
    assert len(set(result.steps[0].ancestors)) < 8, "some were dropped"
    assert log.count("taken") == log.count("given back") > 8
    paused = await smc(holding(), 4, max_steps=1)
    assert paused.status == "paused" and log.count("taken") == log.count("given back")


async def test_cleaning_up_may_ask_the_context_and_goes_on_at_once_for_all():
    log = []
    n_inside = most_inside = 0

    @program
    async def holding(ctx):
        async def tell():
            nonlocal n_inside, most_inside
            n_inside += 1
            most_inside = max(most_inside, n_inside)
            await asyncio.sleep(0.001)
            n_inside -= 1
            log.append(ctx.particle)
            return 0

        try:
            await ctx.sample(ROW)
            await ctx.checkpoint()
        finally:
            await ctx.recorded(tell)
            await ctx.recorded(tell)

    await smc(holding(), 4, max_steps=1)
    assert sorted(log) == [0, 0, 1, 1, 2, 2, 3, 3] and most_inside == 4


async def test_a_particle_that_goes_on_instead_of_ending_is_ended_at_its_next_checkpoint():
    ended = []

    @program
    async def stubborn(ctx):
        try:
            try:
                await ctx.sample(ROW)
                await ctx.checkpoint()
            except BaseException:
                await asyncio.sleep(0)
                await ctx.checkpoint()
        finally:
            ended.append(ctx.particle)

    assert (await smc(stubborn(), 2, max_steps=1)).status == "paused"
    assert sorted(ended) == [0, 1]


async def test_candidates_that_were_taken_are_ended_when_another_kernel_raises():
    n_open = 0

    @program
    async def holding(ctx):
        nonlocal n_open
        n_open += 1
        try:
            await ctx.sample(ROW)
            await ctx.checkpoint()
        finally:
            n_open -= 1

    n_calls = 0

    async def sometimes(move):
        nonlocal n_calls
        n_calls += 1
        if n_calls == 4:
            await asyncio.sleep(0.01)
            raise KeyError("oh")
        return await move.candidate(0)

    with pytest.raises(ParticleFailed, match="in the kernel"):
        await smc(holding(), 4, ess_threshold=1.0, kernel=sometimes)
    assert n_calls == 4 and n_open == 0


async def test_an_error_while_cleaning_up_is_reported_and_harms_nobody():
    told = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: told.append(context["exception"]))

    @program
    async def untidy(ctx):
        try:
            await ctx.sample(ROW)
            await ctx.checkpoint()
        finally:
            raise OSError("cannot delete")

    paused = await smc(untidy(), 3, max_steps=1)
    assert paused.status == "paused" and len(paused.paths) == 3
    assert [str(error) for error in told] == ["cannot delete"] * 3


# ---- weights that are none


class Broken(Potential):
    """Rows with a NaN or +inf."""

    n_tokens = 2

    def __init__(self, value):
        self.value = value

    def start(self):
        return ()

    def extend(self, state, token_id):
        return (*state, token_id)

    async def prefix(self, state):
        return 0.0

    async def complete(self, state):
        return 0.0

    async def logw_next(self, state):
        return torch.tensor([0.0, self.value, -1.0])


@pytest.mark.parametrize("value", [math.nan, math.inf])
async def test_rows_that_are_no_weights_are_an_error_and_not_a_dead_particle(value):
    @program
    async def from_row(ctx):
        await ctx.sample(torch.tensor([-0.7, value, -0.7]))

    free = Table(2)
    proposals = [Direct(Broken(value)), TopK(Broken(value), NoRepeat(2), 1), AWRS(Broken(value), NoRepeat(2))]
    for model in [from_row(), *(sequences(each, max_tokens=1) for each in proposals)]:
        with pytest.raises(NonFiniteWeight, match=r"particle 0 has log-weight (nan|inf) .* at step 0"):
            await smc(model, 2)
    assert (await smc(sequences(free, max_tokens=1), 2)).status == "complete"


# ---- proposals of products


@pytest.mark.parametrize("make", [lambda m, c: AWRS(m, c), lambda m, c: TopK(m, c, 2)], ids=["AWRS", "TopK"])
async def test_proposals_take_products_as_model_and_as_constraint(make):
    proposal = make(Product(Table(3), Weigh(3)), Product(NoRepeat(3), NoRepeat(3)))
    exact = await sequence_law(proposal.potential, 3, 3)
    found = await enumerate_exactly(sequences(proposal, max_tokens=3))
    assert found.posterior == pytest.approx(exact.posterior, abs=1e-5)
    assert found.log_evidence == pytest.approx(exact.log_evidence, abs=1e-5)
    assert (await smc(sequences(proposal, max_tokens=3), 4, seed=1)).status == "complete"


async def test_a_beam_takes_each_of_tied_tokens_once():
    row = np.full(300, -9.0)
    row[[200, 3, 77, 250]] = [-1.0, -1.0, -1.0, -0.5]
    row = torch.from_numpy(row).log_softmax(0).float()

    @program
    async def once(ctx):
        return await ctx.sample(row)

    result = await smc(once(), 6, method="beam", n_branches=6)
    assert sorted(result.values)[-3:] == [77, 200, 250] and len(set(result.values)) == 6
    assert result.log_evidence <= 0.0


# ---- retained paths, kernels


async def test_a_retained_path_is_complete_and_alive():
    @program
    async def narrow(ctx):
        symbol = await ctx.sample(ROW)
        await ctx.checkpoint()
        ctx.condition(symbol == 2)
        return symbol

    result = await smc(narrow(), 20, seed=1, method="importance")
    dead = next(path for path in result.paths if path.status == "dead")
    paused = (await smc(narrow(), 2, max_steps=1)).paths[0]
    for path, status in ((dead, "dead"), (paused, "running"), (Path(), "running")):
        with pytest.raises(InvalidProgram, match=f"a retained path that is {status}"):
            await smc(narrow(), 2, retained=path)
    alive = next(path for path in result.paths if path.status == "done")
    with pytest.raises(InvalidProgram, match="a kernel with a retained path"):
        await smc(narrow(), 2, retained=alive, kernel=regenerate)


async def test_a_chain_that_was_stopped_goes_on_as_if_it_was_not():
    whole = await particle_gibbs(chain(3), 3, 6, seed=2, kernel=regenerate)
    seen: list[Chain] = []
    half = await particle_gibbs(chain(3), 3, 3, seed=2, kernel=regenerate, on_iteration=seen.append)
    assert [len(each.paths) for each in seen] == [1, 2, 3] and seen[-1] == half
    assert await particle_gibbs(chain(3), 3, 6, seed=2, kernel=regenerate, chain=half) == whole


async def test_a_chain_that_fails_keeps_what_it_visited():
    n_runs = 0

    @program
    async def sometimes(ctx):
        nonlocal n_runs
        n_runs += 1
        if n_runs > 20:
            raise OSError("disk full")
        return await ctx.sample(ROW)

    with pytest.raises(ParticleFailed) as caught:
        await particle_gibbs(sometimes(), 4, 50)
    assert isinstance(caught.value.result, Chain) and len(caught.value.result.paths) == 5


async def test_a_chain_that_fails_at_once_or_in_its_kernel_is_a_chain_too():
    @program
    async def broken(ctx):
        raise OSError("disk full")

    with pytest.raises(ParticleFailed) as caught:
        await particle_gibbs(broken(), 2, 3)
    assert caught.value.result == Chain()

    async def kernel(move):
        if move.path.status == "done":
            raise KeyError("oh")

    with pytest.raises(ParticleFailed, match="in the kernel") as caught:
        await particle_gibbs(chain(2), 2, 3, kernel=kernel)
    assert caught.value.result == Chain()


async def test_a_kernel_that_raises_is_named_with_step_and_particle():
    async def broken(move):
        await move.candidate(0)
        raise KeyError("oh")

    with pytest.raises(
        ParticleFailed, match=r"particle \d raised at step 0: KeyError: 'oh' \(in the kernel\)"
    ) as caught:
        await smc(chain(3), 4, ess_threshold=1.0, kernel=broken)
    assert caught.value.result.status == "failed"
    marked = await smc(chain(3), 4, ess_threshold=1.0, kernel=broken, on_failure="mark")
    assert marked == caught.value.result


async def test_a_program_that_fails_in_a_candidate_is_named_by_its_own_particle():
    n_runs = 0

    @program
    async def fragile(ctx):
        nonlocal n_runs
        n_runs += 1
        if n_runs > 4:
            raise OSError("disk full")
        await ctx.sample(ROW)
        await ctx.checkpoint()

    async def only_the_last(move):
        move.count = getattr(only_the_last, "count", 0)
        only_the_last.count = move.count + 1
        return await move.candidate(0) if move.count == 3 else None

    with pytest.raises(ParticleFailed, match=r"particle 3 raised at step 0: OSError: disk full \(in a candidate"):
        await smc(fragile(), 4, seed=0, ess_threshold=1.0, kernel=only_the_last)


@pytest.mark.parametrize("n_steps", [1, 2])
async def test_texts_of_moved_particles_are_whole_when_a_step_has_several_draws(n_steps):
    async with fake_language_model(FakeEngine()) as llm:

        @program
        async def pairs(ctx):
            ids = [1]
            for _ in range(3):
                for _ in range(2):
                    ids.append(await ctx.next_token(llm, ids))
                ctx.score(-0.2 * ids[-1])
                await ctx.checkpoint()
            return tuple(ids)

        options = {"seed": 5, "ess_threshold": 1.0, "kernel": regenerate}
        whole = await smc(pairs(), 6, **options)
        assert any(step.n_accepted for step in whole.steps)
        for n, step in enumerate(whole.steps):
            for text, path in zip(step.texts, whole.paths, strict=True):
                assert n < len(whole.steps) - 1 or text == path.text
        paused = await smc(pairs(), 6, max_steps=n_steps, **options)
        assert await resume(pairs(), paused, kernel=regenerate) == whole


# ---- going on after everyone died


@pytest.mark.parametrize("method", ["smc", "importance", "beam", "steer"])
async def test_a_run_in_which_all_died_goes_on_after_the_mistake_is_mended(method):
    is_broken = True

    @program
    async def doomed(ctx):
        symbols = []
        for i in range(3):
            symbols.append(await ctx.sample(ROW))
            ctx.score(-0.5 * symbols[-1])
            ctx.condition(not (is_broken and i == 1))
            await ctx.checkpoint()
        return tuple(symbols)

    failed = await smc(doomed(), 4, method=method, seed=3, on_failure="mark")
    assert failed.log_evidence == -math.inf and len(failed.steps) == 2
    with pytest.raises(AllParticlesDead):
        await resume(doomed(), failed)
    is_broken = False
    assert await resume(doomed(), failed) == await smc(doomed(), 4, method=method, seed=3)


@pytest.mark.parametrize("n_branches", [1, 2])
async def test_those_who_died_before_the_others_keep_their_places(n_branches):
    is_broken = True

    @program
    async def doomed(ctx):
        symbols = []
        for i in range(3):
            symbols.append(await ctx.sample(ROW))
            ctx.condition(i > 0 or ctx.particle != 1)
            ctx.condition(not (is_broken and i == 1))
            await ctx.checkpoint()
        return tuple(symbols)

    options = {"method": "steer", "n_branches": n_branches, "seed": 3}
    failed = await smc(doomed(), 4, on_failure="mark", **options)
    is_broken = False
    resumed, whole = await resume(doomed(), failed), await smc(doomed(), 4, **options)
    assert [step.parents for step in resumed.steps] == [step.parents for step in whole.steps]
    assert resumed.values == whole.values and resumed.log_weights == whole.log_weights


# ---- recordings, strict rows


class Opposite(FakeEngine):
    """Another model: its logits have the other sign."""

    def evaluate(self, contexts):
        return -super().evaluate(contexts)


async def test_a_recording_tells_models_apart():
    @program
    async def by_two(ctx, small, large):
        q = await ctx.logprobs(small, [1, 2])
        p = await ctx.logprobs(large, [1, 2])
        return await ctx.sample(p, proposal=q)

    recording = Recording()
    async with fake_language_model(FakeEngine()) as large, fake_language_model(Opposite()) as small:
        plain = await smc(by_two(small, large), 4)
        assert len(set(plain.log_weights)) > 1
        assert await smc(by_two(small, large), 4, recording=recording) == plain
        assert await smc(by_two(small, large), 4, recording=recording.replay()) == plain


async def test_the_recording_of_a_resumed_run_is_replayed_and_names_keep_models_apart(tmp_path):
    @program
    async def by_two(ctx, small, large):
        first = await ctx.logprobs(small, [1])
        await ctx.sample(first)
        await ctx.checkpoint()
        ctx.score(float(first.max()))
        second = await ctx.logprobs(large, [1])
        ctx.score(float(second.max()))
        return await ctx.sample(second)

    async with fake_language_model(FakeEngine()) as large, fake_language_model(Opposite()) as small:
        models = {"small": small, "large": large}
        paused = await smc(by_two(small, large), 4, max_steps=1)
        recording = Recording(models)
        whole = await resume(by_two(small, large), paused, recording=recording)
        assert whole == await smc(by_two(small, large), 4)
        recording.save(tmp_path / "run.json")
        before = small.statistics().requests, large.statistics().requests
        assert await resume(by_two(small, large), paused, recording=recording.replay()) == whole
        loaded = Recording.load(tmp_path / "run.json", models)
        assert await resume(by_two(small, large), paused, recording=loaded) == whole
        assert (small.statistics().requests, large.statistics().requests) == before


async def test_strict_blocks_may_overlap():
    async with fake_language_model(FakeEngine()) as llm:
        plain = llm._service.engine
        first, second = strict(llm), strict(llm)
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert llm._service.engine is not plain, "the second is not over"
        second.__exit__(None, None, None)
        assert llm._service.engine is plain
