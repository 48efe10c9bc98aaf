"""Distribution: what a walk draws its next token from: temperature and filters applied to a row or to its best tokens.

Draws are Gumbel-max with the noise of `sampling.draw`, keyed by (key, token id): a token that is removed, or a
support that is fetched in another way, changes the draw only where it must.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from genlm_backend import sampling
from genlm_backend.backtracking.overlay import Node
from genlm_backend.errors import InvalidQuery

Floats = npt.NDArray[np.floating[Any]]
Ids = npt.NDArray[np.int64]

_NUCLEUS = 256  # tokens among which the mass of top-p is sought first


class Filters(NamedTuple):
    """How a row becomes a distribution, in this order; None leaves a filter out.

    Attributes:
        temperature: Divides the log-probabilities; 0 takes the best token, and filters and rules see temperature 1.
        min_p: Keeps tokens at least so many times as probable as the best one.
        top_k: Keeps the most probable tokens; 1 is greedy like temperature 0.
        top_p: Keeps the fewest most probable tokens that reach this mass.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def check(self) -> Filters:
        """Itself, without filters that keep everything.

        Raises:
            InvalidQuery: A number is out of its range.
        """
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InvalidQuery(f"temperature is {self.temperature!r}; expected a finite number >= 0")
        if self.top_k is not None and (isinstance(self.top_k, bool) or int(self.top_k) != self.top_k or self.top_k < 0):
            raise InvalidQuery(f"top_k is {self.top_k!r}; expected 1 or more, or None or 0 for all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InvalidQuery(f"top_p is {self.top_p!r}; expected above 0 and at most 1, or None")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise InvalidQuery(f"min_p is {self.min_p!r}; expected 0 to 1, or None")
        is_greedy = self.temperature == 0 or self.top_k == 1
        return Filters(
            0.0 if is_greedy else float(self.temperature),
            int(self.top_k) if self.top_k and self.top_k > 1 else None,
            None if self.top_p == 1 else self.top_p,
            self.min_p or None,
        )

    @property
    def is_greedy(self) -> bool:
        """Whether the best token is taken instead of a draw."""
        return self.temperature == 0

    @property
    def divisor(self) -> float:
        """The temperature that filters and rules see."""
        return self.temperature or 1.0

    @property
    def truncates(self) -> bool:
        """Whether it leaves tokens out."""
        return self.top_k is not None or self.top_p is not None or self.min_p is not None


@dataclass(frozen=True, eq=False)
class Distribution:
    """Tokens and their log-probabilities, most probable first where `token_ids` are given.

    Attributes:
        token_ids: (n,) int64; None: every token, in the order of ids.
        logprobs: (n,) of the model, nats.
        log_q: (n,) after temperature and filters, normalised, nats.
        log_normalizer: The model's logits are `logprobs + log_normalizer`; None unless a rule sees them.
        row: (vocab,) float32, of the model; None unless a rule sees it.
    """

    token_ids: Ids | None
    logprobs: Floats
    log_q: Floats
    log_normalizer: float | None = None
    row: Floats | None = None

    @cached_property
    def _where(self) -> dict[int, int]:
        return {} if self.token_ids is None else {token_id: i for i, token_id in enumerate(self.token_ids.tolist())}

    def index(self, token_id: int) -> int | None:
        """The entry of a token; None if it cannot be drawn."""
        return token_id if self.token_ids is None else self._where.get(token_id)

    def rank(self, token_id: int) -> int:
        """How many tokens come before this one, from 0; all of them, if it cannot be drawn."""
        i = self.index(token_id)
        if i is None:
            return len(self.log_q)
        return i if self.token_ids is not None else int((self.log_q > self.log_q[i]).sum())

    @cached_property
    def probabilities(self) -> Floats:
        """(n,) `exp(log_q)`."""
        return np.exp(self.log_q)

    @cached_property
    def entropy(self) -> float:
        """Nats."""
        p = self.probabilities
        return float(-(p * np.where(p > 0, self.log_q, 0.0)).sum())

    def top(self, n: int) -> list[tuple[int, float]]:
        """The most probable tokens and their probabilities, fewer than n where fewer can be drawn."""
        order = np.argsort(-self.log_q, kind="stable")[:n]
        ids = order if self.token_ids is None else self.token_ids[order]
        pairs = zip(ids.tolist(), self.probabilities[order].tolist(), strict=True)
        return [(token_id, p) for token_id, p in pairs if p > 0]

    @property
    def log_tempered(self) -> Floats:
        """(n,) the model's logits divided by the temperature where they are known, else `log_q`: a constant apart."""
        return self.log_q if self._logits is None else self._logits

    _logits: Floats | None = None


def from_best(token_ids: Ids, logprobs: Floats, filters: Filters, log_normalizer: float | None = None) -> Distribution:
    """The distribution from a row's `top_k` best tokens.

    Args:
        token_ids: (k,) most probable first.
        logprobs: (k,) of the model.
        filters: Among which top-k, already applied.
        log_normalizer: For rules that see logits.
    """
    scaled = logprobs.astype(np.float64)
    if filters.divisor != 1.0:
        scaled /= filters.divisor
    logits = None if log_normalizer is None else (logprobs.astype(np.float64) + log_normalizer) / filters.divisor
    if filters.min_p is None and filters.top_p is None:
        return Distribution(token_ids, logprobs, _normalised(scaled), log_normalizer, _logits=logits)
    n = _n_kept(scaled, filters)
    if logits is not None:
        logits = logits[:n]
    return Distribution(token_ids[:n], logprobs[:n], _normalised(scaled[:n]), log_normalizer, _logits=logits)


def from_row(
    row: Floats, scaled: Floats, filters: Filters, log_normalizer: float | None = None, keep_row: bool = False
) -> Distribution:
    """The distribution from a whole row.

    Args:
        row: (vocab,) of the model.
        scaled: (vocab,) the same after temperature and whatever reshapes it before the filters.
        filters: Applied to `scaled`.
        log_normalizer: For rules that see logits.
        keep_row: For rules that see the row.
    """
    kept = row if keep_row else None
    if not filters.truncates:
        logits = None if log_normalizer is None else (row.astype(np.float64) + log_normalizer) / filters.divisor
        return Distribution(None, row, _normalised(scaled), log_normalizer, kept, logits)
    if filters.top_p is not None and filters.top_k is None and filters.min_p is None:
        token_ids, filters = _nucleus(scaled, filters.top_p), Filters()
    else:
        token_ids = _best(scaled, filters)
    best = from_best(token_ids, scaled[token_ids], filters._replace(temperature=1.0))
    assert best.token_ids is not None
    logprobs = row[best.token_ids]
    logits = None if log_normalizer is None else (logprobs.astype(np.float64) + log_normalizer) / filters.divisor
    return Distribution(best.token_ids, logprobs, best.log_q, log_normalizer, kept, logits)


def scaled_row(row: Floats, filters: Filters) -> Floats:
    """(vocab,) the row after temperature; the row itself at temperature 1."""
    return row if filters.divisor == 1.0 else row / np.float32(filters.divisor)


def alive_scores(dist: Distribution, node: Node, mask: npt.NDArray[np.bool_] | None) -> tuple[Floats, float]:
    """What is left of a distribution, (n,) unnormalised nats, and the log of its total; -inf if nothing is.

    Args:
        dist: Not changed.
        node: What was removed at its prefix.
        mask: (vocab,) bool, tokens to leave in; None is all.
    """
    if node.is_whole and mask is None:
        return dist.log_q, 0.0
    scores = dist.log_q.copy()
    if node.gone is not None:
        scores[_of(dist, node.gone)] = -math.inf
    if mask is not None:
        scores[~_of(dist, mask)] = -math.inf
    for token_id, child in node.children.items():
        i = dist.index(token_id)
        if i is not None:
            scores[i] += math.log(child.alive) if child.alive > 0 else -math.inf
    top = float(scores.max())
    if top == -math.inf:
        return scores, top
    return scores, top + math.log(float(np.exp(scores - top).sum(dtype=np.float64)))


def _of(dist: Distribution, mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    return mask if dist.token_ids is None else mask[dist.token_ids]


def reweighed(dist: Distribution, row: Floats, reweigh: Callable[[Floats], Floats]) -> Distribution:
    """The distribution after a rule has changed its filtered log-probabilities, which it may also give to others.

    Args:
        dist: Of some tokens, or of all.
        row: (vocab,) of the model.
        reweigh: From a (vocab,) float32 row to another, normalised or not.
    """
    q = np.full(len(row), -math.inf, np.float32)
    q[slice(None) if dist.token_ids is None else dist.token_ids] = dist.log_q
    q = _normalised(reweigh(q).astype(np.float64))
    found = np.flatnonzero(q > -math.inf)
    token_ids: Ids = found[np.lexsort((found, -q[found]))].astype(np.int64)
    return replace(dist, token_ids=token_ids, logprobs=row[token_ids], log_q=q[token_ids], _logits=None)


def draw(dist: Distribution, log_scores: Floats, key: int | None) -> int | None:
    """The entry of one token, with probability proportional to `exp(log_scores)`; None if none is possible.

    Args:
        dist: Whose tokens the scores are for.
        log_scores: (n,) nats, normalised or not.
        key: From `sampling.draw_key`; None takes the highest score, lowest id or highest rank among equals.
    """
    if key is None:
        i = int(log_scores.argmax())
        return i if log_scores[i] > -math.inf else None
    if dist.token_ids is None:
        row = torch.from_numpy(np.ascontiguousarray(log_scores, np.float32))
        i = int(sampling.draw(row[None], [key])[0])
    else:
        i = int(sampling.draw_among(dist.token_ids[None], log_scores[None].astype(np.float64, copy=False), [key])[0])
    return i if i >= 0 else None


def _best(scaled: Floats, filters: Filters) -> Ids:
    """Ids of the tokens that the filters may keep, most probable first."""
    n = len(scaled)
    k = n if filters.top_k is None else min(filters.top_k, n)
    if filters.top_k is None and filters.min_p is not None:
        found = np.flatnonzero(scaled >= scaled.max() + math.log(filters.min_p))
    elif k < n:
        found = np.flatnonzero(scaled >= np.partition(scaled, n - k)[n - k])  # of equals at the border, the lowest ids
    else:
        found = np.arange(n)
    ordered: Ids = found[np.lexsort((found, -scaled[found]))].astype(np.int64)
    return ordered if filters.top_k is None else ordered[:k]


def _nucleus(scaled: Floats, top_p: float) -> Ids:
    """Ids of the fewest most probable tokens that reach a mass, most probable first; without sorting all of them."""
    masses = np.exp(scaled - scaled.max(), dtype=np.float64)
    needed = top_p * float(masses.sum())
    n, k = len(scaled), _NUCLEUS
    while k < n:
        found = np.flatnonzero(scaled >= np.partition(scaled, n - k)[n - k])  # all of those that are equal
        if masses[found].sum() > needed:
            break
        k *= 8
    else:
        found = np.arange(n)
    ordered: Ids = found[np.lexsort((found, -scaled[found]))].astype(np.int64)
    before = np.cumsum(masses[ordered]) - masses[ordered]
    return ordered[: max(1, int((before < needed).sum()))]


def _n_kept(scaled: Floats, filters: Filters) -> int:
    """How many of the tokens, most probable first, min-p and top-p keep."""
    n = len(scaled)
    if filters.min_p is not None:
        n = int(np.searchsorted(-scaled, -(scaled[0] + math.log(filters.min_p)), side="right"))
    if filters.top_p is not None:
        masses = np.exp(_normalised(scaled[:n]))
        n = int((np.cumsum(masses) - masses < filters.top_p).sum())
    return max(n, 1)


def _normalised(scaled: Floats) -> Floats:
    top = scaled.max()
    if top == -math.inf:
        return scaled
    total = float(top) + math.log(float(np.exp(scaled - top).sum(dtype=np.float64)))
    return scaled - scaled.dtype.type(total)
