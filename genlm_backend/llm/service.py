"""Answers questions about contexts from one engine, through the memo of rows and the batcher.

An engine writes one method: logits for a list of contexts. Everything that all engines promise is here, once: joining
equal requests, isolation of failures, normalisation, the check for finite numbers, the memo, the queries, the counts.
"""

from __future__ import annotations

import asyncio
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch

from genlm_backend.batching import Batcher, Job
from genlm_backend.cache.row_memo import Block, RowMemo
from genlm_backend.cache.row_memory import RowMemory
from genlm_backend.errors import EvaluationFailed, GenlmError, NonFiniteLogits
from genlm_backend.llm.queries import LogNormalizer, Query, answer, begin, is_late

_PREFILL = LogNormalizer()  # this very object asks for keys and values: no remembered row answers it
_PRECISE_NATS = 64.0  # float32 log-probabilities above minus this are exact to 4e-6


class Context(NamedTuple):
    """The identity of a request: the adapter and all its tokens."""

    adapter: str | None
    token_ids: tuple[int, ...]


class EngineCounts(NamedTuple):
    """What an engine did and holds; see `Statistics`."""

    forwards: int = 0
    tokens_computed: int = 0
    kv_tokens: int = 0
    kv_bytes: int = 0
    evictions: int = 0


class Statistics(NamedTuple):
    """Counts since loading, and what is held now."""

    requests: int
    """questions asked"""
    batches: int
    """batches taken by the engine thread"""
    forwards: int
    """forward passes of the model"""
    tokens_computed: int
    """tokens that went through the model; one per distinct new prefix where keys and values are cached"""
    row_hits: int
    """questions answered from a remembered row, without a forward pass"""
    kv_tokens: int
    """tokens whose keys and values are held now"""
    kv_bytes: int
    """bytes of keys and values held now"""
    evictions: int
    """tokens whose keys and values were forgotten for room"""


class Engine(ABC):
    """Computes logits. Called from one thread at a time."""

    @abstractmethod
    def evaluate(self, contexts: Sequence[Context]) -> torch.Tensor:
        """Logits of the token after each context: `(len(contexts), n_logits)`, any float dtype, on its device.

        Contexts are distinct, not empty, and within the model's limits.

        Raises:
            Exception: Anything; the service finds the context that causes it.
        """

    def counts(self) -> EngineCounts:
        """What was done so far; callable from any thread."""
        return EngineCounts()

    def clear_kv(self) -> None:
        """Forget all keys and values; callable from any thread, also while `evaluate` runs."""

    def reset(self) -> None:
        """Forget everything, the counts too; called before the first request."""

    def close(self) -> None:
        """Free what the engine holds; called once, when nothing runs."""


class Service:
    """One engine, one batcher, one memo; shared by every wrapper of the same model.

    Args:
        engine: Computes logits.
        n_vocab: Width of a row: the tokenizer's largest id + 1. Logits beyond are dropped, missing ones are -inf.
        batch_size: Most distinct contexts in one batch.
        row_memo_bytes: Bound of the memo of rows.
    """

    def __init__(self, engine: Engine, n_vocab: int, *, batch_size: int, row_memo_bytes: int) -> None:
        self.engine = engine
        self.n_vocab = n_vocab
        self.memo = RowMemo(row_memo_bytes)
        self._memory = RowMemory(1.25 * row_memo_bytes)  # gaps included
        self.batcher = Batcher(self._evaluate, batch_size=batch_size, explain=_explain)
        self.n_requests = 0
        self.n_row_hits = 0
        self._n_users = 1
        self._users = threading.Lock()

    def ask(self, context: Context, query: Query) -> asyncio.Future[Any]:
        """A future for the answer. Call it in a running event loop.

        Already done when the row is remembered, unless its mask is late: that is waited for in the engine thread, with
        all of its batch.
        """
        self.batcher.check_process()  # first: in a fork, the memo's lock may be held by a thread that is not there
        self.n_requests += 1
        known = None if is_late(query) else self.memo.get(context)
        if known is None:
            return self.batcher.ask(context, query)
        self.n_row_hits += 1
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        (outcome,) = answer(known, [(0, query)])
        if isinstance(outcome, BaseException):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
        return future

    def prefill(self, context: Context) -> asyncio.Future[Any]:
        """A future that is done when the engine has computed a context, also one whose row is remembered."""
        self.n_requests += 1
        return self.batcher.ask(context, _PREFILL)

    def statistics(self) -> Statistics:
        """Counts since loading; callable from any thread."""
        counts = self.engine.counts()
        return Statistics(
            requests=self.n_requests,
            batches=self.batcher.n_batches,
            forwards=counts.forwards,
            tokens_computed=counts.tokens_computed,
            row_hits=self.n_row_hits,
            kv_tokens=counts.kv_tokens,
            kv_bytes=counts.kv_bytes,
            evictions=counts.evictions,
        )

    def share(self) -> bool:
        """Count one more user besides the one that made it; False if the last user has gone."""
        with self._users:
            if not self._n_users:
                return False
            self._n_users += 1
            return True

    def release(self) -> None:
        """Count one user less; after the last one, end the engine thread and free the engine; blocks while it runs."""
        with self._users:
            self._n_users -= 1
            if self._n_users:
                return
        self.batcher.close(timeout_s=None)
        self.memo.clear()
        self._memory.release()
        self.engine.close()

    def _evaluate(self, jobs: Sequence[Job]) -> list[list[Any]]:
        known: list[Block | None] = []
        for job in jobs:
            is_prefill = False
            for query in job.questions:
                is_prefill |= query is _PREFILL
                begin(query)
            known.append(None if is_prefill else self.memo.get(job.key))  # some were just computed
        new = [job for job, block in zip(jobs, known, strict=True) if block is None]
        computed = iter(self._compute(new) if new else [])
        return [
            next(computed) if block is None else self._remembered(job, block)
            for job, block in zip(jobs, known, strict=True)
        ]

    def _remembered(self, job: Job, block: Block) -> list[Any]:
        n_questions = len(job.questions)
        self.n_row_hits += n_questions
        return answer(block, [(0, query) for query in job.questions])

    def _compute(self, jobs: Sequence[Job]) -> list[list[Any]]:
        generation = self.memo.generation  # read before the engine reads its keys and values
        contexts: list[Hashable] = [job.key for job in jobs]
        logits = self.engine.evaluate(contexts)  # type: ignore[arg-type]
        if len(logits) != len(contexts):
            raise RuntimeError(f"the engine gave {len(logits)} rows for {len(contexts)} contexts")
        if logits.device.type == "cpu" and generation == self.memo.generation:
            self.memo.make_room(4 * len(logits) * self.n_vocab)  # there the new rows may be
        block = normalize(logits, self.n_vocab, self._memory)
        finite = [row for row, value in enumerate(block.log_normalizers) if math.isfinite(value)]
        self.memo.put([contexts[row] for row in finite], finite, block, generation)
        is_finite = set(finite)
        asked = [(row, query) for row in finite for query in jobs[row].questions]
        answers = iter(answer(block, asked))
        return [
            [next(answers) for _ in job.questions]
            if row in is_finite
            else [NonFiniteLogits(_n_tokens(job)) for _ in job.questions]
            for row, job in enumerate(jobs)
        ]


def normalize(logits: torch.Tensor, n_vocab: int, memory: RowMemory | None = None) -> Block:
    """Log-probabilities over `n_vocab` tokens, in float32 whatever the dtype of the logits.

    Args:
        logits: `(batch, n_logits)`. Columns beyond `n_vocab` are padding and dropped; missing ones become -inf.
        memory: Where the rows are to be, on a CPU; None takes memory of their own.

    Returns:
        Rows `(batch, n_vocab)` float32 nats, and their log-normalisers. A row with NaN, +inf or no finite logit has a
        log-normaliser that is not finite.
    """
    logits = logits[:, :n_vocab]
    n_missing = n_vocab - logits.shape[1]
    if n_missing:
        logits = torch.nn.functional.pad(logits, (0, n_missing), value=-math.inf)
    if logits.device.type == "cpu":
        from genlm_backend import race  # imports numba

        if race.is_compiled():
            return _normalize_on_cpu(logits, memory or RowMemory(0))
    logprobs = torch.log_softmax(logits, -1, dtype=torch.float32)
    log_normalizers = logits[:, 0].float() - logprobs[:, 0]
    unknown = ~(logprobs[:, 0] > -_PRECISE_NATS)
    if unknown.any():  # the first token is too improbable, or the row is not finite: take the most probable token
        best = logits[unknown].float().max(-1)
        log_normalizers[unknown] = best.values - logprobs[unknown].gather(1, best.indices[:, None])[:, 0]
    return Block(logprobs, log_normalizers.tolist())


def _normalize_on_cpu(logits: torch.Tensor, memory: RowMemory) -> Block:
    """One compiled pass over each row, also of 16 bits: torch takes 1.7 times as long."""
    from genlm_backend import race

    rows = memory.empty(logits.shape)
    if logits.dtype not in (torch.float32, torch.bfloat16) or logits.stride(-1) != 1:
        logits = logits.float().contiguous()
    log_normalizers = race.normalize(logits.data_ptr(), logits.element_size(), logits.stride(0), rows.numpy())
    return Block(rows, log_normalizers.tolist())


def _n_tokens(job: Job) -> int:
    assert isinstance(job.key, Context)
    return len(job.key.token_ids)


def _explain(job: Job, error: BaseException) -> BaseException:
    if isinstance(error, GenlmError):
        return error
    failed = EvaluationFailed(_n_tokens(job), _in_words(error))
    failed.__cause__ = error
    return failed


def _in_words(error: BaseException) -> str:
    name = type(error).__name__
    try:
        return f"{name}: {error}"
    except Exception:  # its own text raises
        return name
