"""A small random Llama and a real engine of vLLM for it, loaded once for all tests; skipped where there is no vLLM."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from genlm_backend.llm import AsyncVirtualLM
from tests import architectures

INSTALL = "needs vLLM on CPU: run `make test`, which installs it (docs/vllm.md)"
TINY_OPTIONS = {"dtype": "float32", "max_num_seqs": 16, "kv_cache_memory_bytes": 2**24, "block_size": 32}


@pytest.fixture(scope="session")
def needs_vllm() -> None:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip(INSTALL)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_512: PreTrainedTokenizerFast) -> Path:
    """A small random Llama whose rows depend strongly on what it sees; vLLM has kernels for heads of this size."""
    folder = tmp_path_factory.mktemp("vllm") / "tiny-llama"
    sizes = {"hidden_size": 128, "head_dim": 32, "num_hidden_layers": 3, "initializer_range": 0.1}
    architectures.build("llama", **sizes).save_pretrained(folder)
    tiny_tokenizer_512.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(needs_vllm: None, tiny_folder: Path) -> Iterator[AsyncVirtualLM]:
    """The small model, with 16 slots; a test that breaks it leaves it repaired."""
    llm = AsyncVirtualLM.from_name(str(tiny_folder), TINY_OPTIONS)
    yield llm
    llm.close()
