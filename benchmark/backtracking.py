"""Committed tokens per second of backtracking walks, beside the two libraries: `python -m benchmark.backtracking`.

Two tasks with the same settings for all: an operator (`ProbabilityThreshold`) beside backtracking-llm, and banned
phrases beside backtrack_sampler. Walks start from one short prompt and each commit a number of tokens. The libraries
have one walk at a time, so theirs is measured once and is the rate for any number of walks; ours are coroutines. They
run in turn, round after round, each in a process of its own; the first round warms up.

`python -m benchmark.backtracking --phrases` needs no model: what a list of 10 to 10,000 phrases costs per token.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmark.environments import CACHE, PeerUnavailable, make_environment, our_python, our_torch
from benchmark.machine import commit, describe_machine, dtype, machine_line, markdown_table, with_notes
from benchmark.workers import Patience, Worker, WorkerFailed
from benchmark.workloads import Cell, make_workload

BACKTRACKING_LLM, BACKTRACK_SAMPLER = "0.3.1", "3.2.1"
N_PROMPT = 12
TARGETS = {1: 1.2, 8: 6.0, 64: 20.0}  # ours is to be at least so many times as fast


class Task(NamedTuple):
    """Ours and the library beside it, as named in `benchmark.peers`."""

    title: str
    ours: str
    peer: str


TASKS = (
    Task("operator, beside backtracking-llm", "walks_operator", "backtracking_llm"),
    Task("phrases, beside backtrack_sampler", "walks_phrases", "backtrack_sampler"),
)


def backtracking_llm_python(tell: Callable[[str], None]) -> Path:
    """backtracking-llm on our torch and the transformers 4 that it asks for.

    Raises:
        PeerUnavailable: It could not be installed.
    """
    steps = [[our_torch()], [f"backtracking-llm=={BACKTRACKING_LLM}", "transformers<5"]]
    return make_environment(f"backtracking-llm-{BACKTRACKING_LLM}", steps, tell)


def backtrack_sampler_python(tell: Callable[[str], None]) -> Path:
    """backtrack_sampler on our torch and our transformers.

    Raises:
        PeerUnavailable: It could not be installed.
    """
    transformers = importlib.metadata.version("transformers")
    steps = [[our_torch()], [f"backtrack_sampler=={BACKTRACK_SAMPLER}", f"transformers=={transformers}"]]
    return make_environment(f"backtrack-sampler-{BACKTRACK_SAMPLER}", steps, tell)


PYTHONS = {"backtracking_llm": backtracking_llm_python, "backtrack_sampler": backtrack_sampler_python}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 if both tasks were measured."""
    options = _parser().parse_args(arguments)
    if options.phrases:
        print(phrases_table(options.repeats, options.seed))
        return 0
    console = Console(stderr=True)
    report: dict[str, Any] = {
        "time_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": " ".join(["python -m benchmark.backtracking", *(sys.argv[1:] if arguments is None else arguments)]),
        "options": {name: getattr(options, name) for name in ("model", "walks", "steps", "repeats", "threads", "seed")},
        "machine": describe_machine(),
        "commit": commit(),
        "tasks": {},
    }
    patience = Patience(options.patience)
    for task in TASKS:
        try:
            report["tasks"][task.title] = _measure(task, options, patience, console)
        except (PeerUnavailable, WorkerFailed) as reason:
            console.print(Text(f"{task.title}: not measured: {reason}", style="red"))
    print_report(Console() if sys.stdout.isatty() else Console(width=160), report)
    if options.markdown is not None:
        options.markdown.write_text(to_markdown(report), encoding="utf-8")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0 if len(report["tasks"]) == len(TASKS) else 1


PHRASE_LISTS = (10, 100, 1_000, 10_000)
_N_WORDS, _N_TOKENS = 400, 2_000


def phrases_table(repeats: int, seed: int) -> str:
    """Microseconds of one step of `phrases` per token, by the number of phrases, as Markdown."""
    table = markdown_table(
        ["phrases", "median, microseconds a token", "95 in 100 below"],
        [
            [f"{n:,}", f"{statistics.median(costs):.1f}", f"{statistics.quantiles(costs, n=20)[-1]:.1f}"]
            for n in PHRASE_LISTS
            for costs in [phrase_costs(n, repeats, seed)]
        ],
    )
    notes = [
        machine_line(describe_machine()),
        f"{_N_TOKENS:,} tokens, each half of a word of {_N_WORDS}; phrases of two of these words; each token is "
        f"the median of {repeats} runs; nothing is taken back; one thread, no model",
        f"commit {commit()['id'][:12]}",
    ]
    return with_notes(table, notes)


def phrase_costs(n_phrases: int, repeats: int, seed: int) -> list[float]:
    """Microseconds of one step of a rule that bans so many phrases, for each token of a text."""
    from genlm_backend.backtracking import Prompt, Step, phrases

    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklm", k=6)) for _ in range(_N_WORDS)]
    rule = phrases([f"{a} {b}" for a, b in rng.sample(list(itertools.permutations(words, 2)), n_phrases)])
    text = rng.choices(words, k=_N_TOKENS // 2)
    steps = [
        Step(i, piece.encode(), (), -1.0, -1.0)
        for i, piece in enumerate(piece for word in text for piece in (f" {word[:3]}", word[3:]))
    ]
    runs: list[list[float]] = []
    for _ in range(repeats):
        state, costs = rule.init(Prompt((), ())), []
        for step in steps:
            started = time.perf_counter_ns()
            state, _ = rule.step(state, step)
            costs.append((time.perf_counter_ns() - started) / 1e3)
        runs.append(costs)
    return [statistics.median(of_token) for of_token in zip(*runs, strict=True)]


def _measure(task: Task, options: argparse.Namespace, patience: Patience, console: Console) -> dict[str, Any]:
    from genlm_backend.llm.demo_model import resolve_model
    from genlm_backend.llm.loading import load_tokenizer

    def tell(text: str) -> None:
        console.print(Text(f"{text} ..."))

    model_path = Path(resolve_model(options.model, tell))
    tokenizer = load_tokenizer(str(model_path))
    python = PYTHONS[task.peer](tell)
    workers: list[Worker] = []
    rates: dict[str, list[float]] = {}
    counts: dict[str, dict[str, float]] = {}
    try:
        for name, where in ((task.ours, our_python(tell)), (task.peer, python)):
            tell(f"loading {name}")
            workers.append(Worker(name, where, model_path, options.threads))
        for number in range(options.repeats + 1):
            for worker in workers if number % 2 else workers[::-1]:
                for n_walks in options.walks if worker.name == task.ours else [1]:
                    workload = make_workload(
                        tokenizer.encode, Cell(n_walks, N_PROMPT), options.steps, options.seed + number
                    )
                    patience.wait_for_quiet()
                    reply = worker.run(workload)
                    rate = reply["n_tokens"] / reply["total_s"]
                    tell(f"round {number}/{options.repeats}: {worker.name}, {n_walks} walks: {rate:.1f} tokens/s")
                    if number:
                        rates.setdefault(f"{worker.name} {n_walks}", []).append(rate)
                        counts[f"{worker.name} {n_walks}"] = reply["counts"] or {}
        versions = {worker.name: worker.ready["versions"] | {"itself": worker.ready["version"]} for worker in workers}
    finally:
        for worker in workers:
            worker.close()
    peer = statistics.median(rates[f"{task.peer} 1"])
    return {
        "ours": task.ours,
        "peer": task.peer,
        "peer_tokens_per_s": peer,
        "tokens_per_s": {n: statistics.median(rates[f"{task.ours} {n}"]) for n in options.walks},
        "ratio": {n: statistics.median(rates[f"{task.ours} {n}"]) / peer for n in options.walks},
        "rates": rates,
        "counts": counts,
        "versions": versions,
    }


def print_report(console: Console, report: dict[str, Any]) -> None:
    """The table, in the terminal."""
    header, rows = _table(report)
    table = Table(title="Committed tokens per second: median (smallest - largest)", title_justify="left")
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(text, style="red" if "missed" in text else "") for text in row))
    console.print(table)
    for line in _notes(report):
        console.print(Text(line), soft_wrap=True)


def to_markdown(report: dict[str, Any]) -> str:
    """The table, for the documentation."""
    return with_notes(markdown_table(*_table(report)), _notes(report))


def _table(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    header = ["task", "walks", "ours", "the library, 1 walk", "times as fast", "forwards", "drawn", "rollbacks"]
    rows = []
    for title, measured in report["tasks"].items():
        for n in report["options"]["walks"]:
            counts = measured["counts"][f"{measured['ours']} {n}"]
            ratio, target = measured["ratio"][n], TARGETS.get(n)
            reached = "" if target is None else f", {target:g} {'reached' if ratio >= target else 'missed'}"
            rates = [measured["rates"][key] for key in (f"{measured['ours']} {n}", f"{measured['peer']} 1")]
            told = [f"{counts[name]:g}" for name in ("forwards", "drawn", "rollbacks")]
            rows.append([title, str(n), *map(_shown, rates), f"{ratio:.2f}{reached}", *told])
    return header, rows


def _notes(report: dict[str, Any]) -> Iterator[str]:
    options = report["options"]
    for measured in report["tasks"].values():
        for name, versions in measured["versions"].items():
            yield f"{name} {versions['itself']} (torch {versions['torch']}, transformers {versions['transformers']})"
    changed = " with changes" if report["commit"]["has_changes"] else ""
    machine = machine_line(report["machine"])
    yield f"{machine}; {options['threads']} threads each; commit {report['commit']['id'][:12]}{changed}"
    yield (
        f"{options['model']}, {dtype()}, prompt of {N_PROMPT} tokens, {options['steps']} tokens committed by each; "
        f"{options['repeats']} rounds after one that warms up, all in turn; forwards, drawn and rollbacks are ours, of "
        "the last round"
    )
    yield f"command: {report['command']}"


def _shown(rates: Sequence[float]) -> str:
    return f"{statistics.median(rates):.1f} ({min(rates):.1f} - {max(rates):.1f})"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Committed tokens per second of backtracking walks.")
    parser.add_argument("--phrases", action="store_true", help="only what a list of phrases costs per token")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--walks", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8, 64])
    parser.add_argument("--steps", type=int, default=48, help="tokens each walk commits")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--patience", type=float, default=300.0, help="seconds to wait for a quiet machine")
    parser.add_argument("--json", type=Path, default=CACHE / "backtracking.json")
    parser.add_argument("--markdown", type=Path, help="where the table goes as Markdown, if anywhere")
    return parser


if __name__ == "__main__":
    sys.exit(main())
