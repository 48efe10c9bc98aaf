"""AsyncLM: the one public interface of every language model here."""

from __future__ import annotations

import asyncio
import operator
from collections.abc import AsyncGenerator, Collection, Coroutine, Iterable, Sequence
from types import TracebackType
from typing import Any, Self

import torch

from genlm_backend import sampling
from genlm_backend.batching import run_sync
from genlm_backend.errors import EmptyPrompt, GenlmError, ModelClosed, TokenIdError, UnknownAdapter
from genlm_backend.llm.contexts import checked_ids, described
from genlm_backend.llm.queries import Draw, Logprobs, Query, Row, check_query
from genlm_backend.llm.service import Context, Service, Statistics
from genlm_backend.tokenization import Token

ROW_MEMO_BYTES = 128 * 2**20  # 650 rows of 49,152 tokens: a few steps of a hundred particles


class AsyncLM:
    """A language model for any number of concurrent coroutines, event loops and threads.

    Whatever is asked at the same time is computed together; every new prefix is computed once. A program owns nothing
    but its token ids: backtracking is asking for a shorter prefix, forking is asking for two longer ones. What is asked
    is fixed by the call, also where its coroutine is awaited later.

    Attributes:
        tokenizer: The Hugging Face tokenizer.
        byte_vocab: The bytes of each token; index = token id; as long as a row is wide.
        str_vocab: The same as strings.

    Raises, from every method that takes token ids (before anything is computed):
        EmptyPrompt, TokenIdError, ContextTooLong, UnknownAdapter: See `genlm_backend.errors`.
        ModelClosed: After `aclose`.
        EvaluationFailed, NonFiniteLogits: Computing this request failed; others are not affected.
    """

    byte_vocab: list[Token]
    str_vocab: list[str]

    def __init__(
        self,
        tokenizer: Any,
        service: Service,
        *,
        byte_vocab: list[Token],
        str_vocab: list[str],
        n_ids: int,
        max_length: int | None,
    ) -> None:
        self.tokenizer = tokenizer
        self.byte_vocab = byte_vocab
        self.str_vocab = str_vocab
        self.max_length = max_length
        self._service = service
        self._n_ids = n_ids
        self._is_closed = False

    # ---- rows

    def next_token_logprobs(
        self, token_ids: Sequence[int], lora_name: str | None = None
    ) -> Coroutine[Any, Any, torch.Tensor]:
        """Log-probabilities of the next token: `(vocab,)` float32, nats, normalised; the caller's own tensor.

        Args:
            token_ids: The context: integers as a sequence, array or tensor; at least one.
            lora_name: The adapter; None is the model itself.
        """
        return self._ask(token_ids, Row(), lora_name)

    def batch_next_token_logprobs(
        self, token_ids_list: Sequence[Sequence[int]], lora_name: str | None = None
    ) -> Coroutine[Any, Any, torch.Tensor]:
        """Rows for several contexts: `(len(token_ids_list), vocab)` float32, nats. No context gives no row."""
        try:
            contexts = self._contexts(token_ids_list, lora_name)
        except GenlmError as error:
            return _failed(error)
        return self._rows(contexts)

    def next_token_logprobs_sync(self, token_ids: Sequence[int], lora_name: str | None = None) -> torch.Tensor:
        """`next_token_logprobs` for callers that cannot await; works inside a running event loop, and blocks it."""
        return run_sync(self.next_token_logprobs(token_ids, lora_name))

    def batch_next_token_logprobs_sync(
        self, token_ids_list: Sequence[Sequence[int]], lora_name: str | None = None
    ) -> torch.Tensor:
        """`batch_next_token_logprobs` for callers that cannot await; works inside a running event loop."""
        return run_sync(self.batch_next_token_logprobs(token_ids_list, lora_name))

    def query(self, token_ids: Sequence[int], query: Query, lora_name: str | None = None) -> Coroutine[Any, Any, Any]:
        """The answer to one query about the next token; see `genlm_backend.llm.queries`.

        Queries that wait at the same time are answered together where the logits are; no row is copied for them.

        Raises:
            InvalidQuery: The query does not fit this vocabulary.
            NoTokenAllowed: A draw whose mask leaves no token of positive probability.
        """
        return self._ask(token_ids, query, lora_name)

    def sequence_logprob(
        self, prompt_ids: Sequence[int], continuation_ids: Sequence[int], lora_name: str | None = None
    ) -> Coroutine[Any, Any, float]:
        """Log-probability of a continuation given a prompt, nats; one forward for all positions of a batch.

        An empty continuation has log-probability 0.
        """
        try:
            prompt = self._context(prompt_ids, lora_name)
            continuation = _checked_continuation(continuation_ids, min(self._n_ids, len(self.byte_vocab)))
            whole = prompt.token_ids + continuation
            contexts = [self._context(whole[:end], lora_name) for end in range(len(prompt.token_ids), len(whole))]
        except GenlmError as error:
            return _failed(error)
        return self._sum_of_logprobs(contexts, continuation)

    # ---- samples

    def stream(
        self,
        prompt_token_ids: Sequence[int],
        max_tokens: int,
        eos_token_ids: Collection[int] = (),
        temperature: float = 1.0,
        seed: int | None = None,
        lora_name: str | None = None,
        *,
        lineage: tuple[int, ...] = (),
    ) -> AsyncGenerator[int, None]:
        """Sampled tokens as they come, until one of `eos_token_ids` (not yielded) or `max_tokens` of them.

        Args:
            prompt_token_ids: What to continue.
            max_tokens: Most tokens to yield.
            eos_token_ids: Token ids that end the sample: integers as any collection, array or tensor. None among them,
                the end token of a tokenizer that has none, ends nothing.
            temperature: Divides the log-probabilities; 0 is greedy.
            seed: Equal seeds give equal samples whatever else runs; None takes a fresh one.
            lora_name: The adapter.
            lineage: Tells samples with one seed apart.
        """
        seed = sampling.fresh_seed() if seed is None else seed
        prompt = self._context(prompt_token_ids, lora_name)
        return self._stream(prompt, max_tokens, _checked_ends(eos_token_ids, self._n_ids), temperature, seed, lineage)

    def sample(
        self,
        prompt_token_ids: Sequence[int],
        max_tokens: int,
        eos_token_ids: Collection[int],
        temperature: float = 1.0,
        seed: int | None = None,
        lora_name: str | None = None,
    ) -> Coroutine[Any, Any, list[int]]:
        """One sampled continuation, without prompt and end token: token ids; arguments as in `stream`."""
        try:
            return _listed(self.stream(prompt_token_ids, max_tokens, eos_token_ids, temperature, seed, lora_name))
        except GenlmError as error:
            return _failed(error)

    def batch_sample(
        self,
        prompt_token_ids_list: Sequence[Sequence[int]],
        max_tokens: int,
        eos_token_ids: Collection[int],
        temperature: float = 1.0,
        seed: int | None = None,
        lora_name: str | None = None,
    ) -> Coroutine[Any, Any, list[list[int]]]:
        """One sampled continuation for each prompt; equal prompts get different samples. Arguments as in `stream`."""
        seed = sampling.fresh_seed() if seed is None else seed
        try:
            prompts = self._contexts(prompt_token_ids_list, lora_name)
            ends = _checked_ends(eos_token_ids, self._n_ids)
        except GenlmError as error:
            return _failed(error)
        streams = [self._stream(prompt, max_tokens, ends, temperature, seed, (i,)) for i, prompt in enumerate(prompts)]
        return _all_listed(streams)

    # ---- text

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Text to token ids, by the tokenizer."""
        return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Token ids to text, by the tokenizer; special tokens are written by their names."""
        text: str = self.tokenizer.decode(list(token_ids))
        return text

    def get_eos_token_id(self) -> int | None:
        """The token that ends a text; None if the tokenizer names none."""
        eos: int | None = self.tokenizer.eos_token_id
        return eos

    # ---- caches and life

    def cache_kv(self, prompt_tokens: Sequence[int], lora_name: str | None = None) -> None:
        """Compute a prompt now, also where its row is remembered, so that its keys and values are held.

        Never needed: whatever is asked is cached. Blocks, also inside an event loop.
        """
        run_sync(self._prefill(self._context(prompt_tokens, lora_name)))

    def clear_cache(self) -> None:
        """Forget rows, keys and values. Costs time later, changes no answer; also while requests run.

        What is being computed is answered, but not kept. Call it after a change of the model's weights.
        """
        self._service.engine.clear_kv()
        self._service.memo.clear()  # last: a batch that begins in between may still have the old keys and values

    def clear_kv_cache(self) -> None:
        """Forget keys and values, keep remembered rows."""
        self._service.engine.clear_kv()

    def reset_async_queries(self) -> None:
        """Drop the requests that wait and are not being computed; their callers get `QueriesReset`."""
        self._service.batcher.reset()

    def statistics(self) -> Statistics:
        """Counts since loading, and what is held now."""
        return self._service.statistics()

    def close(self) -> None:
        """End the engine thread and free the engine, unless another object shares it; blocks while a batch runs."""
        if self._is_closed:
            return
        self._is_closed = True
        self._service.release()

    async def aclose(self) -> None:
        """`close` without blocking the event loop."""
        await asyncio.to_thread(self.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.aclose()

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A program's state may hold its model; copying the state shares the model."""
        return self

    def __reduce__(self) -> Any:
        raise TypeError(f"{type(self).__name__} cannot be pickled: send its name and load it there")

    def _context(self, token_ids: object, lora_name: str | None) -> Context:
        if self._is_closed:
            raise ModelClosed()
        if lora_name is not None:
            raise UnknownAdapter(lora_name, self._adapters())
        return Context(lora_name, checked_ids(token_ids, self._n_ids, self.max_length))

    def _adapters(self) -> list[str]:
        return []

    def _contexts(self, token_ids_list: object, lora_name: str | None) -> list[Context]:
        if not isinstance(token_ids_list, Iterable) or getattr(token_ids_list, "ndim", 1) == 0:
            raise TokenIdError(None, described(token_ids_list), self._n_ids)
        return [self._context(token_ids, lora_name) for token_ids in token_ids_list]

    def _ask(self, token_ids: object, query: Query, lora_name: str | None) -> Coroutine[Any, Any, Any]:
        """What is asked is fixed by this call; an error is raised where the answer is awaited."""
        try:
            context = self._context(token_ids, lora_name)
            return self._answer(context, check_query(query, len(self.byte_vocab)))
        except GenlmError as error:
            return _failed(error)

    async def _answer(self, context: Context, query: Query) -> Any:
        return await self._service.ask(context, query)

    async def _prefill(self, context: Context) -> None:
        await self._service.prefill(context)

    async def _rows(self, contexts: Sequence[Context]) -> torch.Tensor:
        rows = await _all([self._service.ask(context, Row()) for context in contexts])
        return torch.stack(rows) if rows else torch.empty(0, len(self.byte_vocab))

    async def _sum_of_logprobs(self, contexts: Sequence[Context], token_ids: Sequence[int]) -> float:
        queries = [Logprobs((token_id,)) for token_id in token_ids]
        asked = [self._service.ask(context, query) for context, query in zip(contexts, queries, strict=True)]
        return float(torch.cat(await _all(asked)).double().sum()) if asked else 0.0

    async def _stream(
        self,
        prompt: Context,
        max_tokens: int,
        ends: Collection[int],
        temperature: float,
        seed: int,
        lineage: tuple[int, ...],
    ) -> AsyncGenerator[int, None]:
        ids = list(prompt.token_ids)
        for step in range(max_tokens):
            key = sampling.draw_key(seed, lineage, step, "sample")
            token_id = (await self.query(ids, Draw(key, temperature), prompt.adapter)).token_id
            if token_id in ends:
                return
            yield token_id
            ids.append(token_id)


async def _failed(error: GenlmError) -> Any:
    raise error


async def _listed(stream: AsyncGenerator[int, None]) -> list[int]:
    return [token_id async for token_id in stream]


async def _all_listed(streams: Sequence[AsyncGenerator[int, None]]) -> list[list[int]]:
    return await _all([asyncio.ensure_future(_listed(stream)) for stream in streams])


async def _all(futures: Sequence[asyncio.Future[Any]]) -> list[Any]:
    """Results in order; the first exception cancels the others, and leaves when they have ended."""
    try:
        return list(await asyncio.gather(*futures))
    except BaseException:
        for future in futures:
            future.cancel()
        await asyncio.gather(*futures, return_exceptions=True)
        raise


def _checked_continuation(token_ids: object, n_ids: int) -> tuple[int, ...]:
    try:
        return checked_ids(token_ids, n_ids, None)
    except EmptyPrompt:
        return ()


def _checked_ends(eos_token_ids: Any, n_ids: int) -> frozenset[int]:
    """As plain integers: a tensor's elements equal none."""
    try:
        return frozenset(operator.index(token_id) for token_id in eos_token_ids if token_id is not None)
    except TypeError as error:
        raise TokenIdError(None, described(eos_token_ids), n_ids, "eos_token_ids") from error
