"""genlm-control's SMC with genlm-backend, both from PyPI: one run, told as one line of JSON.

Arguments: model folder, workload, particles, seed, most seconds to run, threads.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import numpy as np
import torch
from genlm.backend import load_model_by_name
from genlm.control import AWRS, BoolFSA, JsonSchema, PromptedLLM

from benchmark.smc_workloads import ESS_THRESHOLD, MAX_TOKENS, PROMPTS, REGEXES, SCHEMA
from benchmark.worker import installed_version
from benchmark.workloads import DTYPE

n_sampled = 0


class Counted(AWRS):  # type: ignore[misc]
    """Counts the tokens drawn, so that a run that does not end can be told apart from one that stands still."""

    async def sample(self, *args: Any, **kwargs: Any) -> Any:
        global n_sampled
        drawn = await super().sample(*args, **kwargs)
        n_sampled += 1
        return drawn


async def main(folder: str, workload: str, n_particles: int, seed: int, limit_s: float) -> None:
    np.random.seed(seed)  # noqa: NPY002  (the peer resamples with the global generator)
    torch.manual_seed(seed)
    options = {"timeout": 0.001, "batch_size": n_particles, "hf_opts": {"torch_dtype": DTYPE}}
    backend = load_model_by_name(folder, backend="hf", llm_opts=options)
    prompted = PromptedLLM(backend)
    prompted.set_prompt_from_str(PROMPTS[workload])
    potential = BoolFSA.from_regex(REGEXES[workload]) if workload in REGEXES else JsonSchema(SCHEMA)
    sampler = Counted(prompted, potential.coerce(prompted, f=b"".join), seed=seed)
    await prompted.logw_next([])  # what is loaded at the first use is not timed
    backend.clear_cache()
    most = MAX_TOKENS + 1  # it counts the end
    running = sampler.smc(n_particles=n_particles, ess_threshold=ESS_THRESHOLD, max_tokens=most)
    started = time.perf_counter()
    found: dict[str, Any] = {}
    try:
        sequences = await asyncio.wait_for(running, limit_s)
        counts, different = [], set()
        for context, log_weight in zip(sequences.contexts, sequences.log_weights, strict=True):
            is_complete = len(context) > 0 and not isinstance(context[-1], bytes)  # the end is an object of its own
            if log_weight > -np.inf and is_complete:
                counts.append(len(context) - 1)
                different.add(tuple(context[:-1]))
        found = {"complete": len(counts), "different": len(different), "tokens": sum(counts)}
    except TimeoutError:
        pass
    found |= {"seconds": time.perf_counter() - started, "sampled": n_sampled}
    names = ("genlm-control", "genlm-backend", "torch", "transformers")
    found["versions"] = {name: installed_version(name) for name in names}
    print(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[6]))
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5])))
