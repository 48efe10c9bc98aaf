"""What every language model here promises, on every engine: noise, transformers and vLLM; the last two with one model.

Rows are compared with a plain forward of transformers (the mock's with its noise). What only one engine promises is
tested beside it.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from genlm_backend import sampling
from genlm_backend.errors import (
    ContextTooLong,
    EmptyPrompt,
    GenlmError,
    InvalidQuery,
    NoTokenAllowed,
    QueriesReset,
    TokenIdError,
    UnknownAdapter,
)
from genlm_backend.llm import (
    AsyncLM,
    AsyncTransformer,
    Draw,
    LogNormalizer,
    Logprobs,
    MaskMass,
    MockAsyncLM,
    Row,
    Statistics,
    TopK,
)
from genlm_backend.llm.mock import MockEngine
from genlm_backend.llm.service import Context
from genlm_backend.sampling import draw_key
from genlm_backend.testing import check_idle

NATS = 2e-4  # between engines and between batches, float32, over all tokens of the small vocabulary
N_VOCAB = 512
PROMPT = [40, 41, 42, 43]
CONTEXTS = [[7], PROMPT, [*PROMPT, 44], [*PROMPT, 45], [*PROMPT, 45, 46, 47], PROMPT[:2], [300 + i for i in range(60)]]


class Subject(NamedTuple):
    """One engine, what its logits must be, and whether it keeps keys and values."""

    llm: AsyncLM
    logits: Callable[[Sequence[int]], torch.Tensor]
    keeps_kv: bool

    def row(self, ids: Sequence[int]) -> torch.Tensor:
        return self.logits(ids).log_softmax(-1)


@pytest.fixture(scope="module")
def hf(tiny_folder: Path) -> Iterator[AsyncTransformer]:
    llm = AsyncTransformer.from_name(str(tiny_folder), hf_opts={"dtype": "float32"}, device="cpu")
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def mock(tiny_tokenizer_512: PreTrainedTokenizerFast) -> Iterator[MockAsyncLM]:
    llm = MockAsyncLM(tiny_tokenizer_512)
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def plain_logits(tiny_folder: Path) -> Callable[[Sequence[int]], torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()

    def logits(ids: Sequence[int]) -> torch.Tensor:
        with torch.inference_mode():
            last: torch.Tensor = model(torch.tensor([list(ids)]), use_cache=False).logits[0, -1]
        return last

    return logits


def noise(ids: Sequence[int]) -> torch.Tensor:
    return MockEngine(N_VOCAB).evaluate([Context(None, tuple(ids))])[0]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(params=["mock", "hf", pytest.param("vllm", marks=pytest.mark.model)])
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    """Each engine with nothing remembered; after each test nothing may be left in it."""
    llm = request.getfixturevalue({"vllm": "tiny"}.get(request.param, request.param))
    is_mock = request.param == "mock"
    llm.clear_cache()
    yield Subject(llm, noise if is_mock else request.getfixturevalue("plain_logits"), not is_mock)
    check_idle(llm)


def assert_rows(found: torch.Tensor, subject: Subject, contexts: Sequence[Sequence[int]]) -> None:
    wanted = torch.stack([subject.row(ids) for ids in contexts])
    torch.testing.assert_close(found, wanted, rtol=0, atol=NATS)


# ---- rows


async def test_rows_are_those_of_the_model_normalised_and_as_wide_as_the_vocabulary(subject: Subject) -> None:
    llm = subject.llm
    assert len(llm.byte_vocab) == len(llm.str_vocab) == N_VOCAB
    for ids in CONTEXTS:
        row = await llm.next_token_logprobs(ids)
        assert row.shape == (len(llm.byte_vocab),) and row.dtype == torch.float32
        assert abs(float(row.double().exp().sum()) - 1) < 5e-5
        assert_rows(row[None], subject, [ids])


async def test_a_wrong_row_would_be_noticed(subject: Subject) -> None:
    """Rows of contexts that differ in one token are far more than the tolerance apart."""
    rows = await subject.llm.batch_next_token_logprobs([[*PROMPT, 44], [*PROMPT, 45], [41, *PROMPT[1:], 45]])
    assert min(float((rows[1] - rows[i]).abs().max()) for i in (0, 2)) > 100 * NATS


async def test_a_batch_gives_the_rows_of_single_requests(subject: Subject) -> None:
    llm = subject.llm
    together = await llm.batch_next_token_logprobs(CONTEXTS)
    assert_rows(together, subject, CONTEXTS)
    llm.clear_cache()
    alone = torch.stack([await llm.next_token_logprobs(ids) for ids in CONTEXTS])
    torch.testing.assert_close(together, alone, rtol=0, atol=NATS)
    assert (await llm.batch_next_token_logprobs([])).shape == (0, N_VOCAB)


async def test_sync_methods_give_the_same_inside_a_running_loop(subject: Subject) -> None:
    llm = subject.llm
    rows = llm.batch_next_token_logprobs_sync(CONTEXTS)
    assert torch.equal(rows[1], llm.next_token_logprobs_sync(PROMPT))
    assert torch.equal(rows, await llm.batch_next_token_logprobs(CONTEXTS))
    llm.clear_cache()
    assert_rows(llm.next_token_logprobs_sync(PROMPT)[None], subject, [PROMPT])


async def test_a_row_is_the_callers_own_and_so_are_the_ids(subject: Subject) -> None:
    ids = list(PROMPT)
    asked = subject.llm.next_token_logprobs(ids)
    ids[0] = 99  # the request is fixed
    row = await asked
    row.zero_()
    assert_rows((await subject.llm.next_token_logprobs(np.array(PROMPT)))[None], subject, [PROMPT])


# ---- queries


@pytest.mark.parametrize("is_remembered", [False, True])
async def test_queries_agree_with_the_row(subject: Subject, is_remembered: bool) -> None:
    llm = subject.llm
    row = await llm.next_token_logprobs(PROMPT)
    mask = torch.zeros(N_VOCAB, dtype=torch.bool)
    mask[row.topk(5).indices] = mask[100:110] = True
    keys = [draw_key(1, (i,)) for i in range(6)]
    if not is_remembered:
        llm.clear_cache()
    draws, masked, top, chosen, mass, none, normalizer, whole = await asyncio.gather(
        asyncio.gather(*(llm.query(PROMPT, Draw(key)) for key in keys)),
        asyncio.gather(*(llm.query(PROMPT, Draw(key, 0.5, mask)) for key in keys)),
        llm.query(PROMPT, TopK(4)),
        llm.query(PROMPT, Logprobs([3, 3, 500])),
        llm.query(PROMPT, MaskMass(mask)),
        llm.query(PROMPT, MaskMass(~(mask | ~mask))),
        llm.query(PROMPT, LogNormalizer()),
        llm.query(PROMPT, Row()),
    )
    rows = row.expand(len(keys), -1)
    assert [drawn.token_id for drawn in draws] == sampling.draw(rows, keys).tolist()
    assert len({drawn.token_id for drawn in draws}) > 1
    half = [0.5] * len(keys)
    assert [drawn.token_id for drawn in masked] == sampling.draw(rows, keys, half, [mask] * len(keys)).tolist()
    q = (row.double() / 0.5).masked_fill(~mask, -math.inf).log_softmax(-1)
    for drawn in draws:
        assert drawn.logprob == drawn.log_q == pytest.approx(float(row[drawn.token_id]), abs=NATS)
    for drawn in masked:
        assert mask[drawn.token_id] and drawn.logprob == pytest.approx(float(row[drawn.token_id]), abs=NATS)
        assert drawn.log_q == pytest.approx(float(q[drawn.token_id]), abs=2 * NATS)
    assert top.token_ids.tolist() == row.topk(4).indices.tolist()
    torch.testing.assert_close(top.logprobs, row.topk(4).values, rtol=0, atol=NATS)
    torch.testing.assert_close(chosen, row[[3, 3, 500]], rtol=0, atol=NATS)
    assert mass == pytest.approx(float(row.double()[mask].logsumexp(0)), abs=NATS) and none == -math.inf
    torch.testing.assert_close(whole + normalizer, subject.logits(PROMPT), rtol=0, atol=NATS)


# ---- samples


async def test_samples(subject: Subject) -> None:
    """Equal seeds give equal samples, equal prompts of a batch different ones; a stream is a sample; 0 is greedy."""
    llm = subject.llm
    one = await llm.sample(PROMPT, 6, [], seed=3)
    assert len(one) == 6
    llm.clear_cache()
    again, other, streamed = await asyncio.gather(
        llm.sample(PROMPT, 6, [], seed=3), llm.sample(PROMPT, 6, [], seed=4), listed(llm, PROMPT, 6, seed=3)
    )
    assert again == one == streamed and other != one
    end = one[3]
    assert await llm.sample(PROMPT, 6, [end], seed=3) == one[: one.index(end)]
    many = await llm.batch_sample([PROMPT] * 5, 6, [], seed=3)
    assert len(set(map(tuple, many))) == 5 and many == await llm.batch_sample([PROMPT] * 5, 6, [], seed=3)
    greedy = list(PROMPT)
    for _ in range(5):
        greedy.append(int(subject.row(greedy).argmax()))
    assert await llm.sample(PROMPT, 5, [], temperature=0) == greedy[len(PROMPT) :]


async def listed(llm: AsyncLM, ids: list[int], n: int, seed: int) -> list[int]:
    return [token_id async for token_id in llm.stream(ids, n, seed=seed)]


async def test_the_logprob_of_a_sequence_is_the_sum_over_its_rows(subject: Subject) -> None:
    continuation = [44, 9, 300, 1]
    ids = PROMPT + continuation
    found = await subject.llm.sequence_logprob(PROMPT, continuation)
    rows = await subject.llm.batch_next_token_logprobs([ids[:n] for n in range(len(PROMPT), len(ids))])
    assert found == pytest.approx(float(rows[range(4), continuation].double().sum()), abs=NATS)
    wanted = sum(float(subject.row(ids[:n])[ids[n]]) for n in range(len(PROMPT), len(ids)))
    assert found == pytest.approx(wanted, abs=4 * NATS)
    assert await subject.llm.sequence_logprob(PROMPT, []) == 0


# ---- work


async def test_equal_requests_at_one_time_are_one(subject: Subject) -> None:
    llm = subject.llm
    before = llm.statistics()
    rows = await asyncio.gather(*(llm.next_token_logprobs(PROMPT) for _ in range(20)))
    after = llm.statistics()
    assert all(torch.equal(row, rows[0]) for row in rows)
    assert after.requests - before.requests == 20
    assert after.batches - before.batches == after.forwards - before.forwards == 1
    assert after.tokens_computed - before.tokens_computed == len(PROMPT)
    await llm.query(PROMPT, TopK(3))
    assert llm.statistics().row_hits - after.row_hits == 1 and llm.statistics().batches == after.batches


async def test_statistics_have_the_documented_fields(subject: Subject) -> None:
    names = "requests batches forwards tokens_computed row_hits kv_tokens kv_bytes evictions".split()
    before = subject.llm.statistics()
    assert isinstance(before, Statistics) and list(before._fields) == names
    await subject.llm.batch_next_token_logprobs(CONTEXTS)
    after = subject.llm.statistics()
    assert all(type(count) is int and count >= 0 for count in after)
    assert all(b >= a for name, a, b in zip(names, before, after, strict=True) if not name.startswith("kv_"))
    assert (after.kv_tokens > 0) == (after.kv_bytes > 0) == subject.keeps_kv


async def test_caches_change_the_work_and_no_answer(subject: Subject) -> None:
    llm = subject.llm
    llm.cache_kv(PROMPT)
    before = llm.statistics()
    assert_rows((await llm.next_token_logprobs([*PROMPT, 44]))[None], subject, [[*PROMPT, 44]])
    n_computed = llm.statistics().tokens_computed - before.tokens_computed
    assert n_computed == (1 if subject.keeps_kv else len(PROMPT) + 1)
    llm.clear_kv_cache()
    assert llm.statistics().kv_tokens == 0
    before = llm.statistics()
    assert_rows(await llm.batch_next_token_logprobs([PROMPT, [*PROMPT, 44]]), subject, [PROMPT, [*PROMPT, 44]])
    assert llm.statistics().row_hits - before.row_hits == 2 and llm.statistics().batches == before.batches
    llm.clear_cache()
    assert_rows(await llm.batch_next_token_logprobs(CONTEXTS), subject, CONTEXTS)
    after = llm.statistics()
    assert after.row_hits == before.row_hits + 2 and after.batches > before.batches


async def test_a_reset_drops_what_waits_and_nothing_else(subject: Subject) -> None:
    llm = subject.llm
    asked = [asyncio.ensure_future(llm.next_token_logprobs(ids)) for ids in CONTEXTS]
    await asyncio.sleep(0)
    llm.reset_async_queries()
    outcomes = await asyncio.gather(*asked, return_exceptions=True)
    assert any(isinstance(outcome, QueriesReset) for outcome in outcomes)
    for ids, outcome in zip(CONTEXTS, outcomes, strict=True):
        if isinstance(outcome, torch.Tensor):
            assert_rows(outcome[None], subject, [ids])
        else:
            assert isinstance(outcome, QueriesReset)
    assert_rows(await llm.batch_next_token_logprobs(CONTEXTS), subject, CONTEXTS)


# ---- what goes wrong


async def test_bad_input_raises_its_error_and_harms_nobody(subject: Subject) -> None:
    llm = subject.llm
    nothing = torch.zeros(N_VOCAB, dtype=torch.bool)
    bad: list[tuple[type[GenlmError], Any]] = [
        (EmptyPrompt, llm.next_token_logprobs([])),
        (EmptyPrompt, llm.sample([], 3, [])),
        (TokenIdError, llm.next_token_logprobs([1, N_VOCAB])),
        (TokenIdError, llm.next_token_logprobs([-1])),
        (TokenIdError, llm.next_token_logprobs([True])),
        (TokenIdError, llm.next_token_logprobs("text")),  # type: ignore[arg-type]
        (TokenIdError, llm.batch_next_token_logprobs([[1], [1.5]])),  # type: ignore[list-item]
        (TokenIdError, llm.sequence_logprob([1], [N_VOCAB])),
        (UnknownAdapter, llm.next_token_logprobs([1], "no such adapter")),
        (InvalidQuery, llm.query(PROMPT, TopK(0))),
        (InvalidQuery, llm.query(PROMPT, MaskMass(nothing[1:]))),
        (NoTokenAllowed, llm.query(PROMPT, Draw(1, mask=nothing))),
    ]
    if llm.max_length is not None:
        bad.append((ContextTooLong, llm.next_token_logprobs([5] * llm.max_length)))
    good = [asyncio.ensure_future(llm.next_token_logprobs(ids)) for ids in CONTEXTS]
    outcomes = await asyncio.gather(*(coroutine for _, coroutine in bad), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [kind for kind, _ in bad]
    assert_rows(torch.stack(await asyncio.gather(*good)), subject, CONTEXTS)


async def test_cancelled_requests_leave_nothing(subject: Subject) -> None:
    """Before, while and after they are computed; neighbours get their rows. The fixture looks for what is left."""
    llm = subject.llm
    rng = random.Random(0)
    n_cancelled = 0
    for n_passes in (0, 1, 2, 3, 5) * 2:
        contexts = [[*PROMPT, rng.randrange(60, 500)] for _ in range(12)]
        tasks = [asyncio.create_task(llm.next_token_logprobs(ids)) for ids in contexts]
        for _ in range(n_passes):
            await asyncio.sleep(0)
        for task in tasks[::2]:
            n_cancelled += task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(outcome, torch.Tensor | asyncio.CancelledError) for outcome in outcomes[::2])
        rows = [row for row in outcomes[1::2] if isinstance(row, torch.Tensor)]
        assert_rows(torch.stack(rows), subject, contexts[1::2])
    assert n_cancelled >= 12, "those of the two rounds in which none had begun"
