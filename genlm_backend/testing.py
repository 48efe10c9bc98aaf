"""For tests of programs over language models: an engine that waits for the test, and the laws of potentials.

engine = FakeEngine(n_logits=16, is_open=False)
async with fake_language_model(engine) as llm:
    asked = asyncio.create_task(llm.next_token_logprobs([1, 2]))
    assert await engine.entered() == [(1, 2)]  # the batch is in the engine now, and stays there
    engine.let_one_through()
    assert torch.equal(await asked, engine.row([1, 2]))

await check_potential(potential, sequences)  # raises AssertionError, with the law that does not hold
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Collection, Sequence

import torch

from genlm_backend.llm.base import ROW_MEMO_BYTES, AsyncLM
from genlm_backend.llm.mock import MockEngine
from genlm_backend.llm.service import Context, Engine, EngineCounts, Service
from genlm_backend.packed_mask import pack
from genlm_backend.potentials.base import Constraint, Potential, State
from genlm_backend.tokenization import Token

PATIENCE_S = 30.0  # a test that waits longer than this for the engine fails instead of hanging


class FakeEngine(Engine):
    """Noise as logits, a pure function of the context; one batch at a time, when the test opens the gate.

    Faults are looked up when a batch is computed, so a test may change them at any time.

    Args:
        n_logits: Width of a row of logits.
        is_open: Whether batches pass without `let_one_through`.

    Attributes:
        batches: The token ids of every context of every evaluation that began, in order.
        fail_on: token id -> what is raised for a batch with a context that ends in it.
        fail_calls: number of an evaluation (from 0) -> what it raises.
        nan_on: A context that ends in one of these token ids gets NaN for one logit.
    """

    def __init__(self, n_logits: int = 16, *, is_open: bool = True) -> None:
        self.batches: list[list[tuple[int, ...]]] = []
        self.fail_on: dict[int, BaseException] = {}
        self.fail_calls: dict[int, BaseException] = {}
        self.nan_on: set[int] = set()
        self.n_clears = 0
        self.is_closed = False
        self._noise = MockEngine(n_logits)
        self._is_open = is_open
        self._passes = threading.Semaphore(0)
        self._entered = threading.Semaphore(0)
        self._n_seen = 0

    def evaluate(self, contexts: Sequence[Context]) -> torch.Tensor:
        call = len(self.batches)
        self.batches.append([context.token_ids for context in contexts])
        self._entered.release()
        if not self._is_open and not self._passes.acquire(timeout=PATIENCE_S):
            raise TimeoutError(f"nobody let evaluation {call} through")
        if call in self.fail_calls:
            raise self.fail_calls[call]
        for context in contexts:
            if context.token_ids[-1] in self.fail_on:
                raise self.fail_on[context.token_ids[-1]]
        logits = self._noise.evaluate(contexts)
        for row, context in zip(logits, contexts, strict=True):
            if context.token_ids[-1] in self.nan_on:
                row[len(row) // 2] = math.nan
        return logits

    def counts(self) -> EngineCounts:
        return self._noise.counts()

    def clear_kv(self) -> None:
        self.n_clears += 1

    def close(self) -> None:
        self.is_closed = True

    def row(self, token_ids: Sequence[int], adapter: str | None = None) -> torch.Tensor:
        """The oracle: what `next_token_logprobs` has to give, `(n_logits,)` float32 nats."""
        logits = MockEngine(self._noise.n_logits).evaluate([Context(adapter, tuple(token_ids))])
        return torch.log_softmax(logits[0], -1)

    async def entered(self) -> list[tuple[int, ...]]:
        """Wait for an evaluation to begin that was not waited for yet; the token ids of its contexts.

        Raises:
            TimeoutError: None began for half a minute.
        """
        if not await asyncio.to_thread(self._entered.acquire, timeout=PATIENCE_S):
            raise TimeoutError("no evaluation began")
        self._n_seen += 1
        return self.batches[self._n_seen - 1]

    def let_one_through(self) -> None:
        """Let one evaluation end, the one that waits or the next."""
        self._passes.release()

    def open(self) -> None:
        """Let this and all later evaluations through."""
        self._is_open = True
        self._passes.release()


def fake_language_model(
    engine: Engine,
    n_vocab: int = 16,
    *,
    batch_size: int = 256,
    max_length: int | None = None,
    row_memo_bytes: int = ROW_MEMO_BYTES,
) -> AsyncLM:
    """A language model over an engine of the test's own, without a tokenizer; token i is the byte i modulo 256.

    A batch closes when the event loop is quiet, never by age, so that slow machines see the same batches.

    Args:
        engine: Computes logits; see `FakeEngine`.
        n_vocab: Width of a row.
        batch_size: Most distinct contexts in one batch.
        max_length: The context length; None if there is no limit.
        row_memo_bytes: Bound of remembered rows.
    """
    service = Service(engine, n_vocab, batch_size=batch_size, row_memo_bytes=row_memo_bytes)
    service.batcher.max_age_s = PATIENCE_S
    byte_vocab = [Token(i, bytes([i % 256])) for i in range(n_vocab)]
    str_vocab = [token.decode("latin-1") for token in byte_vocab]
    return AsyncLM(None, service, byte_vocab=byte_vocab, str_vocab=str_vocab, n_ids=n_vocab, max_length=max_length)


def check_idle(llm: AsyncLM) -> None:
    """Raise AssertionError if a request is queued or being computed: for the end of a test. Blocks for one request."""
    batcher = llm._service.batcher
    llm.clear_cache()
    row = llm.next_token_logprobs_sync([0])  # its batch takes along whatever was cancelled in the queue
    assert row.shape == (len(llm.byte_vocab),), "the engine goes on"
    assert not batcher._busy, "no batch is in the engine"
    assert not len(batcher._pending), "nothing is queued"
    assert not batcher._lanes, "no event loop is waited for"


async def check_potential(
    potential: Potential,
    sequences: Sequence[Sequence[int]],
    *,
    symbols: Collection[int] | None = None,
    tolerance: float = 1e-4,
) -> None:
    """Hold a potential to its laws, at every prefix of some sequences; see `genlm_backend.potentials.base`.

    Args:
        potential: What is checked.
        sequences: Token ids; alive and dead ones.
        symbols: Which tokens are tried after each prefix; None is all of them. The tokens of the sequences always are.
        tolerance: Of differences of log-weights, nats.

    Raises:
        AssertionError: A law does not hold; the message names it, the prefix and the token.
    """
    some = sorted(set(range(potential.n_tokens) if symbols is None else symbols) - {potential.end})
    states: list[State] = []
    for sequence in sequences:
        state = potential.start()
        total = await potential.prefix(state)
        for length in range(len(sequence) + 1):
            where = f"after {list(sequence[:length])}"
            states.append(state)
            row = await _check_row(potential, state, sorted({*some, *sequence[length:]}), tolerance, where)
            complete, prefix = await potential.complete(state), await potential.prefix(state)
            assert _is_near(prefix, total, tolerance), f"factorisation {where}: {prefix} is not the sum {total}"
            whole = total + float(row[potential.end])
            assert _is_near(complete, whole, tolerance), f"factorisation {where}: {complete} is not the sum {whole}"
            if length < len(sequence):
                total += float(row[sequence[length]])
                state = potential.extend(state, sequence[length])
    await _check_batches(potential, states, tolerance)


async def _check_row(
    potential: Potential, state: State, token_ids: Sequence[int], tolerance: float, where: str
) -> torch.Tensor:
    row = await potential.logw_next(state)
    prefix, complete = await potential.prefix(state), await potential.complete(state)
    assert row.shape == (potential.n_tokens + 1,) and row.dtype == torch.float32, f"shape {where}: {row.shape}"
    assert not row.isnan().any() and not row.isposinf().any(), f"finite weights {where}"
    if prefix == -math.inf:
        assert complete == -math.inf, f"a dead prefix stays dead {where}: complete is {complete}"
        assert row.isneginf().all(), f"a dead prefix stays dead {where}: its row is not -inf"
    else:
        ends = float(row[potential.end])
        assert _is_near(ends, complete - prefix, tolerance), f"end {where}: {ends} is not {complete} - {prefix}"
    for token_id in token_ids:
        after = await potential.prefix(potential.extend(state, token_id))
        expected = after - prefix if prefix > -math.inf else -math.inf
        got = float(row[token_id])
        assert _is_near(got, expected, tolerance), f"next {where}: token {token_id} has {got}, expected {expected}"
    asked = [*token_ids, potential.end]
    columns = (await potential.logw_tokens(state, asked)).tolist()
    for symbol, got in zip(asked, columns, strict=True):
        assert _is_near(got, float(row[symbol]), tolerance), f"logw_tokens {where}: {symbol} has {got}"
    again = await potential.logw_next(state)
    assert torch.allclose(again, row, atol=tolerance), f"a state outlives its extensions {where}: its row changed"
    if isinstance(potential, Constraint):
        _check_constraint(potential, state, asked, row, where)
    return row


def _check_constraint(
    constraint: Constraint, state: State, symbols: Sequence[int], row: torch.Tensor, where: str
) -> None:
    mask = constraint.mask(state)
    assert mask.tolist() == (row == 0).tolist(), f"mask {where} is not the row"
    (packed,) = constraint.packed_masks([state])
    assert packed.tolist() == pack(mask).tolist(), f"packed_masks {where} is not the mask"
    for symbol in symbols:
        assert constraint.allows(state, symbol) == mask[symbol], f"allows {where}: {symbol} is not as in the mask"
    for token_id in constraint.forced(state):
        only = torch.from_numpy(constraint.mask(state)).nonzero()[:, 0].tolist()
        assert only == [token_id], f"forced {where}: {token_id} is not the only choice {only}"
        state = constraint.extend(state, token_id)


async def _check_batches(potential: Potential, states: Sequence[State], tolerance: float) -> None:
    rows = await potential.batch_logw_next(states)
    singles = [await potential.logw_next(state) for state in states]
    assert rows.shape == (len(states), potential.n_tokens + 1), f"batch_logw_next has shape {tuple(rows.shape)}"
    assert torch.allclose(rows, torch.stack(singles), atol=tolerance), "batch equals single: logw_next"
    prefixes, completes = await potential.batch_prefix(states), await potential.batch_complete(states)
    for i, state in enumerate(states):
        assert _is_near(prefixes[i], await potential.prefix(state), tolerance), "batch equals single: prefix"
        assert _is_near(completes[i], await potential.complete(state), tolerance), "batch equals single: complete"


def _is_near(a: float, b: float, tolerance: float) -> bool:
    return a == b or abs(a - b) <= tolerance
