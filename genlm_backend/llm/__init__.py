"""Language models behind one interface, and how to load them by name."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from genlm_backend.errors import UnknownBackend
from genlm_backend.llm.base import AsyncLM
from genlm_backend.llm.hf.model import AsyncTransformer
from genlm_backend.llm.mock import MockAsyncLM
from genlm_backend.llm.queries import (
    ByteMarginal,
    Draw,
    Drawn,
    LogNormalizer,
    Logprobs,
    MaskMass,
    Query,
    Row,
    TopK,
    TopTokens,
)
from genlm_backend.llm.service import Statistics
from genlm_backend.llm.vllm.model import AsyncVirtualLM

__all__ = [
    "AsyncLM",
    "AsyncTransformer",
    "AsyncVirtualLM",
    "ByteMarginal",
    "Draw",
    "Drawn",
    "LogNormalizer",
    "Logprobs",
    "MaskMass",
    "MockAsyncLM",
    "Query",
    "Row",
    "Statistics",
    "TopK",
    "TopTokens",
    "best_backend",
    "load_model_by_name",
]

BACKENDS: dict[str, type[AsyncTransformer] | type[AsyncVirtualLM] | type[MockAsyncLM]] = {
    "hf": AsyncTransformer,
    "vllm": AsyncVirtualLM,
    "mock": MockAsyncLM,
}


_OPTIONS_OF_VLLM = frozenset({"engine_opts", "batch_size", "row_memo_bytes", "trust_remote_code"})


def best_backend() -> str:
    """What `load_model_by_name` takes unless told: "vllm" where CUDA and vLLM are both there, else "hf"."""
    vllm = importlib.util.find_spec("vllm")
    return "vllm" if vllm is not None and vllm.origin is not None and torch.cuda.is_available() else "hf"


def load_model_by_name(name: str, backend: str | None = None, llm_opts: dict[str, Any] | None = None) -> AsyncLM:
    """A language model, ready to be asked.

    Args:
        name: 'smollm2' (the demo model), a Hugging Face id, a local folder, or a `.gguf` path.
        backend: "hf" (transformers), "vllm" or "mock" (noise; only the tokenizer is read); None is `best_backend()`, or
            "hf" with options that vLLM does not have.
        llm_opts: For the backend's `from_name`.

    Raises:
        UnknownBackend: No such backend.
        BackendUnavailable: The package it needs is not installed.
        ModelNotFound, UnsafeWeights, RemoteCodeRefused, UnsupportedModel, VocabularyError: See
            `genlm_backend.errors`.
    """
    if backend is None:
        backend = best_backend() if _OPTIONS_OF_VLLM.issuperset(llm_opts or {}) else "hf"
    kind = BACKENDS.get(backend)
    if kind is None:
        raise UnknownBackend(backend, sorted(BACKENDS))
    return kind.from_name(name, **(llm_opts or {}))
