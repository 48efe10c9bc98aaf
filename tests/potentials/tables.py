"""Potentials small enough to be written down: the weights of all texts up to a length, and a set of texts."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch

from genlm_backend.potentials import Constraint, Potential

Ids = tuple[int, ...]


class Table(Potential):
    """The weight of each text is written down; that of a prefix is the sum over its texts."""

    def __init__(self, weights: Mapping[Ids, float], n_tokens: int) -> None:
        self.n_tokens = n_tokens
        self.weights = dict(weights)

    def start(self) -> Any:
        return ()

    def extend(self, state: Any, token_id: int) -> Any:
        return (*state, token_id)

    def mass(self, prefix: Ids) -> float:
        return sum(weight for text, weight in self.weights.items() if text[: len(prefix)] == prefix)

    async def prefix(self, state: Any) -> float:
        return log(self.mass(state))

    async def complete(self, state: Any) -> float:
        return log(self.weights.get(state, 0.0))

    async def logw_next(self, state: Any) -> torch.Tensor:
        total = self.mass(state)
        if not total:
            return torch.full((self.n_tokens + 1,), -math.inf)
        after = [self.mass((*state, token)) for token in range(self.n_tokens)] + [self.weights.get(state, 0.0)]
        return torch.tensor([log(weight / total) for weight in after])


class Listed(Constraint):
    """A few texts, by their token ids."""

    def __init__(self, texts: Collection[Ids], n_tokens: int) -> None:
        self.n_tokens = n_tokens
        self.texts = set(texts)

    def start(self) -> Any:
        return ()

    def extend(self, state: Any, token_id: int) -> Any:
        return (*state, token_id)

    def is_alive(self, state: Any) -> bool:
        return any(text[: len(state)] == state for text in self.texts)

    def is_complete(self, state: Any) -> bool:
        return state in self.texts

    def mask(self, state: Any) -> np.ndarray:
        return np.array([self.is_alive((*state, token)) for token in range(self.n_tokens)] + [self.is_complete(state)])


def log(weight: float) -> float:
    return math.log(weight) if weight else -math.inf
