"""What may be asked about: every kind of bad input is named before it joins a batch, and harms nobody in it."""

from __future__ import annotations

import array
import asyncio
import collections
import decimal
import fractions
import pickle
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from genlm_backend.errors import (
    ContextTooLong,
    EmptyPrompt,
    InvalidQuery,
    InvalidRequest,
    TokenIdError,
    UnknownAdapter,
    UnknownBackend,
)
from genlm_backend.llm import AsyncLM, Draw, Logprobs, MaskMass, Row, TopK, load_model_by_name
from genlm_backend.llm.contexts import checked_ids
from genlm_backend.testing import FakeEngine, check_idle, fake_language_model

N_IDS = 16
LIMIT = 8


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(N_IDS)


@pytest.fixture
def llm(engine: FakeEngine) -> Iterator[AsyncLM]:
    llm = fake_language_model(engine, N_IDS, max_length=LIMIT)
    yield llm
    check_idle(llm)
    llm.close()


class Opaque:
    def __repr__(self) -> str:
        return "x" * 10_000


EMPTY: dict[str, Callable[[], Any]] = {
    "list": list,
    "tuple": tuple,
    "range": lambda: range(0),
    "array": lambda: np.array([], np.int64),
    "tensor": lambda: torch.tensor([], dtype=torch.int64),
    "deque": lambda: collections.deque(),
}
BAD: dict[str, Callable[[], Any]] = {
    "negative": lambda: [-1],
    "negative, last": lambda: [0, 1, -1],
    "too large by one": lambda: [N_IDS],
    "too large, first": lambda: [N_IDS, 1, 2],
    "too large, middle": lambda: [3, N_IDS, 2],
    "2**31": lambda: [2**31],
    "2**63": lambda: [1, 2**63],
    "-2**63": lambda: [-(2**63)],
    "5,000 digits": lambda: [10**5000],
    "true": lambda: [True],
    "false among integers": lambda: [1, False],
    "numpy bool": lambda: [np.True_],
    "float": lambda: [1.0],
    "fraction of one": lambda: [1, 1.5],
    "nan": lambda: [float("nan")],
    "infinity": lambda: [float("inf")],
    "numpy float": lambda: [np.float32(1)],
    "complex": lambda: [1 + 0j],
    "Decimal": lambda: [decimal.Decimal(1)],
    "Fraction": lambda: [fractions.Fraction(1)],
    "letter": lambda: ["a"],
    "digit": lambda: ["1"],
    "bytes in a list": lambda: [b"\x01"],
    "None in a list": lambda: [None],
    "None among integers": lambda: [1, None, 2],
    "nested": lambda: [[1]],
    "nested, two": lambda: [[1, 2], [3]],
    "nested tuple": lambda: [1, (2,)],
    "dictionary in a list": lambda: [{1: 2}],
    "object in a list": lambda: [Opaque()],
    "function in a list": lambda: [lambda: 1],
    "tensor of one, 1-d": lambda: [torch.tensor([1])],
    "array of one, 1-d": lambda: [np.array([1])],
    "float tensor, 0-d": lambda: [torch.tensor(1.5)],
    "bool tensor, 0-d": lambda: [torch.tensor(True)],
    "bool array, 0-d": lambda: [np.array(True)],
    "text": lambda: "Montreal is",
    "empty text": lambda: "",
    "bytes": lambda: b"\x01\x02",
    "bytearray": lambda: bytearray(b"\x01"),
    "None": lambda: None,
    "integer": lambda: 5,
    "zero": lambda: 0,
    "bool": lambda: True,
    "number": lambda: 1.5,
    "object": lambda: Opaque(),
    "generator": lambda: (i for i in [1, 2]),
    "iterator": lambda: iter([1, 2]),
    "set": lambda: {1, 2},
    "dictionary": lambda: {1: 2},
    "keys": lambda: {1: 2}.keys(),
    "float array": lambda: np.array([1.0, 2.0]),
    "empty float array": lambda: np.array([]),
    "bool array": lambda: np.array([True]),
    "object array": lambda: np.array([1, 2], object),
    "text array": lambda: np.array(["1"]),
    "date array": lambda: np.array(["2026-01-01"], "datetime64[D]"),
    "2-d array": lambda: np.array([[1, 2]]),
    "0-d array": lambda: np.array(1),
    "negative array": lambda: np.array([1, -1]),
    "too large array": lambda: np.array([2**64 - 1], np.uint64),
    "masked array": lambda: np.ma.masked_array([1, 2], [False, True]),
    "float tensor": lambda: torch.tensor([1.0]),
    "half tensor": lambda: torch.tensor([1.0], dtype=torch.bfloat16),
    "bool tensor": lambda: torch.tensor([True]),
    "complex tensor": lambda: torch.tensor([1j]),
    "2-d tensor": lambda: torch.tensor([[1, 2]]),
    "0-d tensor": lambda: torch.tensor(1),
    "negative tensor": lambda: torch.tensor([-1]),
    "too large tensor": lambda: torch.tensor([N_IDS]),
}


async def _stream(llm: AsyncLM, ids: Any) -> list[int]:
    return [token async for token in llm.stream(ids, 2)]


async def _blocking(function: Callable[[Any], Any], argument: Any) -> Any:
    return function(argument)


ENTRIES: dict[str, Callable[[AsyncLM, Any], Awaitable[Any]]] = {
    "next_token_logprobs": lambda llm, ids: llm.next_token_logprobs(ids),
    "batch_next_token_logprobs": lambda llm, ids: llm.batch_next_token_logprobs([[1], ids, [2]]),
    "query": lambda llm, ids: llm.query(ids, TopK(2)),
    "sample": lambda llm, ids: llm.sample(ids, 2, []),
    "batch_sample": lambda llm, ids: llm.batch_sample([[1], ids], 2, []),
    "stream": _stream,
    "sequence_logprob, prompt": lambda llm, ids: llm.sequence_logprob(ids, [1]),
    "sequence_logprob, continuation": lambda llm, ids: llm.sequence_logprob([1], ids),
    "cache_kv": lambda llm, ids: _blocking(llm.cache_kv, ids),
    "next_token_logprobs_sync": lambda llm, ids: _blocking(llm.next_token_logprobs_sync, ids),
    "batch_next_token_logprobs_sync": lambda llm, ids: _blocking(llm.batch_next_token_logprobs_sync, [[1], ids]),
}


async def refused(llm: AsyncLM, engine: FakeEngine, *asked: Awaitable[Any]) -> list[BaseException]:
    """The errors of questions that wait beside five good ones, which are answered in one batch without them."""
    mates = range(10, 15)
    good = [llm.next_token_logprobs([i]) for i in mates]
    answers = await asyncio.gather(*good, *asked, return_exceptions=True)
    for i, row in zip(mates, answers, strict=False):
        assert torch.allclose(row, engine.row([i]), atol=1e-6)
    assert engine.batches == [[(i,) for i in mates]]
    engine.batches.clear()
    llm.clear_cache()
    for error in answers[5:]:
        assert isinstance(error, InvalidRequest) and isinstance(error, ValueError), repr(error)
        assert 20 < len(str(error)) < 250
        assert str(pickle.loads(pickle.dumps(error))) == str(error)
    return answers[5:]


def test_the_table_is_long_enough() -> None:
    assert len(BAD) >= 60


@pytest.mark.parametrize("name", BAD)
async def test_bad_ids_are_named_by_every_entry_and_harm_no_batch_mate(
    llm: AsyncLM, engine: FakeEngine, name: str
) -> None:
    errors = await refused(llm, engine, *(call(llm, BAD[name]()) for call in ENTRIES.values()))
    for entry, error in zip(ENTRIES, errors, strict=True):
        assert isinstance(error, TokenIdError), (entry, error)
        assert str(N_IDS - 1) in str(error)


@pytest.mark.parametrize("name", EMPTY)
async def test_no_token_is_refused_by_every_entry(llm: AsyncLM, engine: FakeEngine, name: str) -> None:
    entries = {entry: call for entry, call in ENTRIES.items() if "continuation" not in entry}
    errors = await refused(llm, engine, *(call(llm, EMPTY[name]()) for call in entries.values()))
    for entry, error in zip(entries, errors, strict=True):
        assert isinstance(error, EmptyPrompt), (entry, error)
    assert await llm.sequence_logprob([1], EMPTY[name]()) == 0.0


@pytest.mark.parametrize(
    "bad",
    [None, 5, 1.5, True, "ab", b"ab", Opaque(), [1, 2], {1: 2}, torch.arange(2), torch.tensor(5), np.array(5)],
    ids=repr,
)
async def test_a_bad_list_of_prompts_is_named(llm: AsyncLM, engine: FakeEngine, bad: Any) -> None:
    errors = await refused(
        llm,
        engine,
        llm.batch_next_token_logprobs(bad),
        llm.batch_sample(bad, 2, []),
        _blocking(llm.batch_next_token_logprobs_sync, bad),
    )
    assert {type(error) for error in errors} == {TokenIdError}


@pytest.mark.parametrize(
    "bad", [5, None, "ab", [1, 2.5], [[1]], torch.tensor(1), torch.tensor([1.0]), np.array([1.0])], ids=repr
)
async def test_end_tokens_that_are_no_integers_are_named(llm: AsyncLM, engine: FakeEngine, bad: Any) -> None:
    errors = await refused(llm, engine, llm.sample([1], 2, bad), llm.batch_sample([[1]], 2, bad))
    assert {type(error) for error in errors} == {TokenIdError}
    assert all(str(error).startswith("eos_token_ids is ") for error in errors)


def test_an_error_says_where_and_what() -> None:
    with pytest.raises(TokenIdError, match=r"token_ids\[2\] is -7 \(int\); expected integers from 0 to 15"):
        checked_ids([1, 2, -7, 99], N_IDS, None)
    with pytest.raises(TokenIdError, match=r"token_ids\[1\] is True \(bool\)"):
        checked_ids([1, True], N_IDS, None)
    with pytest.raises(TokenIdError, match=r"token_ids is 'abc' \(str\)"):
        checked_ids("abc", N_IDS, None)
    with pytest.raises(TokenIdError, match=r"token_ids is an array of float64 and shape \(2,\)"):
        checked_ids(np.array([1.0, 2.0]), N_IDS, None)


# ---- what is accepted

GOOD: dict[str, Callable[[], Any]] = {
    "list": lambda: [1, 0, 15],
    "tuple": lambda: (1, 0, 15),
    "deque": lambda: collections.deque([1, 0, 15]),
    "UserList": lambda: collections.UserList([1, 0, 15]),
    "array.array": lambda: array.array("i", [1, 0, 15]),
    "int64": lambda: np.array([1, 0, 15]),
    "int32": lambda: np.array([1, 0, 15], np.int32),
    "uint8": lambda: np.array([1, 0, 15], np.uint8),
    "uint64": lambda: np.array([1, 0, 15], np.uint64),
    "strided": lambda: np.array([1, 7, 0, 7, 15])[::2],
    "read-only": lambda: np.frombuffer(b"\x01\x00\x0f", np.uint8),
    "long tensor": lambda: torch.tensor([1, 0, 15]),
    "int tensor": lambda: torch.tensor([1, 0, 15], dtype=torch.int32),
    "byte tensor": lambda: torch.tensor([1, 0, 15], dtype=torch.uint8),
    "numpy integers": lambda: [np.int64(1), np.uint8(0), np.int32(15)],
    "0-d tensors": lambda: list(torch.tensor([1, 0, 15])),
    "0-d arrays": lambda: [np.array(1), 0, 15],
    "mixed": lambda: [1, np.int64(0), torch.tensor(15)],
}


async def test_every_kind_of_integers_is_one_and_the_same_request(llm: AsyncLM, engine: FakeEngine) -> None:
    rows = await asyncio.gather(*(llm.next_token_logprobs(make()) for make in GOOD.values()))
    assert engine.batches == [[(1, 0, 15)]]
    assert all(torch.allclose(row, engine.row([1, 0, 15]), atol=1e-6) for row in rows)


async def test_a_range_is_accepted(llm: AsyncLM, engine: FakeEngine) -> None:
    await llm.next_token_logprobs(range(3))
    assert engine.batches == [[(0, 1, 2)]]


@given(st.lists(st.integers(0, N_IDS - 1), min_size=1))
@settings(max_examples=50, derandomize=True, deadline=None)
def test_checked_ids_are_plain_integers_and_their_own_fixed_point(ids: list[int]) -> None:
    for given_ids in (ids, np.array(ids), torch.tensor(ids)):
        checked = checked_ids(given_ids, N_IDS, None)
        assert checked == tuple(ids) and set(map(type, checked)) == {int}
        assert checked_ids(checked, N_IDS, None) == checked


# ---- a snapshot


MUTABLE: dict[str, Callable[[], Any]] = {
    "list": lambda: [5, 2],
    "array": lambda: np.array([5, 2]),
    "tensor": lambda: torch.tensor([5, 2]),
    "deque": lambda: collections.deque([5, 2]),
}


@pytest.mark.parametrize("n_passes", [0, 1, 2, 5])
@pytest.mark.parametrize("kind", MUTABLE)
async def test_a_prompt_changed_after_the_call_changes_nothing(
    llm: AsyncLM, engine: FakeEngine, kind: str, n_passes: int
) -> None:
    """Also where the coroutine starts later than the call, as in a task or a gather."""
    for entry, call in ENTRIES.items():
        if "sync" in entry or entry in ("cache_kv", "stream"):
            continue
        ids = MUTABLE[kind]()
        asked = asyncio.ensure_future(call(llm, ids))
        for _ in range(n_passes):
            await asyncio.sleep(0)
        ids[1] = 9
        await asked
    contexts = {context for batch in engine.batches for context in batch}
    assert (5, 2) in contexts and not [context for context in contexts if context[:2] == (5, 9)]


async def test_a_list_that_grows_after_the_call(llm: AsyncLM, engine: FakeEngine) -> None:
    ids = [1]
    prompts = [ids]
    tasks = [asyncio.create_task(c) for c in (llm.next_token_logprobs(ids), llm.batch_next_token_logprobs(prompts))]
    ids.append(2)
    prompts.append([3])
    row, rows = await asyncio.gather(*tasks)
    assert engine.batches == [[(1,)]] and rows.shape == (1, N_IDS) and torch.equal(row, rows[0])
    assert torch.allclose(await llm.next_token_logprobs([1, 2]), engine.row([1, 2]), atol=1e-6)


async def test_a_mask_that_is_used_again_for_the_next_particle(llm: AsyncLM) -> None:
    mask = np.zeros(N_IDS, bool)
    asked = []
    for i in range(5):
        mask[:] = False
        mask[i] = True
        asked.append(llm.query([1], Draw(key=i, mask=mask)))
    assert [drawn.token_id for drawn in await asyncio.gather(*asked)] == list(range(5))


# ---- the length of the context


@pytest.mark.parametrize("length", [LIMIT, LIMIT + 1, 10 * LIMIT])
async def test_a_context_at_or_over_the_limit_is_refused(llm: AsyncLM, engine: FakeEngine, length: int) -> None:
    entries = {entry: call for entry, call in ENTRIES.items() if "continuation" not in entry}
    errors = await refused(llm, engine, *(call(llm, [1] * length) for call in entries.values()))
    for entry, error in zip(entries, errors, strict=True):
        assert isinstance(error, ContextTooLong), entry
        assert f"{length} tokens" in str(error) and f"at most {LIMIT - 1}" in str(error)


async def test_a_context_below_the_limit_is_served(llm: AsyncLM, engine: FakeEngine) -> None:
    ids = [1] * (LIMIT - 1)
    assert torch.allclose(await llm.next_token_logprobs(ids), engine.row(ids), atol=1e-6)


async def test_sequence_logprob_up_to_the_limit(llm: AsyncLM, engine: FakeEngine) -> None:
    """The last token of the continuation needs no room: nothing comes after it."""
    assert await llm.sequence_logprob([1], [2] * (LIMIT - 1)) < 0
    with pytest.raises(ContextTooLong):
        await llm.sequence_logprob([1], [2] * LIMIT)


async def test_a_sample_stops_with_a_name_where_the_context_is_full(llm: AsyncLM) -> None:
    tokens = []
    with pytest.raises(ContextTooLong):
        async for token in llm.stream([1] * (LIMIT - 3), 100, seed=0):
            tokens.append(token)
    assert len(tokens) == 3


# ---- adapters, backends, queries


@pytest.mark.parametrize("name", ["french", "", 5, True, ["a"]], ids=repr)
async def test_an_unknown_adapter_is_named(llm: AsyncLM, engine: FakeEngine, name: Any) -> None:
    errors = await refused(
        llm,
        engine,
        llm.next_token_logprobs([1], lora_name=name),
        llm.batch_next_token_logprobs([[1]], lora_name=name),
        llm.query([1], Row(), lora_name=name),
        llm.sample([1], 1, [], lora_name=name),
        llm.batch_sample([[1]], 1, [], lora_name=name),
        llm.sequence_logprob([1], [1], lora_name=name),
        _blocking(lambda ids: llm.cache_kv(ids, lora_name=name), [1]),
    )
    assert {type(error) for error in errors} == {UnknownAdapter}


@pytest.mark.parametrize("backend", ["tpu", "", "HF", 5], ids=repr)
def test_an_unknown_backend_is_named(backend: Any) -> None:
    with pytest.raises(UnknownBackend, match="Invalid backend"):
        load_model_by_name("smollm2", backend=backend)


BAD_QUERIES: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "class": lambda: TopK,
    "tuple": lambda: (1, 1.0, None),
    "text": lambda: "top",
    "k 0": lambda: TopK(0),
    "k -1": lambda: TopK(-1),
    "k too large": lambda: TopK(N_IDS + 1),
    "k float": lambda: TopK(2.0),  # type: ignore[arg-type]
    "k bool": lambda: TopK(True),
    "k None": lambda: TopK(None),  # type: ignore[arg-type]
    "key float": lambda: Draw(1.5),  # type: ignore[arg-type]
    "key bool": lambda: Draw(True),
    "key None": lambda: Draw(None),  # type: ignore[arg-type]
    "key text": lambda: Draw("1"),  # type: ignore[arg-type]
    "temperature negative": lambda: Draw(1, -0.1),
    "temperature nan": lambda: Draw(1, float("nan")),
    "temperature infinite": lambda: Draw(1, float("inf")),
    "temperature None": lambda: Draw(1, None),  # type: ignore[arg-type]
    "temperature text": lambda: Draw(1, "1"),  # type: ignore[arg-type]
    "mask too short": lambda: Draw(1, mask=torch.ones(N_IDS - 1, dtype=torch.bool)),
    "mask too long": lambda: MaskMass(torch.ones(N_IDS + 1, dtype=torch.bool)),
    "mask of numbers": lambda: MaskMass(torch.ones(N_IDS)),
    "mask 2-d": lambda: MaskMass(np.ones((1, N_IDS), bool)),
    "mask 0-d": lambda: MaskMass(np.array(True)),
    "mask None": lambda: MaskMass(None),  # type: ignore[arg-type]
    "mask text": lambda: MaskMass("all"),  # type: ignore[arg-type]
    "mask of objects": lambda: MaskMass(np.array([object()] * N_IDS)),
    "mask dictionary": lambda: MaskMass({1: True}),  # type: ignore[arg-type]
    "ids None": lambda: Logprobs(None),  # type: ignore[arg-type]
    "ids integer": lambda: Logprobs(3),  # type: ignore[arg-type]
    "ids negative": lambda: Logprobs([-1]),
    "ids too large": lambda: Logprobs([N_IDS]),
    "ids float": lambda: Logprobs([1.5]),  # type: ignore[list-item]
    "ids bool": lambda: Logprobs([True]),
    "ids text": lambda: Logprobs("12"),  # type: ignore[arg-type]
    "ids nested": lambda: Logprobs([[1]]),  # type: ignore[list-item]
}


@pytest.mark.parametrize("name", BAD_QUERIES)
async def test_a_query_that_does_not_fit_is_named_and_harms_no_batch_mate(
    llm: AsyncLM, engine: FakeEngine, name: str
) -> None:
    (error,) = await refused(llm, engine, llm.query([1], BAD_QUERIES[name]()))
    assert isinstance(error, InvalidQuery)


async def test_a_bad_temperature_of_a_sample_is_named(llm: AsyncLM, engine: FakeEngine) -> None:
    (error,) = await refused(llm, engine, llm.sample([1], 3, [], temperature=-1.0))
    assert isinstance(error, InvalidQuery)
