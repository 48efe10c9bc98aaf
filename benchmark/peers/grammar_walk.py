"""This package at its best: `walk` under a `GrammarRule` in mode `mask` with guesses, every text a coroutine."""

from __future__ import annotations

import asyncio
import time

import genlm_backend
from benchmark.json_task import BOUNDED_LARK, LARK, TEMPERATURE, TOP_P
from benchmark.worker import Peer, Timing, serve
from benchmark.workloads import DTYPE, Workload
from genlm_backend.backtracking import GrammarRule, load_parser, walk
from genlm_backend.potentials import Grammar


class GrammarWalk(Peer):
    speculate = 8

    def __init__(self, model_path: str) -> None:
        self.llm = genlm_backend.load_model_by_name(
            model_path, backend="hf", llm_opts={"device": "cpu", "hf_opts": {"dtype": DTYPE}}
        )
        self.parser = load_parser(LARK)
        self.constraint = Grammar.lark(self.llm, BOUNDED_LARK)

    def clear(self) -> None:
        self.llm.clear_cache()

    def run(self, workload: Workload) -> Timing:
        return asyncio.run(self._run(workload))

    async def _run(self, workload: Workload) -> Timing:
        before, started = self.llm.statistics(), time.perf_counter()
        texts = await asyncio.gather(*(self._within_limit(workload, i) for i in range(workload.n_particles)))
        total_s, after = time.perf_counter() - started, self.llm.statistics()
        n_tokens = sum(len(self.llm.tokenizer.encode(text)) for text in texts)
        counts = {
            "forwards": after.forwards - before.forwards,
            "tokens_computed": after.tokens_computed - before.tokens_computed,
        }
        return Timing(total_s, total_s, n_tokens, None, counts, list(texts))

    async def _within_limit(self, workload: Workload, index: int) -> str:
        """A text, or "" if it is not finished in time: of ours, what is unfinished does not count."""
        try:
            async with asyncio.timeout(workload.limit_s):
                return await self.write(workload, index)
        except TimeoutError:
            return ""

    async def write(self, workload: Workload, index: int) -> str:
        outcome = await walk(
            self.llm,
            workload.prompt_ids,
            [GrammarRule(self.constraint)],
            mode="mask",
            max_new_tokens=workload.n_steps,
            temperature=TEMPERATURE,
            top_p=TOP_P,
            seed=workload.seed,
            lineage=(index,),
            speculate=self.speculate,
        )
        return outcome.text

    def version(self) -> str:
        return genlm_backend.__version__


if __name__ == "__main__":
    serve(GrammarWalk)
