"""Batched next-token log-probabilities for probabilistic programs over language models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from genlm_backend.llm import AsyncLM, AsyncTransformer, AsyncVirtualLM, MockAsyncLM, load_model_by_name
    from genlm_backend.tokenization import Token, decode_vocab
    from genlm_backend.trie import AsyncTokenCharacterTrie, ParallelTokenCharacterTrie, TokenCharacterTrie

__version__ = "0.4.0"
__all__ = [
    "AsyncLM",
    "AsyncTokenCharacterTrie",
    "AsyncTransformer",
    "AsyncVirtualLM",
    "MockAsyncLM",
    "ParallelTokenCharacterTrie",
    "Token",
    "TokenCharacterTrie",
    "decode_vocab",
    "load_model_by_name",
]

_HOMES = {
    "Token": "tokenization",
    "decode_vocab": "tokenization",
    "AsyncTokenCharacterTrie": "trie",
    "ParallelTokenCharacterTrie": "trie",
    "TokenCharacterTrie": "trie",
}


def __getattr__(name: str) -> Any:
    """The public names, imported when they are first used: importing the package costs no torch."""
    if name in __all__:
        return getattr(importlib.import_module(f"genlm_backend.{_HOMES.get(name, 'llm')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
