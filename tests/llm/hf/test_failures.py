"""A forward that raises, runs out of memory or gives NaN harms one request only; nothing is lost, nothing stays."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from genlm_backend.errors import EvaluationFailed, NonFiniteLogits, SlowPathWarning
from genlm_backend.llm import AsyncTransformer
from genlm_backend.llm.hf import kv_pool
from genlm_backend.llm.hf.self_test import difference
from tests.llm.hf.walks import TINY_NATS, check_books, plain_row, small

BAD = 13
TRUNK = [40, 41, 42, 43]


@pytest.fixture(params=["llama", pytest.param("bloom", marks=pytest.mark.thorough)])
def llm(request: pytest.FixtureRequest, wrap: Callable[..., AsyncTransformer]) -> AsyncTransformer:
    """Packed, and on transformers' own cache."""
    if request.param == "llama":
        return wrap(small("llama"))
    with pytest.warns(SlowPathWarning):
        return wrap(small("bloom"))


def fail_on_bad_token(llm: AsyncTransformer, error: BaseException, is_late: bool = False) -> dict[str, bool]:
    """Forwards that see the bad token raise, before the first layer or after the last one, while the switch is on."""
    engine: Any = llm._service.engine
    forward = engine.model.forward
    switch = {"on": True}

    def failing(*args: Any, **kwargs: Any) -> Any:
        is_bad = switch["on"] and bool((kwargs["input_ids"] == BAD).any())
        if is_bad and not is_late:
            raise error
        output = forward(*args, **kwargs)
        if is_bad:
            raise error
        return output

    engine.model.forward = failing
    return switch


def is_plain(llm: AsyncTransformer, ids: list[int], row: torch.Tensor) -> bool:
    return difference(row[None], plain_row(llm.model, ids)[None]).nats <= TINY_NATS


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize(
    "error", [RuntimeError("boom"), torch.OutOfMemoryError("no memory"), MemoryError(), KeyboardInterrupt()], ids=repr
)
async def test_a_forward_that_raises_harms_the_request_that_causes_it_only(
    llm: AsyncTransformer, error: BaseException, is_late: bool
) -> None:
    switch = fail_on_bad_token(llm, error, is_late)
    good = [TRUNK + [i] for i in range(50, 56)]
    bad = [TRUNK + [BAD], TRUNK[:2] + [BAD, 5]]
    asked = [*good[:3], bad[0], *good[3:], bad[1]]
    outcomes = await asyncio.gather(*(llm.next_token_logprobs(ids) for ids in asked), return_exceptions=True)
    for ids, outcome in zip(asked, outcomes, strict=True):
        if ids in bad:
            assert isinstance(outcome, EvaluationFailed) and outcome.__cause__ is error
            assert f"{len(ids)} tokens" in str(outcome)
        else:
            assert isinstance(outcome, torch.Tensor) and is_plain(llm, ids, outcome)
    check_books(llm._service.engine)
    switch["on"] = False
    for ids in asked:
        assert is_plain(llm, ids, await llm.next_token_logprobs(ids))
    check_books(llm._service.engine)


async def test_no_memory_for_a_larger_pool_loses_no_slot(
    monkeypatch: pytest.MonkeyPatch, wrap: Callable[..., AsyncTransformer]
) -> None:
    monkeypatch.setattr(kv_pool, "FIRST_CAPACITY", 8)
    llm = wrap(small("llama"))
    engine: Any = llm._service.engine
    assert await llm.next_token_logprobs(TRUNK) is not None
    original, n_calls = kv_pool._resized, [0]

    def grown(held: torch.Tensor, capacity: int) -> torch.Tensor:
        n_calls[0] += 1
        if n_calls[0] == 4:  # in the second layer
            raise torch.OutOfMemoryError("no memory")
        return original(held, capacity)

    monkeypatch.setattr(kv_pool, "_resized", grown)
    ids = TRUNK + list(range(50, 70))
    with pytest.raises(EvaluationFailed, match="no memory"):
        await llm.next_token_logprobs(ids)
    assert engine.kv.pool.n_used == 4
    check_books(engine)
    for context in (ids, TRUNK + [9], ids[:10]):
        assert is_plain(llm, context, await llm.next_token_logprobs(context))
    check_books(engine)


async def test_nan_in_one_context_reaches_no_other_row(llm: AsyncTransformer) -> None:
    """Attention reads the keys it masks, and NaN times zero is NaN: neither in the batch nor later in a reused slot."""
    engine: Any = llm._service.engine
    hook = engine.model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: output.masked_fill((inputs[0] == BAD)[..., None], torch.nan)
    )
    asked = [TRUNK + [i] for i in range(50, 53)] + [TRUNK + [BAD], [BAD, 5]] + [TRUNK + [i] for i in range(53, 56)]
    outcomes = await asyncio.gather(*(llm.next_token_logprobs(ids) for ids in asked), return_exceptions=True)
    for ids, outcome in zip(asked, outcomes, strict=True):
        if BAD in ids:
            assert isinstance(outcome, NonFiniteLogits) and f"{len(ids)} tokens" in str(outcome)
        else:
            assert isinstance(outcome, torch.Tensor) and is_plain(llm, ids, outcome)
    check_books(engine)
    hook.remove()
    # Nothing of it was kept: asked again, it is computed again.
    for ids in (TRUNK + [BAD], TRUNK + [BAD, 50], TRUNK + [60], [61]):
        assert is_plain(llm, ids, await llm.next_token_logprobs(ids))


async def test_clearing_while_a_batch_runs_changes_no_answer(llm: AsyncTransformer) -> None:
    engine: Any = llm._service.engine
    forward = engine.model.forward
    entered, go_on = threading.Event(), threading.Event()

    def waiting(*args: Any, **kwargs: Any) -> Any:
        entered.set()
        assert go_on.wait(30)
        return forward(*args, **kwargs)

    await llm.next_token_logprobs(TRUNK)
    engine.model.forward = waiting
    asked = [TRUNK + [i] for i in range(50, 54)]
    tasks = [asyncio.ensure_future(llm.next_token_logprobs(ids)) for ids in asked]
    await asyncio.to_thread(entered.wait)
    llm.clear_cache()
    llm.clear_kv_cache()
    assert llm.statistics().kv_tokens == 0
    go_on.set()
    for ids, row in zip(asked, await asyncio.gather(*tasks), strict=True):
        assert is_plain(llm, ids, row)
    check_books(engine)
    assert is_plain(llm, asked[0] + [3], await llm.next_token_logprobs(asked[0] + [3]))
    assert llm.statistics().kv_tokens == 6  # what was cleared is computed again


async def test_a_cancelled_request_is_computed_or_dropped_and_its_mates_get_their_rows(llm: AsyncTransformer) -> None:
    engine: Any = llm._service.engine
    forward = engine.model.forward
    entered, go_on = threading.Event(), threading.Event()

    def waiting(*args: Any, **kwargs: Any) -> Any:
        entered.set()
        assert go_on.wait(30)
        return forward(*args, **kwargs)

    engine.model.forward = waiting
    running = [asyncio.ensure_future(llm.next_token_logprobs(TRUNK + [i])) for i in range(50, 54)]
    await asyncio.to_thread(entered.wait)
    queued = [asyncio.ensure_future(llm.next_token_logprobs(TRUNK + [i])) for i in range(60, 64)]
    await asyncio.sleep(0)
    for task in (running[1], queued[2]):
        task.cancel()
    go_on.set()
    outcomes = await asyncio.gather(*running, *queued, return_exceptions=True)
    assert [isinstance(outcome, asyncio.CancelledError) for outcome in outcomes] == [0, 1, 0, 0, 0, 0, 1, 0]
    for number, outcome in zip([50, 51, 52, 53, 60, 61, 62, 63], outcomes, strict=True):
        if isinstance(outcome, torch.Tensor):
            assert is_plain(llm, TRUNK + [number], outcome)
    # The one that was running is known now; the one that was queued was never computed.
    assert llm.statistics().tokens_computed == 4 + 4 + 3
    check_books(engine)
    before = llm.statistics().row_hits
    await llm.next_token_logprobs(TRUNK + [51])
    assert llm.statistics().row_hits == before + 1


def test_what_a_closed_event_loop_left_behind_harms_no_later_one(llm: AsyncTransformer) -> None:
    """genlm-backend's timer of a closed loop made every later run hang, or fail for somebody else's request."""

    async def leave() -> None:
        for i in range(3):
            asyncio.ensure_future(llm.next_token_logprobs(TRUNK + [i]))  # noqa: RUF006
        await asyncio.sleep(0)

    for i in range(20):
        asyncio.run(leave())
        ids = TRUNK + [100 + i]
        assert is_plain(llm, ids, asyncio.run(llm.next_token_logprobs(ids)))
