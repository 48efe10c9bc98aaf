"""backtracking-llm from PyPI: one walk after another, as it has no more."""

from __future__ import annotations

import importlib.metadata
import time

import torch
from backtracking_llm.decision import ProbabilityThreshold
from backtracking_llm.generation import GenerationSession
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from benchmark.peers.walks import MIN_PROBABILITY, TOP_K
from benchmark.worker import Peer, Timing, serve
from benchmark.workloads import DTYPE, Workload


class BacktrackingLlm(Peer):
    def __init__(self, model_path: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model_path, torch_dtype=getattr(torch, DTYPE)).eval()
        # The folder was written by transformers 5, whose tokenizer class transformers 4 does not know by name.
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(model_path)
        self.tokenizer.eos_token = None  # no walk ends earlier than the others

    def clear(self) -> None:
        pass  # nothing is kept from one call to the next

    def run(self, workload: Workload) -> Timing:
        torch.manual_seed(workload.seed)
        prompt = self.tokenizer.decode(workload.prompt_ids)
        started, n_tokens = time.perf_counter(), 0
        for _ in range(workload.n_particles):
            session = GenerationSession(
                self.model,
                self.tokenizer,
                prompt,
                ProbabilityThreshold(MIN_PROBABILITY),
                max_new_tokens=workload.n_steps,
                top_k=TOP_K,
            )
            while not session.done:
                result = session.step()
                if result.backtrack_count > 0:
                    session.backtrack(result.backtrack_count)
            n_tokens += session.generated_token_count
        total_s = time.perf_counter() - started
        return Timing(total_s, total_s, n_tokens)

    def version(self) -> str:
        return importlib.metadata.version("backtracking-llm")


if __name__ == "__main__":
    serve(BacktrackingLlm)
