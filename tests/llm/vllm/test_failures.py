"""Cancellation, forwards that raise and an engine that dies, on the real vLLM: each waiter gets a row or an error."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from genlm_backend.errors import EvaluationFailed, ModelClosed, NonFiniteLogits
from genlm_backend.llm import AsyncVirtualLM
from tests.llm.conftest import TINY_OPTIONS

pytestmark = [pytest.mark.model]
BAD = 13
TRUNK = [40, 41, 42, 43]
NATS = 1e-4


@pytest.fixture(autouse=True)
def quiet_vllm(caplog: pytest.LogCaptureFixture) -> None:
    """vLLM logs its whole configuration when a forward raises."""
    caplog.set_level("CRITICAL", logger="vllm")


@pytest.fixture
def poisoned(tiny: AsyncVirtualLM, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Forwards that see the bad token raise, before the first layer or after the last, while there is an error."""
    fault: dict[str, Any] = {"error": None, "is_late": False, "n": 0}
    model = tiny._engine.core.runner.model
    forward = model.forward

    def failing(input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        is_bad = fault["error"] is not None and bool((input_ids == BAD).any())
        output = None if is_bad and not fault["is_late"] else forward(input_ids, *args, **kwargs)
        if is_bad:
            fault["n"] += 1
            raise fault["error"]
        return output

    monkeypatch.setattr(model, "forward", failing)
    yield fault


async def is_right(llm: AsyncVirtualLM, ids: list[int], row: torch.Tensor) -> bool:
    return bool((row - await llm.next_token_logprobs_uncached(ids)).abs().max() <= NATS)


async def test_a_thousand_cancellations_at_random_points(tiny: AsyncVirtualLM) -> None:
    """Before, while and after their batch is computed; everybody else gets the right row, and nothing is left."""
    rng = random.Random(0)
    tiny.clear_cache()
    n_cancelled = n_answered = 0
    checked: list[tuple[list[int], torch.Tensor]] = []
    while n_cancelled < 1000:
        contexts = [[*TRUNK, rng.randrange(60, 500), *(rng.randrange(512) for _ in range(rng.randrange(2)))]
                    for _ in range(40)]  # fmt: skip
        tasks = [asyncio.ensure_future(tiny.next_token_logprobs(ids)) for ids in contexts]
        for task in rng.sample(tasks, 30):
            for _ in range(rng.choice((0, 0, 1, 5, 20))):
                await asyncio.sleep(0)
            if rng.random() < 0.05:
                await asyncio.sleep(0.01)
            task.cancel()
        for ids, outcome in zip(contexts, await asyncio.gather(*tasks, return_exceptions=True), strict=True):
            if isinstance(outcome, asyncio.CancelledError):
                n_cancelled += 1
            else:
                assert isinstance(outcome, torch.Tensor)
                n_answered += 1
                checked.append((ids, outcome))
    assert n_answered > 200
    sample = rng.sample(checked, 40)
    wanted = tiny._engine.uncached([tiny._context(ids, None) for ids in dict.fromkeys(tuple(ids) for ids, _ in sample)])
    by_ids = dict(zip(dict.fromkeys(tuple(ids) for ids, _ in sample), wanted.log_softmax(-1), strict=True))
    for ids, row in sample:
        assert (row - by_ids[tuple(ids)]).abs().max() <= NATS
    assert len(tiny._service.batcher._pending) == 0
    assert await is_right(tiny, [*TRUNK, 7], await tiny.next_token_logprobs([*TRUNK, 7]))
    assert tiny.tally.restarted == 0


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize("error", [RuntimeError("boom"), MemoryError("no memory")], ids=repr)
async def test_a_forward_that_raises_harms_the_request_that_causes_it_only(
    tiny: AsyncVirtualLM, poisoned: dict[str, Any], error: BaseException, is_late: bool
) -> None:
    tiny.clear_cache()
    poisoned |= {"error": error, "is_late": is_late}
    good = [[*TRUNK, i] for i in range(50, 56)]
    bad = [[*TRUNK, BAD], [*TRUNK[:2], BAD, 5]]
    asked = [*good[:3], bad[0], *good[3:], bad[1]]
    outcomes = await asyncio.gather(*(tiny.next_token_logprobs(ids) for ids in asked), return_exceptions=True)
    for ids, outcome in zip(asked, outcomes, strict=True):
        if ids in bad:
            assert isinstance(outcome, EvaluationFailed) and outcome.__cause__ is error
            assert f"{len(ids)} tokens" in str(outcome)
        else:
            assert isinstance(outcome, torch.Tensor) and await is_right(tiny, ids, outcome)
    assert poisoned["n"] > 0
    poisoned["error"] = None
    for ids in asked:
        assert await is_right(tiny, ids, await tiny.next_token_logprobs(ids))
    assert tiny.tally.restarted == 0


@pytest.mark.parametrize("is_late", [False, True])
async def test_an_oracle_that_raises_leaves_no_blocks_that_were_not_computed(
    tiny: AsyncVirtualLM, poisoned: dict[str, Any], is_late: bool
) -> None:
    """Of two blocks and more, so that the prefix cache knows them by name."""
    tiny.clear_cache()
    await tiny.next_token_logprobs(TRUNK)  # before which it was cleared
    ids = [*(200 + (7 * i + is_late) % 50 for i in range(70)), BAD]
    poisoned |= {"error": RuntimeError("boom"), "is_late": is_late}
    with pytest.raises(RuntimeError, match="boom"):
        await tiny.next_token_logprobs_uncached(ids)
    poisoned["error"] = None
    assert await is_right(tiny, ids, await tiny.next_token_logprobs(ids))
    assert tiny.tally.restarted == 0


async def test_keys_and_values_that_are_nan_are_not_kept(tiny: AsyncVirtualLM) -> None:
    """An embedding is NaN for a while: who asks again, or goes on, gets what is computed anew."""
    tiny.clear_cache()
    held = [*(300 + i % 50 for i in range(40)), BAD, *TRUNK]
    weight = tiny._engine.core.runner.model.model.embed_tokens.weight.data
    kept = weight[BAD].clone()
    with torch.inference_mode():
        weight[BAD] = torch.nan
    try:
        with pytest.raises(NonFiniteLogits):
            await tiny.next_token_logprobs(held)
    finally:
        with torch.inference_mode():
            weight[BAD] = kept
    for ids in (held, [*held, 5]):
        assert await is_right(tiny, ids, await tiny.next_token_logprobs(ids))


async def test_an_engine_that_died_is_made_anew(tiny: AsyncVirtualLM) -> None:
    """Whoever waited gets an error with the cause, or a row of the new engine; the next one is served."""
    tiny.clear_cache()
    before = tiny.statistics()
    await tiny.next_token_logprobs(TRUNK)
    first = tiny._engine.core

    def dead(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("EngineCore encountered an issue")

    first.engine.step_fn = dead
    asked = [[*TRUNK, i] for i in range(4)]
    outcomes = await asyncio.gather(*(tiny.next_token_logprobs(ids) for ids in asked), return_exceptions=True)
    assert tiny.tally.restarted == 1 and tiny._engine.core is not first
    for ids, outcome in zip(asked, outcomes, strict=True):
        if isinstance(outcome, BaseException):
            assert isinstance(outcome, EvaluationFailed) and "EngineCore encountered" in str(outcome)
        else:
            assert await is_right(tiny, ids, outcome)
    assert await is_right(tiny, [*TRUNK, 9], await tiny.next_token_logprobs([*TRUNK, 9]))
    assert tiny._engine.transport.name == "live"
    assert tiny.statistics().tokens_computed > before.tokens_computed


async def test_a_loop_that_ended_leaves_the_engine_to_the_next(tiny: AsyncVirtualLM) -> None:
    async def ask_and_leave(turn: int) -> None:
        asked = asyncio.gather(*(tiny.next_token_logprobs([*TRUNK, i, turn]) for i in range(30)))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asked, 1e-4)

    for turn in range(20):  # each with contexts of its own: rows that are remembered would come in time
        await asyncio.to_thread(asyncio.run, ask_and_leave(turn))
    assert await is_right(tiny, [*TRUNK, 3], await tiny.next_token_logprobs([*TRUNK, 3]))


async def test_closing_ends_what_is_queued_with_an_error(needs_vllm: None, tiny_folder: Any) -> None:
    llm = AsyncVirtualLM.from_name(str(tiny_folder), TINY_OPTIONS)
    tasks = [asyncio.ensure_future(llm.next_token_logprobs([*TRUNK, i])) for i in range(40)]
    await asyncio.sleep(0)
    await llm.aclose()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(outcome, torch.Tensor | ModelClosed) for outcome in outcomes)
    with pytest.raises(ModelClosed):
        await llm.next_token_logprobs(TRUNK)
