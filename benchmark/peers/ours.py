"""This package, its own best way: each particle asks for a drawn token, `llm.query(ids, Draw(key))`."""

from __future__ import annotations

import asyncio
import time

import genlm_backend
from benchmark.worker import Peer, Timing, grow, serve
from benchmark.workloads import DTYPE, Workload
from genlm_backend.llm import Draw
from genlm_backend.sampling import draw_key


class Ours(Peer):
    def __init__(self, model_path: str) -> None:
        self.llm = genlm_backend.load_model_by_name(
            model_path, backend="hf", llm_opts={"device": "cpu", "hf_opts": {"dtype": DTYPE}}
        )

    def clear(self) -> None:
        self.llm.clear_cache()

    def run(self, workload: Workload) -> Timing:
        return asyncio.run(self._run(workload))

    async def _run(self, workload: Workload) -> Timing:
        before, started = self.llm.statistics(), time.perf_counter()
        first, end, n_tokens = await self.grow(workload)
        after = self.llm.statistics()
        counts = {
            "forwards": after.forwards - before.forwards,
            "tokens_computed": after.tokens_computed - before.tokens_computed,
            "kv_bytes": after.kv_bytes,
        }
        return Timing(first - started, end - started, n_tokens, self.draw_s(), counts)

    async def grow(self, workload: Workload) -> tuple[float, float, int]:
        async def next_token(index: int, step: int, ids: list[int]) -> int:
            return (await self.llm.query(ids, Draw(draw_key(workload.seed, (index,), step)))).token_id

        return await grow(workload, next_token)

    def version(self) -> str:
        return genlm_backend.__version__

    def draw_s(self) -> float | None:
        return None


if __name__ == "__main__":
    serve(Ours)
