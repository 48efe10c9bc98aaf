"""Wrapping models in tests: closed afterwards, whatever happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from genlm_backend.llm import AsyncTransformer


@pytest.fixture
def wrap(tiny_tokenizer_512: PreTrainedTokenizerFast) -> Iterator[Callable[..., AsyncTransformer]]:
    """AsyncTransformer of a model with the small tokenizer."""
    wrapped: list[AsyncTransformer] = []

    def make(model: Any, tokenizer: Any = tiny_tokenizer_512, **options: Any) -> AsyncTransformer:
        wrapped.append(AsyncTransformer(model, tokenizer, **options))
        return wrapped[-1]

    yield make
    for llm in wrapped:
        llm.close()


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Forwards of a few thousand numbers: more threads only wait for one another, and for whatever else runs."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)
