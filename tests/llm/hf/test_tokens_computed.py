"""Through the public interface: one token computed per distinct new prefix, one forward per step, nothing twice."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from genlm_backend.errors import SlowPathWarning
from genlm_backend.llm import AsyncTransformer
from genlm_backend.llm.hf.self_test import difference
from genlm_backend.llm.service import Statistics
from tests.llm.hf.walks import TINY_NATS, plain_row, random_ids, small

PROMPT = random_ids(random.Random(7), 12)


@pytest.fixture(params=["llama", pytest.param("bloom", marks=pytest.mark.thorough)])
def llm(request: pytest.FixtureRequest, wrap: Callable[..., AsyncTransformer]) -> AsyncTransformer:
    """Packed, and on transformers' own cache."""
    if request.param == "llama":
        return wrap(small("llama"))
    with pytest.warns(SlowPathWarning):
        return wrap(small("bloom"))


def added(before: Statistics, after: Statistics, name: str) -> int:
    return int(getattr(after, name) - getattr(before, name))


async def cost(llm: AsyncTransformer, *asked: list[int]) -> tuple[int, int]:
    """Tokens computed for these contexts asked at once, and questions answered from memory; rows are compared."""
    before = llm.statistics()
    rows = await asyncio.gather(*(llm.next_token_logprobs(ids) for ids in asked))
    after = llm.statistics()
    for ids, row in zip(asked, rows, strict=True):
        assert difference(row[None], plain_row(llm.model, ids)[None]).nats <= TINY_NATS
    return added(before, after, "tokens_computed"), added(before, after, "row_hits")


async def test_loading_counts_nothing(llm: AsyncTransformer) -> None:
    assert llm.statistics() == Statistics(0, 0, 0, 0, 0, 0, 0, 0)


async def test_particles_that_share_a_prompt_prefill_it_once_without_any_call(llm: AsyncTransformer) -> None:
    assert await cost(llm, *([PROMPT] * 10)) == (12, 0)
    assert await cost(llm, *(PROMPT + [50 + i] for i in range(10))) == (10, 0)
    assert llm.statistics().kv_tokens == 22


async def test_particles_with_different_first_tokens_prefill_their_prompt_once_in_the_first_batch(
    llm: AsyncTransformer,
) -> None:
    assert await cost(llm, *(PROMPT + [50 + i] for i in range(10))) == (22, 0)


async def test_nested_prefixes_are_computed_once(llm: AsyncTransformer) -> None:
    assert await cost(llm, *(PROMPT[:n] for n in (12, 3, 7, 1))) == (12, 0)
    if llm.path == "packed":
        assert llm.statistics().forwards == 1


async def test_siblings_after_a_fork_compute_their_own_token_only(llm: AsyncTransformer) -> None:
    await cost(llm, PROMPT)
    assert await cost(llm, PROMPT + [5], PROMPT + [6]) == (2, 0)
    assert await cost(llm, PROMPT + [5, 9], PROMPT + [6, 9]) == (2, 0)


async def test_going_back_computes_the_asked_row_only(llm: AsyncTransformer) -> None:
    await cost(llm, PROMPT)
    assert await cost(llm, PROMPT[:5]) == (1, 0)
    assert await cost(llm, PROMPT[:5] + [9]) == (1, 0)
    assert await cost(llm, PROMPT[:5]) == (0, 1)


async def test_a_remembered_row_is_not_computed_again(llm: AsyncTransformer) -> None:
    await cost(llm, PROMPT)
    assert await cost(llm, PROMPT, PROMPT) == (0, 2)


async def test_equal_suffixes_after_different_prefixes_are_different_requests(llm: AsyncTransformer) -> None:
    """genlm-backend 0.3.1 joined requests by their uncached suffix and gave both the first one's row."""
    llm.cache_kv([1, 2, 3])
    llm.cache_kv([4, 2, 3])
    assert await cost(llm, [1, 2, 3, 5], [4, 2, 3, 5], [5]) == (3, 0)


async def test_a_second_cached_prompt_keeps_the_first(llm: AsyncTransformer) -> None:
    """Prompts with one beginning (BOS) are branches, not replacements."""
    llm.cache_kv([1, 10, 11, 12])
    llm.cache_kv([1, 20, 21, 22])
    assert await cost(llm, [1, 10, 11, 12, 5], [1, 20, 21, 22, 5]) == (2, 0)


async def test_a_prompt_is_held_again_by_cache_kv_although_its_row_is_remembered(llm: AsyncTransformer) -> None:
    await cost(llm, PROMPT)
    llm.clear_kv_cache()
    llm.cache_kv(PROMPT)
    assert llm.statistics().kv_tokens == 12
    assert await cost(llm, PROMPT + [5]) == (1, 0)


async def test_synchronous_and_asynchronous_questions_share_what_is_cached(llm: AsyncTransformer) -> None:
    """A prefix without a row, an asked one above it: the sync path takes the deepest keys and their length."""
    llm.cache_kv(PROMPT[:4])
    await cost(llm, PROMPT[:8])
    before = llm.statistics()
    for _ in range(2):
        row = llm.next_token_logprobs_sync(PROMPT)
        assert difference(row[None], plain_row(llm.model, PROMPT)[None]).nats <= TINY_NATS
    rows = llm.batch_next_token_logprobs_sync([PROMPT + [7], PROMPT[:6]])
    assert rows.shape == (2, 512)
    assert added(before, llm.statistics(), "tokens_computed") == 4 + 1 + 1


async def test_generating_n_tokens_costs_n_tokens(llm: AsyncTransformer) -> None:
    before = llm.statistics()
    tokens = await llm.sample(PROMPT, max_tokens=20, eos_token_ids=[], seed=1)
    assert len(tokens) == 20
    assert added(before, llm.statistics(), "tokens_computed") == 12 + 19
    assert added(before, llm.statistics(), "forwards") == 20


async def test_a_sequence_is_scored_in_one_forward(wrap: Callable[..., AsyncTransformer]) -> None:
    llm = wrap(small("llama"))
    continuation = random_ids(random.Random(8), 9)
    got = await llm.sequence_logprob(PROMPT, continuation)
    assert llm.statistics()[1:4] == (1, 1, 12 + 8)
    logits: Any = small("llama")(torch.tensor([PROMPT + continuation])).logits[0, 11:-1].detach()
    want = logits.log_softmax(-1).gather(1, torch.tensor(continuation)[:, None]).double().sum()
    assert abs(got - float(want)) <= 9 * TINY_NATS


async def test_a_particle_that_is_alone_does_not_wait_for_others(wrap: Callable[..., AsyncTransformer]) -> None:
    """As many batches as questions: nothing is held back until a timer or a full batch."""
    llm = wrap(small("llama"))
    for n in range(1, 11):
        await llm.next_token_logprobs(PROMPT[:n])
    assert llm.statistics().batches == 10


async def test_a_row_belongs_to_its_caller(llm: AsyncTransformer) -> None:
    first, joined = await asyncio.gather(llm.next_token_logprobs(PROMPT), llm.next_token_logprobs(PROMPT))
    kept = first.clone()
    for row in (first, joined, await llm.next_token_logprobs(PROMPT)):
        assert torch.equal(row, kept)
        assert not row.is_inference() and not row.requires_grad and row.is_contiguous()
        row.fill_(0.0)
    assert torch.equal(await llm.next_token_logprobs(PROMPT), kept)
    assert await cost(llm, PROMPT + [9]) == (1, 0)


async def test_only_the_asked_rows_are_made(wrap: Callable[..., AsyncTransformer]) -> None:
    """Logits of a prompt's other positions are never computed, let alone kept."""
    llm = wrap(small("llama"))
    engine: Any = llm._service.engine
    shapes = []
    head = engine.model.lm_head
    head.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    await asyncio.gather(llm.next_token_logprobs(PROMPT), llm.next_token_logprobs(PROMPT + [3]))
    assert shapes == [(1, 2, 512)]
    assert len(llm._service.memo) == 2
