"""MockAsyncLM: a fake model with a real tokenizer, for tests and for programs written before the model is there."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch

from genlm_backend.llm.base import ROW_MEMO_BYTES, AsyncLM
from genlm_backend.llm.loading import load_tokenizer
from genlm_backend.llm.service import Context, Engine, EngineCounts, Service
from genlm_backend.tokenization import decode_vocab


class MockEngine(Engine):
    """Logits that are a pure function of the context: normal noise seeded by a hash of adapter and tokens.

    Args:
        n_logits: Width of a row of logits.
        latency_s: How long each evaluation takes.
    """

    def __init__(self, n_logits: int, latency_s: float = 0.0) -> None:
        self.n_logits = n_logits
        self.latency_s = latency_s
        self._n_forwards = 0
        self._n_tokens = 0

    def evaluate(self, contexts: Sequence[Context]) -> torch.Tensor:
        if self.latency_s:
            time.sleep(self.latency_s)
        self._n_forwards += 1
        self._n_tokens += sum(len(context.token_ids) for context in contexts)
        return torch.from_numpy(np.stack([self._logits(context) for context in contexts]))

    def counts(self) -> EngineCounts:
        return EngineCounts(forwards=self._n_forwards, tokens_computed=self._n_tokens)

    def _logits(self, context: Context) -> np.ndarray[Any, np.dtype[np.float32]]:
        digest = hashlib.blake2b(repr((context.adapter, context.token_ids)).encode(), digest_size=16).digest()
        rng = np.random.Generator(np.random.SFC64(int.from_bytes(digest, "little")))
        return 3.0 * rng.standard_normal(self.n_logits, np.float32)


class MockAsyncLM(AsyncLM):
    """A language model whose rows are noise, the same for the same context in every process.

    Args:
        tokenizer: A Hugging Face tokenizer.
        latency_s: How long each batch takes, to see how a program behaves beside a real model.
        batch_size: Most contexts in one batch.
    """

    def __init__(self, tokenizer: Any, *, latency_s: float = 0.0, batch_size: int = 256) -> None:
        byte_vocab, str_vocab = decode_vocab(tokenizer)
        n_vocab = len(byte_vocab)
        engine = MockEngine(n_vocab, latency_s)
        service = Service(engine, n_vocab, batch_size=batch_size, row_memo_bytes=ROW_MEMO_BYTES)
        super().__init__(tokenizer, service, byte_vocab=byte_vocab, str_vocab=str_vocab, n_ids=n_vocab, max_length=None)

    @classmethod
    def from_name(cls, model_name: str, *, trust_remote_code: bool = False, **kwargs: Any) -> Self:
        """The mock of a model: only its tokenizer is read; `kwargs` go to the constructor.

        Args:
            model_name: As in `load_model_by_name`.
            trust_remote_code: Let the tokenizer run code of its own.
            kwargs: For the constructor.

        Raises:
            ModelNotFound: No tokenizer of this name is here.
            RemoteCodeRefused: The tokenizer brings code of its own.
        """
        return cls(load_tokenizer(model_name, trust_remote_code=trust_remote_code), **kwargs)
