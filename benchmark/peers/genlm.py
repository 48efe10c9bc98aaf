"""genlm-backend from PyPI at its best: batches of exactly the particles, `cache_kv` where the prompt is long.

A batch is full as soon as every particle has asked, so its timeout never passes. Each particle draws from its row with
`torch.multinomial`, as the library's own `sample` does.
"""

from __future__ import annotations

import asyncio
import time

import torch
from genlm.backend import load_model_by_name

from benchmark.worker import Peer, Timing, grow, installed_version, serve
from benchmark.workloads import DTYPE, Workload

LONG_PROMPT = 16  # tokens; for 3 tokens `cache_kv` costs more than it saves


class Genlm(Peer):
    def __init__(self, model_path: str) -> None:
        self.llm = load_model_by_name(
            model_path, backend="hf", llm_opts={"timeout": 0.001, "hf_opts": {"torch_dtype": DTYPE}}
        )

    def clear(self) -> None:
        self.llm.clear_cache()

    def run(self, workload: Workload) -> Timing:
        return asyncio.run(self._run(workload))

    async def _run(self, workload: Workload) -> Timing:
        self.llm.batch_size = workload.n_particles
        torch.manual_seed(workload.seed)
        draw_s = 0.0

        async def next_token(index: int, step: int, ids: list[int]) -> int:
            nonlocal draw_s
            row = await self.llm.next_token_logprobs(list(ids))
            drawing = time.perf_counter()
            token_id = int(torch.multinomial(row.exp(), 1))
            draw_s += time.perf_counter() - drawing
            return token_id

        started = time.perf_counter()
        if len(workload.prompt_ids) >= LONG_PROMPT:
            self.llm.cache_kv(workload.prompt_ids)
        first, end, n_tokens = await grow(workload, next_token)
        return Timing(first - started, end - started, n_tokens, draw_s)

    def version(self) -> str:
        return installed_version("genlm-backend")


if __name__ == "__main__":
    serve(Genlm)
