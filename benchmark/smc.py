"""Constrained sequential Monte Carlo beside genlm-control: particle-tokens per second, and our own overhead.

    python -m benchmark.smc                       # all of it, in one run; results in .cache/benchmark/smc.json
    python -m benchmark.smc --particles 10 --only regex --ours

A particle-token is a token of a particle that is alive and complete at the end. Each library runs in its own process,
after loading and one warm-up question, on the same model and the same number of threads.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmark.environments import CACHE, ROOT, PeerUnavailable, make_environment
from benchmark.smc_workloads import ESS_THRESHOLD, MAX_TOKENS, PROMPTS, REGEX, SCHEMA

LIMIT_S = 900


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--particles", type=int, nargs="+", default=[10, 50])
    parser.add_argument("--only", choices=["regex", "json"], nargs="+", default=["regex", "json"])
    parser.add_argument("--ours", action="store_true", help="leave the peer out")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer-python", type=Path, help="an environment made from requirements/ecosystem.txt")
    arguments = parser.parse_args()
    rows = []
    for workload in arguments.only:
        for n in arguments.particles:
            found = asyncio.run(measure_ours(workload, n, arguments.repeats))
            rows.append({"library": "ours", "workload": workload, "particles": n, **found})
            report(rows[-1])
            if not arguments.ours:
                found = measure_peer(workload, n, arguments.peer_python)
                rows.append({"library": "genlm-control 0.4.1", "workload": workload, "particles": n, **found})
                report(rows[-1])
    CACHE.mkdir(parents=True, exist_ok=True)
    machine = {"processor": platform.processor() or platform.machine(), "cpus": os.cpu_count()}
    machine["load"] = os.getloadavg()[0]
    (CACHE / "smc.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))


async def measure_ours(workload: str, n: int, repeats: int) -> dict[str, Any]:
    """The run of median duration of several, each with another seed; caches are empty at its start."""
    from genlm_backend import load_model_by_name, sampling
    from genlm_backend.potentials import Grammar, LanguageModel, Product
    from genlm_backend.smc import sequences, smc

    sampling.prepare()
    async with load_model_by_name("smollm2") as llm:
        grammar = (
            Grammar.regex(llm, REGEX) if workload == "regex" else Grammar.json_schema(llm, SCHEMA, whitespace=False)
        )
        model = sequences(Product(LanguageModel(llm, PROMPTS[workload]), grammar), max_tokens=MAX_TOKENS[workload])
        forward = Stopwatch(llm._service.engine)
        llm._service.engine = forward
        await smc(model, 2, seed=99, max_steps=3)
        runs = []
        for seed in range(repeats):
            llm.clear_cache()
            forward.seconds = 0.0
            started = time.perf_counter()
            result = await smc(model, n, seed=seed, ess_threshold=ESS_THRESHOLD, on_failure="mark")
            seconds = time.perf_counter() - started
            alive = [p for p, w in zip(result.paths, result.log_weights, strict=True) if w > -math.inf]
            tokens = sum(sum(choice != len(llm.byte_vocab) for choice in path.choices) for path in alive)
            runs.append(
                {
                    "seconds": seconds,
                    "complete": len(alive),
                    "tokens": tokens,
                    "all_tokens": sum(step.statuses.count("r") for step in result.steps),
                    "overhead": 1.0 - forward.seconds / seconds,
                    "log_evidence": result.log_evidence,
                }
            )
        llm._service.engine = forward.engine
    return sorted(runs, key=lambda run: run["seconds"])[len(runs) // 2]


class Stopwatch:
    """An engine that says how long it worked."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.seconds = engine, 0.0

    def evaluate(self, contexts: Any) -> Any:
        started = time.perf_counter()
        try:
            return self.engine.evaluate(contexts)
        finally:
            self.seconds += time.perf_counter() - started

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


def measure_peer(workload: str, n: int, python: Path | None) -> dict[str, Any]:
    """One run; or why there is none."""
    from genlm_backend.llm.demo_model import demo_model_path

    try:
        if python is None:
            lines = (ROOT / "requirements" / "ecosystem.txt").read_text().splitlines()
            pins = [line for line in lines if line and not line.startswith("#")]
            python = make_environment("ecosystem", [["torch==2.13.0"], pins], print)
        command = [str(python), "-m", "benchmark.peers.control_smc", str(demo_model_path()), workload, str(n), "0"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False, cwd=ROOT)
    except PeerUnavailable as error:
        return {"failed": str(error)}
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {LIMIT_S} s"}
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def report(row: dict[str, Any]) -> None:
    head = f"{row['library']:20} {row['workload']:6} {row['particles']:3} particles: "
    if "failed" in row:
        print(head + row["failed"], file=sys.stderr)
        return
    speed = row["tokens"] / row["seconds"]
    overhead = f", own overhead {row['overhead']:.1%}" if "overhead" in row else ""
    print(
        f"{head}{speed:8.1f} particle-tokens/s, {row['seconds']:7.2f} s, {row['complete']} alive and complete, "
        f"{row['all_tokens'] / row['seconds']:.1f} tokens/s of all particles{overhead}",
        flush=True,
    )


if __name__ == "__main__":
    main()
