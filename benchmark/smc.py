"""Constrained sequential Monte Carlo beside genlm-control: particle-tokens per second, and our own overhead.

    python -m benchmark.smc                       # all of it, in one run; results in .cache/benchmark/smc.json
    python -m benchmark.smc --particles 10 --only record --ours

A particle-token is a token of a particle that is alive and complete at the end. genlm-control resamples after its last
step too, which makes copies of the living out of the dead; ours does not, but is counted as if it did. How many of the
particles are different is told. Both libraries take turns, with the
same model and the same number of threads; each is loaded and has answered one question before the clock starts, and
caches are empty then. A run of the peer is stopped after `--limit` seconds: it then has no complete particle, and all
tokens that it drew until then, whether their particles would have lived or not, are counted in its favour.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from time import perf_counter, strftime
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from benchmark.environments import CACHE, ROOT, PeerUnavailable, make_environment, our_torch
from benchmark.machine import commit, describe_machine, dtype, machine_line, markdown_table, with_notes
from benchmark.smc_workloads import ESS_THRESHOLD, MAX_TOKENS, PROMPTS, REGEXES, SCHEMA

OURS, PEER = "ours", "genlm-control"
CONSTRAINTS = [*REGEXES, "json"]
TARGET, MOST_OVERHEAD = 20.0, 0.15


class Run(NamedTuple):
    """What one run of one library found.

    Attributes:
        seconds: How long it took, or ran until it was stopped.
        complete: Particles alive and complete at the end; None if it was stopped.
        different: How many different texts they have.
        tokens: Tokens of those; None if it was stopped.
        sampled: Tokens drawn for all particles.
        overhead: Share of the time that was not the model's forward; None for the peer.
    """

    seconds: float
    complete: int | None
    different: int | None
    tokens: int | None
    sampled: int
    overhead: float | None = None

    @property
    def rate(self) -> float:
        """Particle-tokens per second; of a run that was stopped, all tokens per second: more it cannot be."""
        return (self.sampled if self.tokens is None else self.tokens) / self.seconds


class Cell(NamedTuple):
    """One constraint and a number of particles."""

    constraint: str
    n_particles: int

    def __str__(self) -> str:
        return f"{self.constraint}, {self.n_particles} particles"


def main() -> int:
    """Run the benchmark; 0 if everybody was measured."""
    options = _parser().parse_args()
    console = Console(stderr=True)
    cells = [Cell(constraint, n) for constraint in options.only for n in options.particles]
    runs: dict[tuple[str, Cell], list[Run]] = {}
    versions = {name: version(name) for name in ("genlm-backend", "torch", "transformers", "llguidance")}
    failures: list[str] = []
    try:
        asyncio.run(_measure(cells, options, console, runs, versions, failures))
    except KeyboardInterrupt:
        if not runs:
            raise
        console.print("stopped: the table has what was measured so far")
    report = {
        "time_utc": strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": "python -m benchmark.smc " + " ".join(sys.argv[1:]),
        "machine": describe_machine(),
        "commit": commit(),
        "threads": options.threads,
        "dtype": dtype(),
        "versions": versions,
        "failures": failures,
        "runs": [
            {"library": name, "constraint": cell.constraint, "particles": cell.n_particles} | run._asdict()
            for (name, cell), found in runs.items()
            for run in found
        ],
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    rows = list(_rows(cells, runs))
    print(with_notes(markdown_table(rows[0], rows[1:]), _notes(report)), end="")
    return 1 if failures else 0


async def _measure(
    cells: list[Cell],
    options: argparse.Namespace,
    console: Console,
    runs: dict[tuple[str, Cell], list[Run]],
    versions: dict[str, str],
    failures: list[str],
) -> None:
    """Every run, library and cell in turn, round after round; `runs`, `versions` and `failures` are filled."""
    from genlm_backend.llm.demo_model import demo_model_path

    folder = demo_model_path()
    python = None if options.ours else _peer_python(options.peer_python, console)
    async with _Ours.loaded(options.threads) as ours:
        for turn in range(options.repeats):
            for cell in cells:
                run = await ours.run(cell, seed=turn)
                console.print(f"round {turn + 1}/{options.repeats}: {cell}: {run.rate:.1f} particle-tokens/s")
                runs.setdefault((OURS, cell), []).append(run)
                if python is not None:
                    try:
                        run, of_peer = _run_peer(python, folder, cell, turn, options)
                    except PeerUnavailable as error:
                        failures.append(f"{PEER}, {cell}: {error}")
                        continue
                    runs.setdefault((PEER, cell), []).append(run)
                    versions |= {f"the peer's {name}": number for name, number in of_peer.items()}
    for failure in failures:
        console.print(failure, style="red")


class _Ours:
    """Our side: the model is loaded once, and one run is made to warm up."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.forward = Stopwatch(llm._service.engine)
        llm._service.engine = self.forward

    @classmethod
    @asynccontextmanager
    async def loaded(cls, n_threads: int) -> AsyncIterator[_Ours]:
        import torch

        from genlm_backend import load_model_by_name, sampling

        torch.set_num_threads(n_threads)
        sampling.prepare()
        async with load_model_by_name("smollm2", backend="hf", llm_opts={"hf_opts": {"dtype": dtype()}}) as llm:
            ours = cls(llm)
            await ours.run(Cell("record", 2), seed=99)
            yield ours
            llm._service.engine = ours.forward.engine

    async def run(self, cell: Cell, seed: int) -> Run:
        from genlm_backend.potentials import Grammar, LanguageModel, Product
        from genlm_backend.smc import sequences, smc

        llm = self.llm
        prompt = PROMPTS[cell.constraint]
        if cell.constraint in REGEXES:
            grammar = Grammar.regex(llm, REGEXES[cell.constraint])
        else:
            grammar = Grammar.json_schema(llm, SCHEMA, whitespace=False)
        model = sequences(Product(LanguageModel(llm, prompt), grammar), max_tokens=MAX_TOKENS)
        llm.clear_cache()
        self.forward.seconds = 0.0
        started = perf_counter()
        result = await smc(model, cell.n_particles, seed=seed, ess_threshold=ESS_THRESHOLD, on_failure="mark")
        seconds = perf_counter() - started
        kept = [result.paths[i] for i in _after_resampling(result.log_weights, seed)]
        texts = [tuple(choice for choice in path.choices if choice != len(llm.byte_vocab)) for path in kept]
        sampled = sum(step.statuses.count("r") for step in result.steps)
        share = 1.0 - self.forward.seconds / seconds
        return Run(seconds, len(kept), len(set(texts)), sum(map(len, texts)), sampled, share)


def _after_resampling(log_weights: Sequence[float], seed: int) -> list[int]:
    """Who is there after one more resampling, where the threshold asks for it: the peer does that at the end."""
    from genlm_backend.smc.resampling import resample
    from genlm_backend.smc.weights import effective_sample_size

    n, size = len(log_weights), effective_sample_size(log_weights)
    if not 0.0 < size < ESS_THRESHOLD * n:
        return [i for i, log_weight in enumerate(log_weights) if log_weight > -math.inf]
    drawn = resample(np.random.default_rng(seed), list(log_weights), n, "multinomial")
    return list(map(int, drawn.ancestors))


class Stopwatch:
    """An engine that says how long it worked."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.seconds = engine, 0.0

    def evaluate(self, contexts: Any) -> Any:
        started = perf_counter()
        try:
            return self.engine.evaluate(contexts)
        finally:
            self.seconds += perf_counter() - started

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


def _peer_python(given: Path | None, console: Console) -> Path:
    if given is not None:
        return given
    lines = (ROOT / "requirements" / "ecosystem.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    return make_environment("ecosystem", [[our_torch()], pins], lambda text: console.print(f"{text} ..."))


def _run_peer(
    python: Path, folder: Path, cell: Cell, seed: int, options: argparse.Namespace
) -> tuple[Run, dict[str, str]]:
    """One run in a process of its own, which has loaded the model before its clock starts."""
    arguments = [folder, cell.constraint, cell.n_particles, seed, options.limit, options.threads]
    command = [str(python), "-m", "benchmark.peers.control_smc", *map(str, arguments)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "BENCHMARK_DTYPE": dtype()}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    if done.returncode:
        raise PeerUnavailable((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    run = Run(found["seconds"], *map(found.get, ("complete", "different", "tokens")), found["sampled"])
    return run, found["versions"]


# ---- showing it


def _rows(cells: list[Cell], runs: dict[tuple[str, Cell], list[Run]]) -> Iterator[tuple[str, ...]]:
    yield (
        "",
        "particle-tokens per second",
        f"ours / {PEER} (target {TARGET:g})",
        "alive and complete (different)",
        "seconds to 10 valid samples",
        f"own overhead (at most {MOST_OVERHEAD:.0%})",
    )
    for cell in cells:
        for name in (OURS, PEER):
            found = runs.get((name, cell))
            if not found:
                continue
            ratio = overhead = ""
            if name == OURS:
                overhead = f"{statistics.median(run.overhead or 0.0 for run in found):.1%}"
                if peers := runs.get((PEER, cell)):
                    pairs = zip(found, peers, strict=False)
                    ratio = _spread([a.rate / b.rate if b.rate else math.inf for a, b in pairs])
            stopped = any(run.tokens is None for run in found)
            complete = ["stopped" if run.complete is None else f"{run.complete} ({run.different})" for run in found]
            rate = ("at most " if stopped else "") + _spread([run.rate for run in found])
            yield f"{name}, {cell}", rate, ratio, ", ".join(complete), seconds_to(10, found), overhead


def seconds_to(n_valid: int, runs: list[Run]) -> str:
    """How long the runs take, one after another and from the start again, until they have given so many samples."""
    if not any(run.complete for run in runs):
        return f"none in {sum(run.seconds for run in runs):.0f}"
    seconds, n_found, turn = 0.0, 0, 0
    while n_found < n_valid:
        run = runs[turn % len(runs)]
        seconds, n_found, turn = seconds + run.seconds, n_found + (run.complete or 0), turn + 1
    return f"{seconds:.1f}"


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f} - {max(values):.1f})"


def _notes(report: dict[str, Any]) -> Iterator[str]:
    yield ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    threads, commit_id = report["threads"], report["commit"]["id"][:12]
    yield f"{machine_line(report['machine'])}; {threads} threads each; {report['dtype']}; commit {commit_id}"
    yield f"command: {report['command']}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--particles", type=int, nargs="+", default=[10, 50])
    parser.add_argument("--only", choices=CONSTRAINTS, nargs="+", default=CONSTRAINTS)
    parser.add_argument("--ours", action="store_true", help="leave the peer out")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds after which a run of the peer is stopped")
    parser.add_argument("--peer-python", type=Path, help="an environment made from requirements/ecosystem.txt")
    parser.add_argument("--json", type=Path, default=CACHE / "smc.json")
    return parser


if __name__ == "__main__":
    sys.exit(main())
