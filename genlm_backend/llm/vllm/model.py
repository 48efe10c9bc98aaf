"""AsyncVirtualLM: a language model on vLLM, one live request per particle."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch

from genlm_backend.batching import run_apart
from genlm_backend.errors import SlowPathWarning
from genlm_backend.llm.base import ROW_MEMO_BYTES, AsyncLM
from genlm_backend.llm.demo_model import resolve_model
from genlm_backend.llm.loading import load_tokenizer
from genlm_backend.llm.service import Service, normalize
from genlm_backend.llm.vllm.core import Core, open_core
from genlm_backend.llm.vllm.engine import Tally, VirtualEngine
from genlm_backend.llm.vllm.self_test import choose_transport
from genlm_backend.tokenization import decode_vocab


class AsyncVirtualLM(AsyncLM):
    """A causal language model on vLLM's engine, in this process; made by `from_name`.

    The caller, not vLLM's sampler, chooses each next token; a context that continues one asked before costs one step of
    a request that is kept. At load a self-test decides how, see `transport`. Rows stay on the engine's device.
    """

    def __init__(
        self,
        engine: VirtualEngine,
        tokenizer: Any,
        transport: str,
        *,
        batch_size: int | None = None,
        row_memo_bytes: int | None = None,
    ) -> None:
        byte_vocab, str_vocab = decode_vocab(tokenizer)
        core = engine.core
        self.transport = transport
        self.device = core.device
        self._engine = engine
        service = Service(
            engine,
            len(byte_vocab),
            batch_size=core.max_num_seqs if batch_size is None else batch_size,
            row_memo_bytes=ROW_MEMO_BYTES if row_memo_bytes is None else row_memo_bytes,
        )
        super().__init__(
            tokenizer,
            service,
            byte_vocab=byte_vocab,
            str_vocab=str_vocab,
            n_ids=core.n_ids,
            max_length=core.max_model_len,
        )

    @classmethod
    def from_name(
        cls,
        model_name: str,
        engine_opts: Mapping[str, Any] | None = None,
        *,
        trust_remote_code: bool = False,
        batch_size: int | None = None,
        row_memo_bytes: int | None = None,
    ) -> Self:
        """Load a model and its tokenizer.

        Args:
            model_name: 'smollm2', a Hugging Face id, a local folder, or a `.gguf` path.
            engine_opts: Options of `vllm.EngineArgs`, such as `dtype`, `max_model_len`, `max_num_seqs` (live requests),
                `kv_cache_memory_bytes`, `gpu_memory_utilization`. Parallel and speculative ones are refused.
            trust_remote_code: Let the model and its tokenizer run code of their own.
            batch_size: Most distinct contexts in one batch; None is `max_num_seqs`.
            row_memo_bytes: Bound of remembered rows; None is 128 MiB.

        Raises:
            BackendUnavailable: vLLM is not installed.
            InvalidEngineOption: An option that vLLM does not know, or that cannot work here.
            ModelNotFound, UnsafeWeights, RemoteCodeRefused, UnsupportedModel, VocabularyError: See
                `genlm_backend.errors`.
        """
        options = dict(engine_opts or {})
        if trust_remote_code:
            options["trust_remote_code"] = True
        names = ("revision", "trust_remote_code")
        where = str(resolve_model(model_name))

        def make_core() -> Core:
            return open_core(where, options)

        def load() -> tuple[VirtualEngine, str, list[str]]:
            engine = VirtualEngine(make_core(), make_core)
            try:
                return engine, *choose_transport(engine)
            except BaseException:
                engine.close()
                raise

        tokenizer = load_tokenizer(model_name, **{name: options[name] for name in names if name in options})
        engine, transport, reasons = run_apart(load)
        try:
            wrapped = cls(engine, tokenizer, transport, batch_size=batch_size, row_memo_bytes=row_memo_bytes)
        except BaseException:
            engine.close()
            raise
        if reasons:
            warnings.warn(
                f"{model_name!r} is served by {transport!r} requests of vLLM, correct but slower: {'; '.join(reasons)}",
                SlowPathWarning,
                stacklevel=2,
            )
        return wrapped

    @property
    def tally(self) -> Tally:
        """How contexts were served since loading: continued, forked, opened, evicted, preempted; engine restarts."""
        return self._engine.tally

    async def next_token_logprobs_uncached(
        self, token_ids: Sequence[int], lora_name: str | None = None
    ) -> torch.Tensor:
        """The row from a request of its own that reads no cache: the oracle.

        Shape and errors as in `next_token_logprobs`. Blocks the event loop.
        """
        context = self._context(token_ids, lora_name)
        logits = run_apart(lambda: self._engine.uncached([context]))
        return normalize(logits, len(self.byte_vocab)).logprobs[0]
