"""This package, asked for whole rows; each particle draws from its own with `torch.multinomial`."""

from __future__ import annotations

import time

import torch

from benchmark.peers.ours import Ours
from benchmark.worker import grow, serve
from benchmark.workloads import Workload


class OursRows(Ours):
    async def grow(self, workload: Workload) -> tuple[float, float, int]:
        self._draw_s = 0.0
        torch.manual_seed(workload.seed)

        async def next_token(index: int, step: int, ids: list[int]) -> int:
            row = await self.llm.next_token_logprobs(ids)
            started = time.perf_counter()
            token_id = int(torch.multinomial(row.exp(), 1))
            self._draw_s += time.perf_counter() - started
            return token_id

        return await grow(workload, next_token)

    def draw_s(self) -> float | None:
        return self._draw_s


if __name__ == "__main__":
    serve(OursRows)
