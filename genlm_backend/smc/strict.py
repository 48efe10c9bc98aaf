"""Strict rows: each computed alone, from nothing, with one thread, so that its bits depend on its context only.

Matrix products add up in another order when more rows are computed together, when a prefix is taken from a cache, or
with another number of threads; float32 rows then differ by up to 2e-5 nats. Draws keyed by particle and step hardly
ever notice. Where "hardly ever" is not enough, pay for strict rows: no batch, no cache.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from genlm_backend.llm.base import AsyncLM
from genlm_backend.llm.service import Context, Engine, EngineCounts

_LOCK = threading.Lock()


@contextmanager
def strict(llm: AsyncLM) -> Iterator[AsyncLM]:
    """Within this block, rows of this model are the same bits whatever else is asked, in any order, at any time.

    Everything asked of the model meanwhile is strict, also by others; what it remembered is forgotten at both ends.
    Blocks may overlap: the model is strict until the last one ends.
    """
    service = llm._service
    with _LOCK:
        if not isinstance(service.engine, StrictEngine):
            service.engine = StrictEngine(service.engine)
            service.memo.clear()
        engine = service.engine
        engine.n_blocks += 1
    try:
        yield llm
    finally:
        with _LOCK:
            engine.n_blocks -= 1
            if not engine.n_blocks:
                service.engine = engine.plain
                service.memo.clear()
                engine.plain.clear_kv()


class StrictEngine(Engine):
    """An engine that computes each context alone, in one thread, without anything computed before.

    Attributes:
        plain: The engine that computes.
        n_blocks: How many `strict` blocks need it.
    """

    def __init__(self, engine: Engine) -> None:
        self.plain = engine
        self.n_blocks = 0

    def evaluate(self, contexts: Sequence[Context]) -> torch.Tensor:
        n_threads = torch.get_num_threads()
        torch.set_num_threads(1)  # of the engine's thread, which this runs in
        try:
            return torch.cat([self._alone(context) for context in contexts])
        finally:
            torch.set_num_threads(n_threads)

    def counts(self) -> EngineCounts:
        return self.plain.counts()

    def clear_kv(self) -> None:
        self.plain.clear_kv()

    def reset(self) -> None:
        self.plain.reset()

    def close(self) -> None:
        self.plain.close()

    def _alone(self, context: Context) -> torch.Tensor:
        self.plain.clear_kv()
        return self.plain.evaluate([context]).clone()
