"""Samples, streams and sequence probabilities, over a fake engine."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from genlm_backend import sampling
from genlm_backend.llm import AsyncLM
from genlm_backend.testing import FakeEngine, check_idle, fake_language_model

N_VOCAB = 24
PROMPT = [1, 2, 3]


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(N_VOCAB)


@pytest.fixture
def llm(engine: FakeEngine) -> Iterator[AsyncLM]:
    llm = fake_language_model(engine, N_VOCAB)
    yield llm
    check_idle(llm)
    llm.close()


def greedy(engine: FakeEngine, prompt: list[int], n: int) -> list[int]:
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(engine.row(ids).argmax()))
    return ids[len(prompt) :]


# ---- samples


async def test_temperature_0_is_greedy(llm: AsyncLM, engine: FakeEngine) -> None:
    expected = greedy(engine, PROMPT, 6)
    assert await llm.sample(PROMPT, 6, [], temperature=0) == expected
    assert await llm.batch_sample([PROMPT, PROMPT], 6, [], temperature=0.0) == [expected, expected]


async def test_one_seed_gives_one_sample_whatever_else_runs(llm: AsyncLM) -> None:
    alone = await llm.sample(PROMPT, 8, [], seed=5)
    llm.clear_cache()
    others = [asyncio.create_task(llm.sample([i], 8, [], seed=i)) for i in range(10)]
    assert await llm.sample(PROMPT, 8, [], seed=5) == alone and len(alone) == 8
    await asyncio.gather(*others)
    assert await asyncio.gather(*(llm.sample([i], 8, [], seed=i) for i in range(10))) == [t.result() for t in others]
    assert await llm.sample(PROMPT, 8, [], seed=6) != alone


async def test_without_a_seed_every_sample_is_another(llm: AsyncLM) -> None:
    samples = await asyncio.gather(*(llm.sample(PROMPT, 10, []) for _ in range(5)))
    assert len(set(map(tuple, samples))) == 5


async def test_equal_prompts_of_a_batch_get_different_samples(llm: AsyncLM, engine: FakeEngine) -> None:
    samples = await llm.batch_sample([PROMPT] * 8, 10, [], seed=3)
    assert len(set(map(tuple, samples))) == 8
    assert engine.batches[0] == [tuple(PROMPT)] and len(engine.batches) == 10, "one batch per step"
    assert samples == await llm.batch_sample([PROMPT] * 8, 10, [], seed=3)


async def test_a_sample_of_a_batch_does_not_depend_on_its_mates(llm: AsyncLM) -> None:
    whole = await llm.batch_sample([[1], [2], [3]], 6, [], seed=3)
    assert await llm.batch_sample([[1], [9, 9], [3], [4]], 6, [], seed=3) != whole
    assert (await llm.batch_sample([[1], [9, 9], [3], [4]], 6, [], seed=3))[::2] == whole[::2]


async def test_a_batch_of_no_prompts(llm: AsyncLM, engine: FakeEngine) -> None:
    assert await llm.batch_sample([], 5, []) == [] and engine.batches == []


@pytest.mark.parametrize(
    "kind", [list, tuple, set, frozenset, np.array, torch.tensor, lambda ids: list(torch.tensor(ids))]
)
async def test_the_end_token_ends_the_sample_and_is_not_in_it(llm: AsyncLM, engine: FakeEngine, kind: Any) -> None:
    tokens = await llm.sample(PROMPT, 12, [], seed=1)
    end = tokens[5]
    assert await llm.sample(PROMPT, 12, kind([end, N_VOCAB + 5]), seed=1) == tokens[: tokens.index(end)]


async def test_the_end_token_of_a_tokenizer_that_has_none_ends_nothing(llm: AsyncLM) -> None:
    """As a program for genlm-backend hands it on: `[llm.tokenizer.eos_token_id]`."""
    without = [None]
    assert await llm.sample(PROMPT, 12, without, seed=1) == await llm.sample(PROMPT, 12, [], seed=1)  # type: ignore


async def test_no_tokens_asked_for(llm: AsyncLM, engine: FakeEngine) -> None:
    assert await llm.sample(PROMPT, 0, []) == [] and engine.batches == []


async def test_the_prompt_is_not_changed(llm: AsyncLM) -> None:
    prompt = list(PROMPT)
    await llm.sample(prompt, 3, [])
    assert prompt == PROMPT


@pytest.mark.thorough
async def test_samples_follow_the_model(llm: AsyncLM, engine: FakeEngine) -> None:
    """First tokens of 4,000 samples: sum |p_hat - p| <= sqrt(2 (K ln 2 + ln(1/delta)) / n), delta = 1e-9."""
    n = 4000
    first = Counter(token for (token,) in await llm.batch_sample([PROMPT] * n, 1, [], seed=11))
    seen = torch.tensor([first[i] / n for i in range(N_VOCAB)])
    bound = math.sqrt(2 * (N_VOCAB * math.log(2) + math.log(1e9)) / n)
    assert (seen - engine.row(PROMPT).exp()).abs().sum().item() <= bound
    hotter = sampling.with_temperature(engine.row(PROMPT), 2.0).exp()
    assert (seen - hotter).abs().sum().item() > bound, "another temperature would be noticed"


async def test_cancelling_a_sample_leaves_others_alone(llm: AsyncLM) -> None:
    expected = await llm.sample(PROMPT, 10, [], seed=2)
    llm.clear_cache()
    dropped = asyncio.create_task(llm.sample([5], 1000, [], seed=1))
    kept = asyncio.create_task(llm.sample(PROMPT, 10, [], seed=2))
    for _ in range(60):
        await asyncio.sleep(0)
    dropped.cancel()
    assert await kept == expected and dropped.cancelled()


async def test_cancelling_a_batch_of_samples_ends_them_all(llm: AsyncLM, engine: FakeEngine) -> None:
    batch = asyncio.create_task(llm.batch_sample([[1], [2], [3]], 10_000, []))
    while len(engine.batches) < 3:
        await asyncio.sleep(0)
    batch.cancel()
    with pytest.raises(asyncio.CancelledError):
        await batch
    assert asyncio.all_tasks() == {asyncio.current_task()}


# ---- streams


async def test_a_stream_gives_the_tokens_of_the_sample_as_they_come(llm: AsyncLM, engine: FakeEngine) -> None:
    expected = await llm.sample(PROMPT, 6, [], seed=4)
    llm.clear_cache()
    engine.batches.clear()
    tokens = []
    async for token in llm.stream(PROMPT, 6, seed=4):
        tokens.append(token)
        assert len(engine.batches) == len(tokens), "nothing is computed ahead"
    assert tokens == expected


@pytest.mark.parametrize("n_taken", [0, 1, 3])
@pytest.mark.parametrize("how", ["aclose", "athrow"])
async def test_a_stream_closed_early_computes_no_more_and_spoils_nothing(
    llm: AsyncLM, engine: FakeEngine, n_taken: int, how: str
) -> None:
    stream = llm.stream(PROMPT, 100, seed=4)
    taken = [await anext(stream) for _ in range(n_taken)]
    if how == "athrow":
        with pytest.raises(ValueError):
            await stream.athrow(ValueError())
    await stream.aclose()
    assert len(engine.batches) == n_taken
    assert (await llm.sample(PROMPT, 5, [], seed=4))[:n_taken] == taken
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_stream_cancelled_while_it_waits(llm: AsyncLM, engine: FakeEngine) -> None:
    tokens: list[int] = []

    async def read() -> None:
        async for token in llm.stream(PROMPT, 100_000, seed=4):
            tokens.append(token)

    reader = asyncio.create_task(read())
    while len(engine.batches) < 3:
        await asyncio.sleep(0)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert (await llm.sample(PROMPT, 20, [], seed=4))[: len(tokens)] == tokens


# ---- sequences


async def test_the_probability_of_a_sequence_is_the_product_of_its_steps(llm: AsyncLM, engine: FakeEngine) -> None:
    continuation = [4, 9, 9, 0, 23]
    ids = PROMPT + continuation
    expected = sum(engine.row(ids[:n])[ids[n]].item() for n in range(len(PROMPT), len(ids)))
    assert await llm.sequence_logprob(PROMPT, continuation) == pytest.approx(expected, abs=1e-5)
    assert engine.batches == [[tuple(ids[:n]) for n in range(3, 8)]], "all positions in one batch"
    assert await llm.sequence_logprob(PROMPT, []) == 0.0


async def test_two_halves_add_up_to_the_whole(llm: AsyncLM) -> None:
    first, second = [4, 9], [0, 23, 1]
    whole, one, two = await asyncio.gather(
        llm.sequence_logprob(PROMPT, first + second),
        llm.sequence_logprob(PROMPT, first),
        llm.sequence_logprob(PROMPT + first, torch.tensor(second)),  # type: ignore[arg-type]
    )
    assert whole == pytest.approx(one + two, abs=1e-5)


async def test_all_continuations_of_one_length_have_probability_one(engine: FakeEngine) -> None:
    async with fake_language_model(FakeEngine(3), 3) as llm:
        pairs = [[i, j] for i in range(3) for j in range(3)]
        logprobs = await asyncio.gather(*(llm.sequence_logprob([0], pair) for pair in pairs))
    assert sum(map(math.exp, logprobs)) == pytest.approx(1.0, abs=1e-5)
