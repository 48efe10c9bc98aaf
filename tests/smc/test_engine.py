"""What a run promises besides its law: reproducibility, resuming, named failures, clean cancellation, and its costs."""

from __future__ import annotations

import asyncio
import copy
import math
import pickle
import random

import numpy as np
import pytest
import torch

from genlm_backend.errors import (
    AllParticlesDead,
    InvalidProgram,
    NonFiniteWeight,
    ParticleFailed,
    ReplayMismatch,
)
from genlm_backend.llm.queries import Draw
from genlm_backend.llm.queries import TopK as TopTokensQuery
from genlm_backend.smc import (
    Bernoulli,
    Done,
    Islands,
    Particle,
    Recording,
    Result,
    islands,
    program,
    regenerate,
    resume,
    resume_islands,
    smc,
    strict,
)
from genlm_backend.smc.recording import _named
from genlm_backend.testing import FakeEngine, check_idle, fake_language_model
from tests.smc.oracle import ROW, ChainParticle, chain

pytestmark = pytest.mark.thorough


@program
async def writer(ctx, llm, n=4, looks=False):
    """n tokens by the model, weighed by a rule; ends early at token 0."""
    ids = [1]
    for i in range(n):
        if i % 2:
            ids.append(await ctx.next_token(llm, ids, temperature=0.8))
        else:
            row = await ctx.logprobs(llm, ids)
            if looks:
                ctx.score(0.1 * float(row.max()))
            ids.append(await ctx.sample(row))
        top = await ctx.query(llm, ids, TopTokensQuery(2))
        ctx.score(0.5 * float(top.logprobs[0]) + (0.0 if ids[-1] % 3 else -1.0))
        if ids[-1] == 0:
            break
        await ctx.checkpoint()
    return tuple(ids)


# ---- the same seed, the same result


async def jittered(seed: int, i: int) -> Result:
    """A run beside noise: another batch size, other arrival times, other requests."""
    noise = random.Random(i)
    async with fake_language_model(FakeEngine(), batch_size=noise.randint(1, 30)) as llm:

        @program
        async def late(ctx):
            ids = [1]
            for _ in range(3):
                for _ in range(noise.randint(0, 6)):
                    await asyncio.sleep(0)
                ids.append(await ctx.next_token(llm, ids))
                ctx.score(-0.3 * (ids[-1] % 3))
                await ctx.checkpoint()
            return tuple(ids)

        beside = [asyncio.create_task(llm.next_token_logprobs([noise.randint(0, 15)])) for _ in range(3)]
        result = await smc(late(), 5, seed=seed, ess_threshold=0.8)
        await asyncio.gather(*beside)
    return result


@pytest.mark.parametrize(
    "n_runs",
    [pytest.param(12, id="few"), pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(600)], id="thousand")],
)
async def test_equal_seeds_give_equal_results_whatever_the_batches_and_arrivals(n_runs):
    first = await jittered(7, 0)
    for i in range(1, n_runs):
        assert await jittered(7, i) == first
    assert await jittered(8, 0) != first


async def test_with_and_without_barriers_importance_sampling_is_the_same():
    free = await smc(chain(3), 6, method="importance", seed=4)
    seen = []
    stepped = await smc(chain(3), 6, method="importance", seed=4, on_step=lambda step, number: seen.append(number))
    assert free == stepped
    assert seen == list(range(len(stepped.steps)))


# ---- replaying


@pytest.mark.parametrize("looks", [False, True])
async def test_copies_ask_the_model_nothing_again(looks):
    engine = FakeEngine()
    async with fake_language_model(engine, row_memo_bytes=1) as llm:
        result = await smc(writer(llm, looks=looks), 8, seed=1, ess_threshold=1.0)
        assert any(step.ancestors and len(set(step.ancestors)) < 8 for step in result.steps), "there were copies"
        asked = [context for batch in engine.batches for context in batch]
        wanted = {path.value[: i + 1] for path in result.paths for i in range(len(path.value))}
        assert wanted <= set(asked)
        n_rows_looked_at_again = len(asked) - len({*asked})
        if not looks:
            longest = max(len(batch) for batch in engine.batches)
            assert longest <= 8
            n_moves = sum(step.statuses.count("r") + step.statuses.count("d") for step in result.steps)
            assert len(asked) <= 2 * n_moves, "one row and one question per particle and step at most"
        else:
            assert n_rows_looked_at_again > 0, "this program looks at old rows, so copies fetch them"


async def test_a_row_in_a_copy_is_a_tensor_like_any_other():
    seen = []

    @program
    async def looking(ctx):
        row = await ctx.logprobs(llm, [1])
        await ctx.checkpoint()
        seen.append(([f"{x:.3f}" for x in row.tolist()], float(row[2]), row.numpy().shape, row.argmax().item()))
        assert isinstance(row + 1, torch.Tensor) and len(row) == 16
        ctx.score(float(row[await ctx.sample(row)]))
        return 0

    async with fake_language_model(FakeEngine()) as llm:
        await smc(looking(), 3, seed=0, max_steps=1)
        paused = await smc(looking(), 3, seed=0, max_steps=1)
        resumed = await resume(looking(), paused)
        assert resumed == await smc(looking(), 3, seed=0)
    assert len(seen) == 6 and len({str(s) for s in seen}) == 1


async def test_a_program_that_is_not_the_same_again_is_told_so():
    calls = []

    @program
    async def fickle(ctx):
        calls.append(1)
        if len(calls) > 4:
            ctx.key()
        await ctx.sample(ROW)
        await ctx.checkpoint()
        return 0

    paused = await smc(fickle(), 4, max_steps=1)
    with pytest.raises(ParticleFailed, match=r"step 1.*ReplayMismatch") as caught:
        await resume(fickle(), paused)
    assert isinstance(caught.value.__cause__, ReplayMismatch)


# ---- keeping and resuming


@pytest.mark.parametrize("n_steps", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", ["program", "particle", "importance", "best", "beam", "model", "steer", "moves"])
async def test_a_saved_run_goes_on_as_if_never_interrupted(kind, n_steps, tmp_path):
    async with fake_language_model(FakeEngine()) as llm:
        model, options = {
            "program": (chain(3, guess=True), {}),
            "particle": (ChainParticle(), {"ess_threshold": 1.0}),
            "importance": (chain(3), {"method": "importance"}),
            "best": (chain(3), {"method": "best_of_n"}),
            "beam": (chain(3), {"method": "beam"}),
            "model": (writer(llm), {"ess_threshold": 0.9}),
            "steer": (chain(3), {"method": "steer"}),
            "moves": (chain(3), {"ess_threshold": 1.0}),
        }[kind]
        kernel = regenerate if kind == "moves" else None
        whole = await smc(model, 6, seed=5, kernel=kernel, **options)
        paused = await smc(model, 6, seed=5, max_steps=n_steps, kernel=kernel, **options)
        assert len(paused.steps) == min(n_steps, len(whole.steps))
        paused.save(tmp_path / "run.json")
        loaded = Result.load(tmp_path / "run.json")
        assert loaded == paused
        assert await resume(model, loaded, kernel=kernel) == whole
        with pytest.raises(ValueError, match="expected genlm_backend"):
            Recording.load(tmp_path / "run.json")


@pytest.mark.parametrize("n_steps", [0, 1, 2, 3])
async def test_saved_islands_go_on_as_if_never_interrupted(n_steps, tmp_path):
    async with fake_language_model(FakeEngine()) as llm:
        for model, options in ((writer(llm), {"ess_threshold": 0.9}), (chain(3), {"ess_threshold": 0.0})):
            whole = await islands(model, 3, 4, seed=5, **options)
            assert len({result.log_weights for result in whole.results}) == 3
            paused = await islands(model, 3, 4, seed=5, max_steps=n_steps, **options)
            paused.save(tmp_path / "islands.json")
            loaded = Islands.load(tmp_path / "islands.json")
            assert loaded == paused and (n_steps > 1 or loaded != whole)
            resumed = await resume_islands(model, loaded)
            assert resumed == whole
            assert resumed.log_evidence == whole.log_evidence
            assert await resume_islands(model, resumed) == whole
    with pytest.raises(ValueError, match="expected genlm_backend"):
        Result.load(tmp_path / "islands.json")


async def test_islands_that_died_out_stay_dead_when_the_others_go_on():
    @program
    async def risky(ctx):
        await ctx.checkpoint()
        alive = await ctx.sample(Bernoulli(0.3))
        await ctx.checkpoint()
        ctx.condition(alive)
        await ctx.checkpoint()
        return alive

    whole = await islands(risky(), 8, 2, seed=1)
    n_dead = sum(result.log_evidence == -math.inf for result in whole.results)
    assert 0 < n_dead < 8
    for n_steps in range(5):
        assert await resume_islands(risky(), await islands(risky(), 8, 2, seed=1, max_steps=n_steps)) == whole


async def test_islands_are_not_recorded_together():
    with pytest.raises(InvalidProgram, match="one recording"):
        await islands(chain(3), 2, 2, recording=Recording())


def test_draws_that_differ_in_any_way_are_recorded_apart():
    mask = np.array([True, False, True])
    values = {"key": [2], "temperature": [0.5], "mask": [mask, ~mask], "top_k": [1, 2], "top_p": [0.5, 0.9]}
    values |= {"min_p": [0.5, 0.9]}
    assert set(values) == set(Draw._fields), "a field that is missing here may be missing in the recording"
    draws = [Draw(1), *(Draw(1)._replace(**{name: value}) for name, some in values.items() for value in some)]
    assert len({_named(draw) for draw in draws}) == len(draws)


async def test_a_recorded_run_is_repeated_without_model_and_randomness(tmp_path):
    recording = Recording()
    async with fake_language_model(FakeEngine()) as llm:
        first = await smc(writer(llm, looks=True), 6, seed=2, ess_threshold=0.9, recording=recording)
    recording.save(tmp_path / "recording.json")
    loaded = Recording.load(tmp_path / "recording.json")
    other = FakeEngine()
    other.fail_calls = {i: RuntimeError("the model was asked") for i in range(1000)}
    async with fake_language_model(other) as silent:
        again = await smc(writer(silent, looks=True), 6, seed=2, ess_threshold=0.9, recording=loaded)
    assert loaded.is_replay and again == first and not other.batches


@pytest.mark.parametrize(
    "n_runs",
    [pytest.param(10, id="few"), pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(600)], id="k")],
)
async def test_repeating_a_recording_is_bit_equal(n_runs, tmp_path):
    recording = Recording()
    async with fake_language_model(FakeEngine()) as llm:
        first = await smc(writer(llm), 6, seed=2, ess_threshold=0.9, recording=recording)
    recording.save(tmp_path / "recording.json")
    loaded = Recording.load(tmp_path / "recording.json")
    silent = FakeEngine()
    async with fake_language_model(silent) as llm:
        for _ in range(n_runs):
            again = await smc(writer(llm), 6, seed=2, ess_threshold=0.9, recording=loaded)
            assert again == first
            assert [w.hex() for w in again.log_weights] == [w.hex() for w in first.log_weights]
        with pytest.raises(ParticleFailed, match=r"no such draw|no answer"):
            await smc(writer(llm), 6, seed=3, ess_threshold=0.9, recording=loaded)
    assert not silent.batches


async def test_a_recording_of_a_real_model_is_replayed_without_it(tiny_llama, tiny_tokenizer_512, tmp_path):
    from genlm_backend.llm import AsyncTransformer

    recording = Recording()
    async with AsyncTransformer(tiny_llama, tiny_tokenizer_512) as llm:
        first = await smc(writer(llm, n=5), 4, seed=0, ess_threshold=0.9, recording=recording)
        recording.save(tmp_path / "recording.json")
        loaded = Recording.load(tmp_path / "recording.json")
        before = llm.statistics()
        for _ in range(20):
            assert await smc(writer(llm, n=5), 4, seed=0, ess_threshold=0.9, recording=loaded) == first
        assert llm.statistics() == before


async def test_strict_rows_are_computed_alone(tiny_llama, tiny_tokenizer_512):
    from genlm_backend.llm import AsyncTransformer

    async with AsyncTransformer(tiny_llama, tiny_tokenizer_512) as llm:
        contexts = [[1, 2, 3], [1, 2, 4], [1, 2, 3, 5], [7]]
        with strict(llm):
            alone = [await llm.next_token_logprobs(context) for context in contexts]
            llm.clear_cache()
            await llm.next_token_logprobs([1, 2])
            together = await asyncio.gather(*(llm.next_token_logprobs(c) for c in reversed(contexts)))
        assert all(torch.equal(a, b) for a, b in zip(alone, reversed(together), strict=True))
        plain = await asyncio.gather(*(llm.next_token_logprobs(c) for c in contexts))
        assert all((a - b).abs().max() < 1e-4 for a, b in zip(alone, plain, strict=True))


async def test_strict_runs_on_a_real_model_are_bit_equal(tiny_llama, tiny_tokenizer_512):
    from genlm_backend.llm import AsyncTransformer

    runs = []
    before = torch.get_num_threads()
    try:
        for batch_size in (2, 50):
            async with AsyncTransformer(tiny_llama, tiny_tokenizer_512, batch_size=batch_size) as llm:
                for i in range(10):
                    torch.set_num_threads(1 + i % 2)
                    await llm.next_token_logprobs([1, 2, i])
                    with strict(llm):
                        runs.append(await smc(writer(llm, n=5), 4, seed=0, ess_threshold=0.9))
    finally:
        torch.set_num_threads(before)
    assert len(runs) == 20 and all(run == runs[0] for run in runs[1:])


@pytest.mark.thorough
async def test_plain_runs_on_a_real_model_are_token_equal_in_99_of_100(tiny_llama, tiny_tokenizer_512):
    """Float32 rows that differ in their last bits: other threads, batches and caches, and weights changed by 1e-6.

    (The former alone give equal bits on some processors.)
    """
    from genlm_backend.llm import AsyncTransformer

    changed = copy.deepcopy(tiny_llama)
    with torch.no_grad():
        changed.lm_head.weight.mul_(1 + 1e-6)
    before = torch.get_num_threads()
    drawn, evidence = [], []
    try:
        for model, batch_size, n_threads, is_warm in ((tiny_llama, 50, 2, False), (changed, 3, 1, True)):
            torch.set_num_threads(n_threads)
            async with AsyncTransformer(model, tiny_tokenizer_512, batch_size=batch_size) as llm:
                runs = []
                for seed in range(100):
                    if is_warm:
                        await llm.next_token_logprobs([seed])
                    else:
                        llm.clear_cache()
                    runs.append(await smc(writer(llm, n=5), 4, seed=seed, ess_threshold=0.9))
            drawn.append([[path.choices for path in run.paths] for run in runs])
            evidence.append([run.log_evidence for run in runs])
    finally:
        torch.set_num_threads(before)
    assert evidence[0] != evidence[1], "the rows differ in their bits"
    assert sum(a == b for a, b in zip(*drawn, strict=True)) >= 99


# ---- failures


async def test_a_particle_that_raises_is_named_and_the_others_have_ended():
    ended = []

    @program
    async def sometimes(ctx):
        try:
            for _ in range(5):
                await ctx.sample(ROW)
                await asyncio.sleep(0)
                if ctx.step == 2 and ctx.particle == 3:
                    raise KeyError("oh")
                await asyncio.sleep(0)
                await ctx.checkpoint()
        finally:
            ended.append(ctx.particle)

    with pytest.raises(ParticleFailed, match=r"particle 3 raised at step 2: KeyError: 'oh'") as caught:
        await smc(sometimes(), 6)
    assert isinstance(caught.value.__cause__, KeyError)
    assert len(ended) == 6
    assert len(asyncio.all_tasks()) == 1
    result = caught.value.result
    assert result.status == "failed" and len(result.steps) == 2
    assert all(len(path.log_increments) == 2 for path in result.paths), "two whole steps of each are kept"
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value)
    marked = await smc(sometimes(), 6, on_failure="mark")
    assert marked == result and "particle 3" in marked.failure


@pytest.mark.parametrize("threshold", [0.0, 0.5])
async def test_a_failed_run_goes_on_after_the_mistake_is_mended(threshold):
    is_broken = True

    @program
    async def fragile(ctx):
        symbols = []
        for i in range(4):
            symbols.append(await ctx.sample(ROW))
            if is_broken and i == 2 and ctx.particle == 1:
                raise OSError("disk full")
            ctx.score(-0.3 * symbols[-1])
            await ctx.checkpoint()
        return tuple(symbols)

    failed = await smc(fragile(), 5, ess_threshold=threshold, on_failure="mark")
    assert failed.status == "failed" and "disk full" in failed.failure
    is_broken = False
    assert await resume(fragile(), failed) == await smc(fragile(), 5, ess_threshold=threshold)


@pytest.mark.parametrize("weight", [math.nan, math.inf])
@pytest.mark.parametrize("threshold", [0.0, 0.5])
async def test_weights_that_are_no_numbers_are_named(weight, threshold):
    @program
    async def bad(ctx):
        await ctx.checkpoint()
        if ctx.particle == 2:
            ctx.score(weight)
        return 0

    with pytest.raises(NonFiniteWeight, match=rf"particle 2 has log-weight {weight} .* at step 1"):
        await smc(bad(), 4, ess_threshold=threshold)


@pytest.mark.parametrize("method", ["smc", "importance", "beam", "steer"])
async def test_everyone_dead_is_an_error_with_the_run_so_far(method):
    @program
    async def doomed(ctx):
        await ctx.sample(ROW)
        await ctx.checkpoint()
        await ctx.sample(ROW)
        ctx.condition(False)

    with pytest.raises(AllParticlesDead, match="at step 1") as caught:
        await smc(doomed(), 4, method=method)
    result = caught.value.result
    assert result.log_evidence == -math.inf and result.status == "failed"
    assert set(result.steps[-1].statuses) == {"x"}
    assert result.posterior() == {}
    with pytest.raises(ValueError, match="dead"):
        result.best()


async def test_a_few_dead_ones_are_replaced_and_a_dead_end_is_no_error():
    @program
    async def narrow(ctx):
        symbol = await ctx.sample(ROW)
        ctx.condition(symbol == 2)
        await ctx.checkpoint()
        return symbol

    result = await smc(narrow(), 20, seed=1)
    assert result.posterior() == pytest.approx({2: 1.0})
    assert result.steps[0].statuses.count("x") > 5 and result.steps[0].ancestors is not None


async def test_dying_runs_finally_blocks_and_passes_by_except_exception():
    ran = []

    @program
    async def stubborn(ctx):
        try:
            try:
                ctx.condition(False)
            except Exception:
                ran.append("swallowed")
        finally:
            ran.append("finally")

    await smc(stubborn(), 2, on_failure="mark")
    assert ran == ["finally", "finally"]


async def test_a_cancelled_run_leaves_nothing_behind():
    engine = FakeEngine(is_open=False)
    async with fake_language_model(engine) as llm:
        run = asyncio.create_task(smc(writer(llm), 8))
        await engine.entered()
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        assert len(asyncio.all_tasks()) == 1
        engine.open()
        check_idle(llm)


async def test_particles_that_are_done_stop_costing():
    engine = FakeEngine()

    @program
    async def unequal(ctx):
        long = await ctx.sample(Bernoulli(0.2))
        for i in range(6 if long else 1):
            await ctx.logprobs(llm, [ctx.key() % 16, i])
            await ctx.checkpoint()
        return long

    async with fake_language_model(engine) as llm:
        result = await smc(unequal(), 10, seed=0)
    n_long = sum(result.values)
    assert 0 < n_long < 6
    assert max(len(batch) for batch in engine.batches[1:]) <= n_long


async def test_whatever_all_particles_ask_is_one_batch():
    engine = FakeEngine()
    async with fake_language_model(engine) as llm:

        @program
        async def apart(ctx):
            for i in range(3):
                await ctx.logprobs(llm, [ctx.key() % 16, ctx.particle % 16, i])
                await ctx.checkpoint()

        await smc(apart(), 12, ess_threshold=1.0)
        assert [len(batch) for batch in engine.batches] == [12, 12, 12]
        engine.batches.clear()
        await islands(apart(), 3, 4, ess_threshold=1.0)
        assert sum(len(batch) for batch in engine.batches) <= 36 and len(engine.batches) <= 5


# ---- mistakes in programs


async def test_mistakes_are_told_in_words():
    @program
    async def unnormalised(ctx):
        await ctx.sample(ROW + 1.0)

    @program
    async def pending(ctx):
        task = asyncio.ensure_future(ctx.recorded(lambda: asyncio.sleep(1)))
        await asyncio.sleep(0)
        try:
            await ctx.checkpoint()
        finally:
            task.cancel()

    class Nested(Particle):
        async def step(self, ctx):
            await ctx.checkpoint()

    class Wrong(Particle):
        async def step(self, ctx):
            return 3

    for model, message in (
        (unnormalised(), "total probability of 2.718"),
        (pending(), "pending"),
        (Nested(), "checkpoint within Particle.step"),
        (Wrong(), "a step returned 3"),
        (lambda ctx: 3, "no coroutine function"),
    ):
        with pytest.raises(ParticleFailed, match=message):
            await smc(model, 2)
    for model, n, options, message in (
        ({}, 2, {}, "was given"),
        (chain(), 0, {}, "at least one particle"),
        (chain(), 2, {"method": "magic"}, "choose one of smc"),
        (chain(), 2, {"resampling": "magic"}, "choose one of multinomial"),
        (chain(), 2, {"ess_threshold": 2}, "from 0 to 1"),
    ):
        with pytest.raises(InvalidProgram, match=message):
            await smc(model, n, **options)


async def test_particles_and_programs_of_one_law_share_their_draws():
    @dataclass_particle
    class Count(Particle):
        symbols: tuple = ()

        async def step(self, ctx):
            symbols = (*self.symbols, await ctx.sample(ROW))
            return Done(symbols) if len(symbols) == 3 else Count(symbols)

    @program
    async def count(ctx):
        symbols = ()
        while True:
            symbols = (*symbols, await ctx.sample(ROW))
            if len(symbols) == 3:
                return symbols
            await ctx.checkpoint()

    assert (await smc(Count(), 5, seed=3)).values == (await smc(count(), 5, seed=3)).values


def dataclass_particle(cls):
    from dataclasses import dataclass

    return dataclass(frozen=True)(cls)


# ---- the evidence's error


@pytest.mark.parametrize(
    "n_runs",
    [pytest.param(200, id="few"), pytest.param(2000, marks=[pytest.mark.slow, pytest.mark.timeout(600)], id="many")],
)
async def test_the_variance_of_the_evidence_is_estimated_without_bias_from_one_run(n_runs):
    """E[Z_hat^2 V] = Var(Z_hat) for multinomial resampling at each step; within 6 standard errors."""
    from genlm_backend.smc.weights import relative_variance

    z, v = [], []
    for seed in range(n_runs):
        result = await smc(chain(2), 4, seed=seed, ess_threshold=1.0, resampling="multinomial", on_failure="mark")
        z.append(math.exp(result.log_evidence))
        resamplings = sum(step.ancestors is not None for step in result.steps)
        per_eve = relative_variance(result.log_weights, result.eves, resamplings, 4)
        v.append(z[-1] ** 2 * per_eve)
    z, v = torch.tensor(z), torch.tensor(v)
    squares = (z - z.mean()) ** 2
    error = math.sqrt(float(squares.var() + v.var()) / n_runs)
    # Clipping at 0 makes the estimate a little larger than the variance; never smaller.
    assert -6 * error < float(v.mean() - squares.mean()) < 6 * error + 0.5 * float(squares.mean())
