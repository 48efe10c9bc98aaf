"""Providers: where backtrack_sampler's strategies get tokens, text and logits from; here any AsyncLM is one.

`BaseProvider` is backtrack_sampler's interface, for providers of users. One of those is served through an engine:
the sampler asks for prefixes, and the engine tells the provider how much of its cache is still good.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol, Self
from weakref import WeakValueDictionary

import torch

from genlm_backend.llm import AsyncTransformer
from genlm_backend.llm.base import ROW_MEMO_BYTES, AsyncLM
from genlm_backend.llm.service import Context, Engine, Service
from genlm_backend.tokenization import Token


class TextProvider(Protocol):
    """What a strategy needs of a provider; any AsyncLM has it."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Text to tokens."""

    def decode(self, tokens: Any, /) -> str:
        """Tokens to text, special tokens by their names."""

    def get_eos_token_id(self) -> int | None:
        """The token that ends a text."""


class BaseProvider(ABC):
    """A source of logits of a user's; a copy of what holds it, such as a strategy, holds the same one."""

    @abstractmethod
    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Text to tokens."""

    @abstractmethod
    def decode(self, tokens: list[int]) -> str:
        """Tokens to text."""

    @abstractmethod
    def generate(self, input_ids: list[int], *args: Any, **kwargs: Any) -> torch.Tensor:
        """`(1, vocab)` logits of the token after `input_ids`."""

    @abstractmethod
    def get_eos_token_id(self) -> int:
        """The token that ends a text."""

    @abstractmethod
    def remove_latest_cache(self, nr: int) -> None:
        """The last `nr` tokens are gone."""

    @abstractmethod
    def reset(self) -> None:
        """Forget what was cached."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


class TransformersProvider:
    """A loaded transformers model.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        device: Where to move the model; None leaves it where it is.
    """

    def __init__(self, model: Any, tokenizer: Any, device: Any = None) -> None:
        self.model, self.tokenizer, self.device = model, tokenizer, device
        if device is not None:
            model.to(device)
        self.llm = AsyncTransformer(model, tokenizer)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Text to tokens."""
        return self.llm.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, tokens: Sequence[int]) -> str:
        """Tokens to text, special tokens by their names."""
        return self.llm.decode(tokens)

    def get_eos_token_id(self) -> int | None:
        """The token that ends a text."""
        return self.llm.get_eos_token_id()

    def generate(self, input_ids: Sequence[int], *args: Any, **kwargs: Any) -> torch.Tensor:
        """`(1, vocab)` log-probabilities of the token after `input_ids`; blocks."""
        return self.llm.next_token_logprobs_sync(input_ids)[None]

    def remove_latest_cache(self, nr: int) -> None:
        """Nothing to do: a shorter prefix is asked for, and known."""

    def reset(self) -> None:
        """Nothing to do: prefixes do not leak into one another."""

    def __deepcopy__(self, memo: dict[int, Any]) -> TransformersProvider:
        return self


class ProviderEngine(Engine):
    """A provider of a user's as an engine: one prefix at a time, on its own cache.

    Attributes:
        pieces: The text of each token.
    """

    def __init__(self, provider: BaseProvider) -> None:
        provider.reset()  # it may have been used before
        width = int(provider.generate([provider.get_eos_token_id()]).shape[-1])
        provider.reset()
        self.pieces = [provider.decode([i]) for i in range(width)]
        self._provider = provider
        self._cached: tuple[int, ...] = ()
        self._is_cleared = False

    def evaluate(self, contexts: Sequence[Context]) -> torch.Tensor:
        return torch.cat([self._logits(context.token_ids) for context in contexts])

    def _logits(self, token_ids: tuple[int, ...]) -> torch.Tensor:
        if self._is_cleared:
            self._cached, self._is_cleared = (), False
            self._provider.reset()
        common = 0
        while common < min(len(token_ids), len(self._cached)) and token_ids[common] == self._cached[common]:
            common += 1
        common = min(common, len(token_ids) - 1)  # its last token has to be fed for its logits
        if common < len(self._cached):
            self._provider.remove_latest_cache(len(self._cached) - common)
        self._cached = token_ids
        return self._provider.generate(list(token_ids)).detach().float().reshape(1, -1).cpu()

    def clear_kv(self) -> None:
        self._is_cleared = True  # the provider is told before it is asked again: now it may be at work


def model_of(provider: Any) -> AsyncLM:
    """The AsyncLM behind a provider; those of one provider of a user's share its cache.

    One of a user's is reset, and at first asked for the width of its logits.

    Raises:
        TypeError: It is no provider.
    """
    if isinstance(provider, AsyncLM):
        return provider
    if isinstance(provider, TransformersProvider):
        return provider.llm
    if not isinstance(provider, BaseProvider):
        raise TypeError(f"{provider!r} is no provider; expected an AsyncLM, a TransformersProvider or a BaseProvider")
    return _wrapped(provider)


_SERVICES: WeakValueDictionary[int, Service] = WeakValueDictionary()  # by the id of its provider, which it holds
_sharing = threading.Lock()


def _wrapped(provider: BaseProvider) -> AsyncLM:
    with _sharing:
        service = _SERVICES.get(id(provider))
        if service is None or not service.share():
            engine = ProviderEngine(provider)
            service = Service(engine, len(engine.pieces), batch_size=1, row_memo_bytes=ROW_MEMO_BYTES)
            _SERVICES[id(provider)] = service
    assert isinstance(service.engine, ProviderEngine)
    pieces, tokenizer = list(service.engine.pieces), _Tokenizer(provider)
    byte_vocab = [Token(i, piece.encode(), is_special=i == tokenizer.eos_token_id) for i, piece in enumerate(pieces)]
    n_ids = len(pieces)
    llm = AsyncLM(tokenizer, service, byte_vocab=byte_vocab, str_vocab=pieces, n_ids=n_ids, max_length=None)
    llm.clear_cache()  # what the provider says may have changed since it was wrapped before
    return llm


class _Tokenizer:
    """A provider in the form of a tokenizer."""

    def __init__(self, provider: BaseProvider) -> None:
        self._provider = provider
        self.eos_token_id = provider.get_eos_token_id()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(self._provider.encode(text, add_special_tokens))

    def decode(self, tokens: Sequence[int]) -> str:
        return self._provider.decode(list(tokens))
