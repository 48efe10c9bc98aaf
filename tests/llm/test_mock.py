"""The mock: the same noise for the same context, in every process and for ever."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from genlm_backend.errors import ModelNotFound
from genlm_backend.llm import MockAsyncLM, load_model_by_name
from genlm_backend.llm.mock import MockEngine
from genlm_backend.llm.service import Context
from genlm_backend.testing import check_idle


def logits(*ids: int, adapter: str | None = None, n: int = 8) -> torch.Tensor:
    return MockEngine(n).evaluate([Context(adapter, ids)])[0]


GOLDEN: dict[tuple[int, ...], list[float]] = {
    (0,): [-3.871421, 2.069815, 3.925862, 1.894261],
    (1, 2, 3): [2.188325, -0.268224, -3.092929, 1.864389],
    (49151, 7): [-5.213638, -1.154418, 0.134973, 1.304751],
}


@pytest.mark.parametrize("ids", GOLDEN)
def test_golden_values(ids: tuple[int, ...]) -> None:
    """Programs keep results that were made with the mock: its noise never changes."""
    assert logits(*ids)[:4].tolist() == pytest.approx(GOLDEN[ids], abs=1e-5)


def test_different_contexts_have_different_rows() -> None:
    """A seed made by adding ids up takes [2, 0] for [0, 1], and [3] for [1, 1]."""
    contexts = [ids for n in range(1, 5) for ids in itertools.product(range(5), repeat=n)]
    contexts += [(12,), (1, 2), (112,), (1, 12), (11, 2), (2**31,), (2**63,), (2**64 + 1,)]
    rows = {tuple(logits(*ids).tolist()) for ids in set(contexts)}
    assert len(rows) == len(set(contexts))


def test_adapters_have_rows_of_their_own() -> None:
    names = [None, "", "None", "a", "b", "a'"]
    assert len({tuple(logits(1, 2, adapter=name).tolist()) for name in names}) == len(names)


def test_a_row_does_not_depend_on_its_batch() -> None:
    contexts = [Context(None, (i, i)) for i in range(20)]
    together = MockEngine(50).evaluate(contexts)
    for row, context in zip(together, contexts, strict=True):
        assert torch.equal(row, MockEngine(50).evaluate([context])[0])


def test_the_noise_is_normal_with_deviation_3() -> None:
    values = logits(1, n=50_000)
    assert abs(values.mean().item()) < 0.1 and abs(values.std().item() - 3) < 0.1


def test_a_context_of_100_000_tokens() -> None:
    ids = [i % 500 for i in range(100_000)]
    assert logits(*ids).isfinite().all() and not torch.equal(logits(*ids), logits(*ids[:-1]))


async def test_rows_from_a_tokenizer(tiny_tokenizer_512: PreTrainedTokenizerFast) -> None:
    async with MockAsyncLM(tiny_tokenizer_512) as llm:
        ids = llm.tokenizer.encode("Montreal is")
        row = await llm.next_token_logprobs(ids)
        assert row.shape == (512,) == (len(llm.byte_vocab),) and abs(row.exp().sum().item() - 1) < 1e-5
        assert torch.allclose(row, logits(*ids, n=512).log_softmax(-1), atol=1e-6)
        statistics = llm.statistics()
        assert statistics.forwards == 1 and statistics.tokens_computed == len(ids)
        assert isinstance(b"".join(llm.byte_vocab[i] for i in await llm.sample(ids, 5, [], seed=0)), bytes)


def test_two_mocks_of_one_tokenizer_agree(tiny_tokenizer_512: PreTrainedTokenizerFast) -> None:
    first, second = MockAsyncLM(tiny_tokenizer_512), MockAsyncLM(tiny_tokenizer_512, batch_size=2)
    prompts = [[i] for i in range(5)]
    assert torch.equal(first.batch_next_token_logprobs_sync(prompts), second.batch_next_token_logprobs_sync(prompts))
    assert first.statistics().batches == 1 and second.statistics().batches == 3
    for llm in (first, second):
        check_idle(llm)
        llm.close()


async def test_a_latency_is_taken_once_per_batch(tiny_tokenizer_512: PreTrainedTokenizerFast) -> None:
    async with MockAsyncLM(tiny_tokenizer_512, latency_s=0.05) as llm:
        started_s = time.monotonic()
        await asyncio.gather(*(llm.next_token_logprobs([i]) for i in range(50)))
        assert 0.05 <= time.monotonic() - started_s and llm.statistics().batches == 1


async def test_the_loop_goes_on_while_the_mock_computes(
    tiny_tokenizer_512: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, passed = threading.Event(), threading.Event()

    def sleep(seconds: float) -> None:
        entered.set()
        assert passed.wait(20), "the loop waits too"

    monkeypatch.setattr("genlm_backend.llm.mock.time", SimpleNamespace(sleep=sleep))
    async with MockAsyncLM(tiny_tokenizer_512, latency_s=0.05) as llm:
        asked = asyncio.create_task(llm.next_token_logprobs([1]))
        while not entered.is_set():
            await asyncio.sleep(0)
        for _ in range(50):
            await asyncio.sleep(0)
        assert not asked.done()
        passed.set()
        await asked


async def test_by_name(tiny_model_folder: Path) -> None:
    loaded = load_model_by_name(str(tiny_model_folder), backend="mock", llm_opts={"latency_s": 0.0})
    async with loaded as llm, MockAsyncLM.from_name(str(tiny_model_folder)) as other:
        assert isinstance(llm, MockAsyncLM)
        assert torch.equal(await llm.next_token_logprobs([1]), await other.next_token_logprobs([1]))


def test_a_name_that_leads_to_nothing() -> None:
    with pytest.raises(ModelNotFound):
        load_model_by_name("./no-such-model", backend="mock")
