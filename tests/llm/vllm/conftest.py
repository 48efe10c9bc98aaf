"""SmolLM2 on the real vLLM, loaded once for all tests; the small engine is in the folder above."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llvmlite.binding.ffi  # noqa: F401  (vLLM stumbles over it, see core._steady_llvmlite)
import pytest
import torch
from packaging.version import Version

from genlm_backend.llm import AsyncTransformer, AsyncVirtualLM

BLOCK_BYTES = 30 * 2 * 3 * 64 * 32 * 4  # SmolLM2: layers, keys and values, heads, head size, tokens, float32
SMOL_OPTIONS = {
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_seqs": 12,
    "kv_cache_memory_bytes": 49 * BLOCK_BYTES,  # of 32 tokens each; little, so that sessions are evicted
}


def next_best_to_live() -> str:
    """The transport after "live" that the self-test finds sound: before 0.32, vLLM names the blocks of a resumable
    request after tokens that it had sampled and dropped, so that others read wrong keys and values."""
    release = importlib.metadata.version(importlib.metadata.packages_distributions()["vllm"][0])
    return "resumable" if Version(release) >= Version("0.32") else "fresh"


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Where other processes run beside it, an engine of two threads waits for its own."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="session")
def smol(needs_vllm: None, smollm2_path: Path) -> Iterator[AsyncVirtualLM]:
    """SmolLM2 in float32, with 12 slots and 48 blocks."""
    llm = AsyncVirtualLM.from_name(str(smollm2_path), SMOL_OPTIONS)
    yield llm
    llm.close()


@pytest.fixture(scope="session")
def smol_transformer(smollm2_path: Path) -> Iterator[AsyncTransformer]:
    """The same model through transformers, in float32."""
    llm = AsyncTransformer.from_name(str(smollm2_path), hf_opts={"dtype": "float32"}, device="cpu")
    yield llm
    llm.close()


@pytest.fixture
def with_transport() -> Iterator[Callable[[AsyncVirtualLM, str], None]]:
    """Make an engine use another transport for one test."""
    from genlm_backend.llm.vllm.self_test import TRANSPORTS

    changed: list[tuple[AsyncVirtualLM, Any]] = []

    def use(llm: AsyncVirtualLM, name: str) -> None:
        changed.append((llm, llm._engine.transport.name))
        llm.clear_cache()
        llm._engine.use(TRANSPORTS[name])

    yield use
    for llm, name in reversed(changed):
        llm._engine.use(TRANSPORTS[name])
