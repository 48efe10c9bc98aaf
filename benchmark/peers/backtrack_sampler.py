"""backtrack_sampler from PyPI with its AntiSlopStrategy: one walk after another, as it has no more."""

from __future__ import annotations

import importlib.metadata
import time

import torch
from backtrack_sampler import AntiSlopStrategy, BacktrackSampler
from backtrack_sampler.provider.transformers_provider import TransformersProvider
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmark.peers.walks import PHRASES, TOP_K
from benchmark.worker import Peer, Timing, serve
from benchmark.workloads import DTYPE, Workload


class Provider(TransformersProvider):
    def get_eos_token_id(self) -> int:
        return -1  # no walk ends earlier than the others


class Sampler(Peer):
    def __init__(self, model_path: str) -> None:
        model = AutoModelForCausalLM.from_pretrained(model_path, dtype=getattr(torch, DTYPE)).eval()
        model.generation_config.eos_token_id = None
        tokenizer = AutoTokenizer.from_pretrained(model_path)
        tokenizer.pad_token_id = 0
        self.provider = Provider(model, tokenizer, torch.device("cpu"))

    def clear(self) -> None:
        self.provider.reset()

    def run(self, workload: Workload) -> Timing:
        torch.manual_seed(workload.seed)
        prompt = self.provider.decode(workload.prompt_ids)
        started, n_tokens = time.perf_counter(), 0
        for _ in range(workload.n_particles):
            sampler = BacktrackSampler(self.provider, AntiSlopStrategy(self.provider, list(PHRASES)))
            n_tokens += sum(1 for _ in sampler.generate(prompt, max_new_tokens=workload.n_steps, top_k=TOP_K))
        total_s = time.perf_counter() - started
        return Timing(total_s, total_s, n_tokens)

    def version(self) -> str:
        return importlib.metadata.version("backtrack_sampler")


if __name__ == "__main__":
    serve(Sampler)
