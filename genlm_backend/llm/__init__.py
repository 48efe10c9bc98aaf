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


def best_backend() -> str:
    """What `load_model_by_name` takes unless told: "vllm" where CUDA and vLLM are both there, else "hf"."""
    return "vllm" if importlib.util.find_spec("vllm") is not None and torch.cuda.is_available() else "hf"


def load_model_by_name(name: str, backend: str | None = None, llm_opts: dict[str, Any] | None = None) -> AsyncLM:
    """A language model, ready to be asked.

    Args:
        name: 'smollm2' (the demo model), a Hugging Face id, a local folder, or a `.gguf` path.
        backend: "hf" (transformers), "vllm" or "mock" (noise; only the tokenizer is read); None is `best_backend()`.
        llm_opts: For the backend's `from_name`; name the backend where they fit only one.

    Raises:
        UnknownBackend: No such backend.
        BackendUnavailable: The package it needs is not installed.
        ModelNotFound, UnsafeWeights, RemoteCodeRefused, UnsupportedModel, VocabularyError: See
            `genlm_backend.errors`.
    """
    kind = BACKENDS.get(best_backend() if backend is None else backend)
    if kind is None:
        raise UnknownBackend(backend, sorted(BACKENDS))
    return kind.from_name(name, **(llm_opts or {}))
