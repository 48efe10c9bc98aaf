"""This package with banned phrases: `walk` under `phrases`, every walk a coroutine."""

from __future__ import annotations

from benchmark.peers.walks import PHRASES, TOP_K
from benchmark.peers.walks_operator import WalksOperator
from benchmark.worker import serve
from benchmark.workloads import Workload
from genlm_backend.backtracking import phrases, walk


class WalksPhrases(WalksOperator):
    async def walk(self, workload: Workload, index: int):
        return await walk(
            self.llm,
            workload.prompt_ids,
            phrases(PHRASES),
            max_new_tokens=workload.n_steps,
            top_k=TOP_K,
            eos=(),
            seed=workload.seed,
            lineage=(index,),
        )


if __name__ == "__main__":
    serve(WalksPhrases)
