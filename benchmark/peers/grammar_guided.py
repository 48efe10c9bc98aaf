"""This package's `aguide`, the function that users of the library beside it know; every text a coroutine."""

from __future__ import annotations

from benchmark.json_task import LOOKAHEAD, MAX_CORRECTIONS, TEMPERATURE, TOP_P
from benchmark.peers.grammar_walk import GrammarWalk
from benchmark.worker import serve
from benchmark.workloads import Workload
from genlm_backend.backtracking import aguide


class GrammarGuided(GrammarWalk):
    async def write(self, workload: Workload, index: int) -> str:
        result = await aguide(
            self.llm,
            self.parser,
            self.llm.tokenizer.decode(workload.prompt_ids),
            stop_at="```",
            max_grammar_corrections=MAX_CORRECTIONS,
            max_new_tokens=LOOKAHEAD,
            temperature=TEMPERATURE,
            top_p=TOP_P,
            save_html=False,
            seed=workload.seed * 1000 + index,
        )
        return result.response


if __name__ == "__main__":
    serve(GrammarGuided)
