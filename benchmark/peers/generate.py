"""transformers' `generate`: one static batch of equal prompts, its own sampler, no library above it."""

from __future__ import annotations

import time

import torch
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from benchmark.worker import Peer, Timing, serve
from benchmark.workloads import DTYPE, Workload


class Generate(Peer):
    def __init__(self, model_path: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(
            model_path, dtype=getattr(torch, DTYPE), use_safetensors=True
        ).eval()

    def clear(self) -> None:
        pass  # nothing is kept from one call to the next

    def run(self, workload: Workload) -> Timing:
        torch.manual_seed(workload.seed)
        first = _FirstToken()
        started = time.perf_counter()
        prompts = torch.tensor([workload.prompt_ids] * workload.n_particles)
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=True,  # from the whole distribution, as everyone here
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                min_new_tokens=workload.n_steps,
                max_new_tokens=workload.n_steps,
                stopping_criteria=StoppingCriteriaList([first]),
            )
        end = time.perf_counter()
        n_tokens = workload.n_particles * (out.shape[1] - prompts.shape[1])
        return Timing(first.at - started, end - started, n_tokens)


class _FirstToken(StoppingCriteria):
    """Stops nothing; notes when the first tokens were there."""

    at = 0.0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        self.at = self.at or time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


if __name__ == "__main__":
    serve(Generate)
