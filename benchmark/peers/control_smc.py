"""genlm-control's SMC with genlm-backend, both from PyPI: one run, told as one line of JSON.

Arguments: model folder, workload, particles, seed.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

import numpy as np
import torch
from genlm.backend import load_model_by_name
from genlm.control import AWRS, BoolFSA, JsonSchema, PromptedLLM

from benchmark.smc_workloads import ESS_THRESHOLD, MAX_TOKENS, PROMPTS, REGEX, SCHEMA


async def main(folder: str, workload: str, n_particles: int, seed: int) -> None:
    np.random.seed(seed)  # noqa: NPY002  (the peer resamples with the global generator)
    torch.manual_seed(seed)
    backend = load_model_by_name(folder, backend="hf", llm_opts={"timeout": 0.001, "batch_size": n_particles})
    prompted = PromptedLLM(backend)
    prompted.set_prompt_from_str(PROMPTS[workload])
    potential = BoolFSA.from_regex(REGEX) if workload == "regex" else JsonSchema(SCHEMA)
    sampler = AWRS(prompted, potential.coerce(prompted, f=b"".join), seed=seed)
    await prompted.logw_next([])  # what is loaded at the first use is not timed
    backend.clear_cache()
    started = time.perf_counter()
    sequences = await sampler.smc(n_particles=n_particles, ess_threshold=ESS_THRESHOLD, max_tokens=MAX_TOKENS[workload])
    seconds = time.perf_counter() - started
    counts = []
    for context, log_weight in zip(sequences.contexts, sequences.log_weights, strict=True):
        is_complete = len(context) > 0 and not isinstance(context[-1], bytes)  # the end is an object of its own
        if log_weight > -np.inf and is_complete:
            counts.append(len(context) - 1)
    all_tokens = sum(len(context) for context in sequences.contexts)
    print(json.dumps({"seconds": seconds, "complete": len(counts), "tokens": sum(counts), "all_tokens": all_tokens}))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
