"""Strict rows: each computed alone, from nothing, with one thread, so that its bits depend on its context only.

Matrix products add up in another order when more rows are computed together, when a prefix is taken from a cache, or
with another number of threads; float32 rows then differ by up to 2e-5 nats. Draws keyed by particle and step hardly
ever notice. Where "hardly ever" is not enough, pay for strict rows: no batch, no cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from genlm_backend.llm.base import AsyncLM
from genlm_backend.llm.service import Context, Engine, EngineCounts


@contextmanager
def strict(llm: AsyncLM) -> Iterator[AsyncLM]:
    """Within this block, rows of this model are the same bits whatever else is asked, in any order, at any time.

    Everything asked of the model meanwhile is strict, also by others; what it remembered is forgotten at both ends.
    """
    service = llm._service
    engine = service.engine
    service.engine = StrictEngine(engine)
    service.memo.clear()
    try:
        yield llm
    finally:
        service.engine = engine
        service.memo.clear()
        engine.clear_kv()


class StrictEngine(Engine):
    """An engine that computes each context alone, in one thread, without anything computed before."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def evaluate(self, contexts: Sequence[Context]) -> torch.Tensor:
        n_threads = torch.get_num_threads()
        torch.set_num_threads(1)  # of the engine's thread, which this runs in
        try:
            return torch.cat([self._alone(context) for context in contexts])
        finally:
            torch.set_num_threads(n_threads)

    def counts(self) -> EngineCounts:
        return self._engine.counts()

    def clear_kv(self) -> None:
        self._engine.clear_kv()

    def reset(self) -> None:
        self._engine.reset()

    def close(self) -> None:
        self._engine.close()

    def _alone(self, context: Context) -> torch.Tensor:
        self._engine.clear_kv()
        return self._engine.evaluate([context]).clone()
