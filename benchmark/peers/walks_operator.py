"""This package with an operator: `Generator.agenerate`, every walk a coroutine."""

from __future__ import annotations

import asyncio
import time

import genlm_backend
from benchmark.peers.walks import MIN_PROBABILITY, TOP_K
from benchmark.worker import Peer, Timing, serve
from benchmark.workloads import DTYPE, Workload
from genlm_backend.backtracking import Generator, ProbabilityThreshold


class WalksOperator(Peer):
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
        walks = (self.walk(workload, i) for i in range(workload.n_particles))
        outcomes = await asyncio.gather(*walks)
        end, after = time.perf_counter(), self.llm.statistics()
        counts = {
            "forwards": after.forwards - before.forwards,
            "tokens_computed": after.tokens_computed - before.tokens_computed,
            "drawn": sum(outcome.n_draws for outcome in outcomes),
            "rollbacks": sum(outcome.n_undos for outcome in outcomes),
        }
        return Timing(end - started, end - started, sum(len(o.token_ids) for o in outcomes), None, counts)

    async def walk(self, workload: Workload, index: int):
        return await Generator(self.llm).arun(
            workload.prompt_ids,
            ProbabilityThreshold(MIN_PROBABILITY),
            max_new_tokens=workload.n_steps,
            top_k=TOP_K,
            eos=(),
            seed=workload.seed,
            lineage=(index,),
        )

    def version(self) -> str:
        return genlm_backend.__version__


if __name__ == "__main__":
    serve(WalksOperator)
