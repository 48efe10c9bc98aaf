"""The real SmolLM2-135M-Instruct: packed rows equal plain ones in float32, and are as close in bfloat16 as it is."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from genlm_backend.llm import AsyncTransformer
from genlm_backend.llm.hf.self_test import difference
from genlm_backend.llm.queries import TopK
from tests.llm.hf.walks import plain_row

pytestmark = [pytest.mark.model, pytest.mark.slow]
NATS = 1e-4  # over tokens with p > 1e-8
TOTAL_VARIATION = 1e-5
TEXT = "Montreal is a city on an island in the Saint Lawrence river, and"


@pytest.fixture(scope="module", autouse=True)
def two_threads() -> Iterator[None]:
    n_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="module")
def exact(smollm2_path: Path) -> Iterator[AsyncTransformer]:
    """In float32."""
    llm = AsyncTransformer.from_name(
        str(smollm2_path), hf_opts={"dtype": torch.float32}, device="cpu", kv_cache_bytes=100 * 46080
    )
    assert llm.path == "packed" and llm._service.engine.n_fused == 30  # type: ignore[attr-defined]
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def plain(smollm2_path: Path) -> Any:
    """transformers alone, in float32."""
    return AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.float32).eval()


async def test_rows_of_a_random_walk_equal_plain_ones(exact: AsyncTransformer, plain: Any) -> None:
    """Particles extend by likely tokens, branch, go back, in a budget that makes them evict."""
    rng = random.Random(0)
    known = [exact.tokenizer.encode(TEXT)]
    nats = total_variation = 0.0
    n_most = 0
    for n in (1, 8, 8, 3, 8, 12):
        asked = []
        for _ in range(n):
            ids = rng.choice(known)
            ids = ids[: rng.randrange(max(1, len(ids) - 8), len(ids) + 1)]
            top = await exact.query(ids, TopK(20))
            asked.append([*ids, int(rng.choice(top.token_ids.tolist()))])
        known += asked
        before = exact.statistics().batches
        rows = await asyncio.gather(*(exact.next_token_logprobs(ids) for ids in asked))
        n_most = max(n_most, n if exact.statistics().batches - before == 1 else 0)
        for ids, row in zip(asked, rows, strict=True):
            apart = difference(row[None], plain_row(plain, ids)[None])
            nats, total_variation = max(nats, apart.nats), max(total_variation, apart.total_variation)
    trunk = exact.tokenizer.encode(TEXT * 8)
    for ids in (trunk, trunk[:90], trunk + known[-1], trunk[:60]):
        apart = difference((await exact.next_token_logprobs(ids))[None], plain_row(plain, ids)[None])
        nats, total_variation = max(nats, apart.nats), max(total_variation, apart.total_variation)
    assert nats <= NATS
    assert total_variation <= TOTAL_VARIATION
    assert n_most > 1
    assert exact.statistics().evictions > 0
    assert exact.statistics().kv_bytes <= 100 * 46080


async def test_greedy_text_is_what_generate_gives(exact: AsyncTransformer, plain: Any) -> None:
    ids = torch.tensor([exact.tokenizer.encode(TEXT)])
    want = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    got = await exact.sample(ids[0], 24, [exact.tokenizer.eos_token_id], temperature=0)
    assert exact.tokenizer.decode(got) == exact.tokenizer.decode(want[0, ids.shape[1] :], skip_special_tokens=True)
    assert len(got) > 10


async def test_a_sequence_is_scored_as_by_one_plain_forward(exact: AsyncTransformer, plain: Any) -> None:
    prompt = exact.tokenizer.encode(TEXT)
    continuation = exact.tokenizer.encode(" the largest city of Quebec, where many people speak French.")
    exact.clear_cache()
    before = exact.statistics()
    got = await exact.sequence_logprob(prompt, continuation)
    assert exact.statistics().forwards - before.forwards == 1
    with torch.inference_mode():
        logits = plain(torch.tensor([prompt + continuation])).logits[0, len(prompt) - 1 : -1]
    want = logits.log_softmax(-1).gather(1, torch.tensor(continuation)[:, None]).double().sum()
    assert abs(got - float(want)) <= NATS * len(continuation)


async def test_bfloat16_rows_are_as_close_as_plain_bfloat16(smollm2_path: Path, plain: Any) -> None:
    """Repacked weights and packed attention add nothing to the rounding of bfloat16 itself."""
    async with AsyncTransformer.from_name(str(smollm2_path), hf_opts={"dtype": torch.bfloat16}, device="cpu") as llm:
        assert llm.path == "packed" and llm._service.engine.n_fused == 30  # type: ignore[attr-defined]
        plain_half = AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.bfloat16).eval()
        trunk = llm.tokenizer.encode(TEXT)
        asked = [trunk, trunk[:5], *(trunk + llm.tokenizer.encode(word) for word in (" the", " it is", " its people"))]
        rows = await asyncio.gather(*(llm.next_token_logprobs(ids) for ids in asked))
        for ids, row in zip(asked, rows, strict=True):
            exact_row, half_row = plain_row(plain, ids), plain_row(plain_half, ids)
            own = difference(row[None], exact_row[None]).total_variation
            theirs = difference(half_row[None], exact_row[None]).total_variation
            assert own <= 2 * theirs + 0.02
            assert difference(row[None], half_row[None]).total_variation <= 0.05
            assert abs(float(row.double().exp().sum()) - 1) < 5e-5
