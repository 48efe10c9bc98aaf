"""Small distributions for programs; whatever has `draw(key)` and `logprob(value)` is one.

`Row` is a row of log-probabilities, `Categorical` has values of its own; both can be enumerated.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from genlm_backend import sampling
from genlm_backend.errors import InvalidProgram


@runtime_checkable
class Distribution(Protocol):
    """What `ctx.sample` draws from and `ctx.observe` weighs by."""

    def draw(self, key: int) -> Any:
        """A value; a pure function of the key."""

    def logprob(self, value: Any) -> float:
        """Its log-probability (or log-density), nats."""


@runtime_checkable
class Enumerable(Distribution, Protocol):
    """A distribution over few values, which beam search and exact enumeration can list."""

    def support(self) -> Sequence[Any]:
        """All values of positive probability, each once."""


class Bernoulli(NamedTuple):
    """True with probability `p`, else False."""

    p: float

    def draw(self, key: int) -> bool:
        return _uniform(key) < self.p

    def logprob(self, value: bool) -> float:
        return _log(self.p if value else 1.0 - self.p)

    def support(self) -> list[bool]:
        return [value for value in (True, False) if self.logprob(value) > -math.inf]


class Categorical(NamedTuple):
    """One of `values`, with probabilities in proportion to `weights`."""

    values: Sequence[Hashable]
    weights: Sequence[float]

    def draw(self, key: int) -> Any:
        logprobs = torch.tensor([_log(weight) for weight in self.weights], dtype=torch.float64)
        (index,) = sampling.draw(logprobs[None], [key]).tolist()
        if index < 0:
            raise InvalidProgram("a Categorical whose weights are all zero", "give at least one positive weight")
        return self.values[index]

    def logprob(self, value: Hashable) -> float:
        share = math.fsum(w for v, w in zip(self.values, self.weights, strict=True) if v == value)
        return _log(share / math.fsum(self.weights))

    def support(self) -> list[Hashable]:
        weighed = zip(self.values, self.weights, strict=True)
        return list(dict.fromkeys(value for value, weight in weighed if weight > 0))


class Geometric(NamedTuple):
    """0, 1, 2, ...: the failures before the first success, each trial succeeding with probability `p`."""

    p: float

    def draw(self, key: int) -> int:
        if self.p >= 1.0:
            return 0
        return int(math.log1p(-_uniform(key)) // math.log1p(-self.p))

    def logprob(self, value: int) -> float:
        if value < 0 or (self.p >= 1.0 and value > 0):
            return -math.inf
        return _log(self.p) + (value * math.log1p(-self.p) if value else 0.0)


class Normal(NamedTuple):
    """A real number with mean and standard deviation."""

    mean: float = 0.0
    deviation: float = 1.0

    def draw(self, key: int) -> float:
        rng = np.random.Generator(np.random.PCG64(key))
        return float(self.mean + self.deviation * rng.standard_normal())

    def logprob(self, value: float) -> float:
        z = (value - self.mean) / self.deviation
        return -0.5 * z * z - math.log(self.deviation) - 0.5 * math.log(2 * math.pi)


LogRow = torch.Tensor | npt.NDArray[np.floating[Any]]


def as_row(row: LogRow) -> torch.Tensor:
    """A row of log-probabilities as a tensor, without a copy.

    Raises:
        InvalidProgram: It is not one-dimensional and float.
    """
    tensor = row if isinstance(row, torch.Tensor) else torch.as_tensor(np.ascontiguousarray(row))
    if tensor.ndim != 1 or not tensor.is_floating_point():
        raise InvalidProgram(
            f"a row of log-probabilities is {tensor.dtype} of shape {tuple(tensor.shape)}",
            "expected floats of shape (vocab,)",
        )
    return tensor


def _uniform(key: int) -> float:
    return (key >> 11) * 2.0**-53


def _log(p: float) -> float:
    return math.log(p) if p > 0.0 else -math.inf
