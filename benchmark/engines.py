"""Tokens per second of this package and its peers, side by side: `python -m benchmark.engines`.

Particles start from one prompt and each draw a number of tokens from the model's whole distribution; none stops
earlier. Every peer is a process that loads the model once. They run in turn, in rotating order, cell after cell, round
after round; the first round warms up. Before each run caches are cleared, so the prompt is computed within the time.

Other work on the machine does not slow everyone alike: OpenMP threads wait for each other by spinning, and lose whole
time slices when they share a core. So a run waits until the machine is quiet, and a run that was disturbed is done
again, as long as patience lasts; what stays disturbed is counted and said.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from benchmark.environments import PeerUnavailable, genlm_python, our_python
from benchmark.machine import commit, describe_machine, dtype, machine_line, markdown_table, with_notes
from benchmark.workers import QUIET_CORES, Patience, Worker, WorkerFailed, busy_s
from benchmark.workloads import CELLS, Cell, Workload, make_workload, parse_cells

OURS, OURS_ROWS, GENLM, GENERATE = "ours", "ours_rows", "genlm", "generate"
OURS_VLLM, VLLM_GENERATE, VLLM_FRESH = "ours_vllm", "vllm_generate", "vllm_fresh"
# Ours is to be at least so many times as fast.
TARGETS: dict[str, dict[Cell, float]] = {
    GENLM: {Cell(10, 3): 2.5, Cell(50, 3): 6.0, Cell(50, 256): 3.5},
    GENERATE: {cell: 1.5 if cell == Cell(50, 3) else 1.0 for cell in CELLS},
    VLLM_GENERATE: {cell: 0.85 for cell in CELLS if cell.n_particles >= 10},
    VLLM_FRESH: {cell: 3.0 for cell in CELLS if cell.n_particles == 50},
}
COMPARED = {VLLM_GENERATE: OURS_VLLM, VLLM_FRESH: OURS_VLLM}  # with which one of ours; all others with OURS


class Kind(NamedTuple):
    """A column: how it is titled, and the Python that runs `benchmark.peers.NAME`."""

    title: str
    python: Callable[[Callable[[str], None]], Path]


KINDS: dict[str, Kind] = {
    OURS: Kind("ours", our_python),
    OURS_ROWS: Kind("ours, whole rows", our_python),
    GENLM: Kind("genlm-backend", genlm_python),
    GENERATE: Kind("generate", our_python),
    OURS_VLLM: Kind("ours on vLLM", our_python),
    VLLM_GENERATE: Kind("vLLM's generate", our_python),
    VLLM_FRESH: Kind("vLLM, a request per step", our_python),
}
# `--peers ours_vllm,vllm_generate,vllm_fresh` measures those on vLLM (docs/vllm.md).
DEFAULT_PEERS = (OURS, OURS_ROWS, GENLM, GENERATE)


class Sample(NamedTuple):
    """One run of one cell by one peer.

    Attributes:
        peer: Its name in `KINDS`.
        cell: As written, `10x256`.
        round: 0 warms up and does not count.
        tokens_per_s: Of all particles together, the prompt included.
        step_tokens_per_s: The same after each particle's first token, so without the prompt; None for one step.
        reply: What the worker measured.
        idle_cpu: Cores that the other workers kept busy meanwhile; near 0.
        foreign_cpu: Cores that all other processes of the machine kept busy meanwhile.
        counts: It is part of the medians: not warming up, and not replaced by a run that was not disturbed.
    """

    peer: str
    cell: str
    round: int
    tokens_per_s: float
    step_tokens_per_s: float | None
    reply: dict[str, Any]
    idle_cpu: float
    foreign_cpu: float
    counts: bool


class Spread(NamedTuple):
    """Median, smallest and largest."""

    median: float
    low: float
    high: float


class Measured(NamedTuple):
    """All that a run of the benchmark gives."""

    samples: list[Sample]
    ready: dict[str, dict[str, Any]]
    unavailable: dict[str, str]
    is_interrupted: bool = False


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 if it went to its end and this package was measured."""
    options = _parser().parse_args(arguments)
    console = Console(stderr=True)
    started = {"load_average": list(os.getloadavg()), "time_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt_once)
    measured = measure(options, console)
    report = make_report(options, measured, started)
    out = Console() if sys.stdout.isatty() else Console(width=160)
    print_report(out, report)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    out.print(Text(f"every sample: {options.json}"), soft_wrap=True)
    if options.markdown is not None:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(to_markdown(report), encoding="utf-8")
    return (
        0 if not measured.is_interrupted and any(sample.peer in (OURS, OURS_VLLM) for sample in measured.samples) else 1
    )


def _interrupt_once(number: int, frame: object) -> None:
    """What was measured is told all the same; `timeout` signals twice, and the second must not stop the telling."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


def measure(options: argparse.Namespace, console: Console) -> Measured:
    """Start the workers and run every cell on each of them, round after round."""
    from genlm_backend.llm.demo_model import resolve_model
    from genlm_backend.llm.loading import load_tokenizer

    def tell(text: str) -> None:
        console.print(Text(f"{text} ..."))

    model_path = Path(resolve_model(options.model, tell))
    tokenizer = load_tokenizer(str(model_path))
    measured = Measured([], {}, {})
    with ExitStack() as stack:
        workers = []
        for name in options.peers:
            worker = _start(name, model_path, options.threads, measured, tell)
            if worker is not None:
                workers.append(worker)
                stack.callback(worker.close)
        try:
            _run_rounds(options, workers, measured, tokenizer.encode, console)
        except KeyboardInterrupt:
            return measured._replace(is_interrupted=True)
    return measured


def _run_rounds(
    options: argparse.Namespace,
    workers: list[Worker],
    measured: Measured,
    encode: Callable[[str], list[int]],
    console: Console,
) -> None:
    patience = Patience(options.patience)
    with _progress(console, (options.repeats + 1) * len(options.cells) * len(workers)) as advance:
        for number in range(options.repeats + 1):
            for cell in options.cells:
                workload = make_workload(encode, cell, options.steps, options.seed + number)
                turn = number % max(len(workers), 1)
                for worker in workers[turn:] + workers[:turn]:
                    advance(f"round {number}/{options.repeats}  {cell}  {KINDS[worker.name].title}")
                    if worker.name in measured.unavailable:
                        continue
                    live = [other for other in workers if other.name not in measured.unavailable]
                    try:
                        measured.samples.extend(_samples(worker, live, cell, number, workload, patience))
                    except WorkerFailed as failure:
                        measured.unavailable[worker.name] = f"failed in {cell}: {failure}"


def _start(
    name: str, model_path: Path, n_threads: int, measured: Measured, tell: Callable[[str], None]
) -> Worker | None:
    try:
        python = KINDS[name].python(tell)
        tell(f"loading {KINDS[name].title}")
        worker = Worker(name, python, model_path, n_threads)
    except (PeerUnavailable, WorkerFailed) as reason:
        measured.unavailable[name] = str(reason)
        tell(f"{KINDS[name].title} cannot be measured here: {reason}")
        return None
    measured.ready[name] = worker.ready
    return worker


def _samples(
    worker: Worker, live: list[Worker], cell: Cell, number: int, workload: Workload, patience: Patience
) -> list[Sample]:
    """Runs of one cell; at most the last of them counts."""
    samples = []
    while True:
        patience.wait_for_quiet()
        started = time.perf_counter()
        sample = _sample(worker, live, cell, number, workload)
        is_last = number == 0 or sample.foreign_cpu <= QUIET_CORES or patience.left_s <= 0
        samples.append(sample._replace(counts=is_last and number > 0))
        if is_last:
            return samples
        patience.left_s -= time.perf_counter() - started


def _sample(worker: Worker, live: list[Worker], cell: Cell, number: int, workload: Workload) -> Sample:
    others = [other for other in live if other is not worker]
    before, idle_before, machine_before = worker.cpu_s(), sum(o.cpu_s() for o in others), busy_s()
    started = time.perf_counter()
    reply = worker.run(workload)
    wall_s = time.perf_counter() - started
    idle_s = sum(o.cpu_s() for o in others) - idle_before
    foreign_s = busy_s() - machine_before - (worker.cpu_s() - before) - idle_s
    after_first_s = reply["total_s"] - reply["first_s"]
    n_after_first = reply["n_tokens"] - workload.n_particles
    return Sample(
        peer=worker.name,
        cell=str(cell),
        round=number,
        tokens_per_s=reply["n_tokens"] / reply["total_s"],
        step_tokens_per_s=n_after_first / after_first_s if n_after_first else None,
        reply=reply,
        idle_cpu=max(idle_s, 0.0) / wall_s,
        foreign_cpu=max(foreign_s, 0.0) / wall_s,
        counts=False,
    )


def make_report(options: argparse.Namespace, measured: Measured, started: dict[str, Any]) -> dict[str, Any]:
    """Everything about a run, as it goes into the JSON."""
    counted = [sample for sample in measured.samples if sample.counts]
    rows = []
    for cell in options.cells:
        of_cell = {
            name: [s for s in counted if s.cell == str(cell) and s.peer == name]
            for name in options.peers
            if name not in measured.unavailable
        }
        of_cell = {name: of for name, of in of_cell.items() if of}
        rows.append(
            {
                "cell": str(cell),
                "tokens_per_s": {name: _spread([s.tokens_per_s for s in of]) for name, of in of_cell.items()},
                "step_tokens_per_s": {
                    name: _spread([s.step_tokens_per_s for s in of])
                    for name, of in of_cell.items()
                    if options.steps > 1
                },
                "tokens_per_cpu_s": {
                    name: _spread([s.reply["n_tokens"] / s.reply["cpu_s"] for s in of]) for name, of in of_cell.items()
                },
                "peak_bytes": {name: _largest([s.reply["peak_bytes"] for s in of]) for name, of in of_cell.items()},
                "ours_times": {
                    name: _spread(_paired_ratios(of_cell[_ours(name)], of_cell[name]))
                    for name in of_cell
                    if name not in (OURS, OURS_VLLM) and _ours(name) in of_cell
                },
                "targets": {name: TARGETS[name][cell] for name in TARGETS if cell in TARGETS[name]},
            }
        )
    return {
        "command": "python -m benchmark.engines "
        + ("" if tuple(options.peers) == DEFAULT_PEERS else f"--peers {','.join(options.peers)} ")
        + f"--cells {','.join(map(str, options.cells))} "
        f"--repeats {options.repeats} --steps {options.steps} --seed {options.seed} --threads {options.threads}",
        "started": started,
        "commit": commit(),
        "machine": describe_machine(),
        "model": options.model,
        "options": {
            "cells": [str(cell) for cell in options.cells],
            "repeats": options.repeats,
            "steps": options.steps,
            "seed": options.seed,
            "threads": options.threads,
            "openmp": {name: os.environ[name] for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT") if name in os.environ},
            "dtype": dtype(),
        },
        "peers": {name: {"title": KINDS[name].title} | ready for name, ready in measured.ready.items()},
        "unavailable": measured.unavailable,
        "interrupted": measured.is_interrupted,
        "cells": rows,
        "quiet": {
            "idle_cpu_max": max((s.idle_cpu for s in counted), default=0.0),
            "foreign_cpu_median": statistics.median([s.foreign_cpu for s in counted] or [0.0]),
            "foreign_cpu_max": max((s.foreign_cpu for s in counted), default=0.0),
            "counted": len(counted),
            "disturbed": sum(s.foreign_cpu > QUIET_CORES for s in counted),
            "repeated": sum(s.round > 0 and not s.counts for s in measured.samples),
        },
        "samples": [sample._asdict() for sample in measured.samples],
    }


def _ours(name: str) -> str:
    """The one of ours that a peer is compared with."""
    return COMPARED.get(name, OURS)


def _spread(values: Sequence[float | None]) -> dict[str, float] | None:
    numbers = [value for value in values if value is not None]
    if not numbers:
        return None
    return Spread(statistics.median(numbers), min(numbers), max(numbers))._asdict()


def _largest(values: Sequence[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)


def _paired_ratios(ours: Sequence[Sample], theirs: Sequence[Sample]) -> list[float]:
    """Of the same round: what slowed the whole machine for a while slowed both."""
    return [a.tokens_per_s / b.tokens_per_s for a in ours for b in theirs if a.round == b.round]


# ---- showing it


def print_report(console: Console, report: dict[str, Any]) -> None:
    """The tables, in the terminal."""
    for title, header, rows in _tables(report):
        table = Table(title=title, title_justify="left")
        for i, name in enumerate(header):
            table.add_column(name, justify="right" if i else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(text, style="red" if "missed" in text else "") for text in row))
        console.print(table)
    for line in _notes(report):
        console.print(Text(line), soft_wrap=True)


def to_markdown(report: dict[str, Any]) -> str:
    """The tables, for the documentation."""
    blocks = []
    for title, header, rows in _tables(report):
        blocks.append(f"**{title}**\n\n{markdown_table(header, rows)}")
    return with_notes("\n\n".join(blocks), _notes(report))


def _tables(report: dict[str, Any]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    peers, cells = report["peers"], report["cells"]
    names = [name for name in peers if name not in report["unavailable"]]
    header = ["particles x prompt", *(peers[name]["title"] for name in names)]
    rows = [[row["cell"], *(_shown(row["tokens_per_s"].get(name)) for name in names)] for row in cells]
    yield "Tokens per second, prompt included: median (smallest - largest)", header, rows
    if report["options"]["steps"] > 1:
        rows = [[row["cell"], *(_shown(row["step_tokens_per_s"].get(name)) for name in names)] for row in cells]
        yield "Tokens per second after each particle's first token, so without the prompt", header, rows
    if report["options"]["threads"] == 1:  # several threads spin while they wait, and that is processor time too
        rows = [[row["cell"], *(_shown(row["tokens_per_cpu_s"].get(name)) for name in names)] for row in cells]
        yield "Tokens per second of processor time, prompt included; other work hardly disturbs it", header, rows
    others = [name for name in names if name in TARGETS and _ours(name) in names]
    if others:
        titles = [f"ours / {peers[name]['title']}" for name in others]
        header = ["particles x prompt", *(text for title in titles for text in (title, "target", "without the prompt"))]
        rows = [[row["cell"], *(text for name in others for text in _comparison(row, name))] for row in cells]
        yield "Times as fast, round by round: median (smallest - largest)", header, rows
    rows = [
        ["after loading", *(_gib(peers[name]["rss_bytes"]) for name in names)],
        ["peak while loading", *(_gib(peers[name]["peak_bytes"]) for name in names)],
        ["peak while running", *(_gib(_largest([row["peak_bytes"].get(name) for row in cells])) for name in names)],
    ]
    # Not by cell: what an allocator has got from the system for a large cell it keeps in a small one.
    yield "Resident memory of the process, GiB", ["", *(peers[name]["title"] for name in names)], rows


def _comparison(row: dict[str, Any], name: str) -> Iterator[str]:
    ratio, target = row["ours_times"].get(name), row["targets"].get(name)
    if ratio is None:
        yield from ("-", "", "")
        return
    yield f"{ratio['median']:.2f} ({ratio['low']:.2f} - {ratio['high']:.2f})"
    yield "" if target is None else f"{target:g} {'reached' if ratio['median'] >= target else 'missed'}"
    steps = row["step_tokens_per_s"]
    yield f"{steps[_ours(name)]['median'] / steps[name]['median']:.2f}" if steps else ""


def _notes(report: dict[str, Any]) -> Iterator[str]:
    options, machine, quiet = report["options"], report["machine"], report["quiet"]
    if report["interrupted"]:
        yield "interrupted before all rounds were done: the medians are of fewer"
    for name, reason in report["unavailable"].items():
        yield f"{KINDS[name].title} was not measured: {reason}"
    versions = [
        f"{peer['title']} {peer['version']} (torch {peer['versions']['torch']}, "
        f"transformers {peer['versions']['transformers']})"
        for peer in report["peers"].values()
    ]
    yield "; ".join(versions)
    yield (
        f"{machine_line(machine)}; {options['threads']} threads each; commit {report['commit']['id'][:12]}"
        f"{' with changes' if report['commit']['has_changes'] else ''}"
    )
    yield (
        f"{report['model']}, {options['dtype']}, {options['steps']} new tokens for each particle, drawn from the whole "
        f"distribution; {options['repeats']} rounds after one that warms up, all peers in turn; caches are cleared "
        "before each run, so everyone computes the prompt"
    )
    yield (
        "ours: query(Draw); ours, whole rows: next_token_logprobs, each row drawn by torch.multinomial; genlm-backend: "
        "batch_size = particles, cache_kv for the long prompt, each row drawn by torch.multinomial; generate: one "
        "static batch, its own sampler"
    )
    yield (
        f"other work on the machine: {quiet['foreign_cpu_median']:.2f} cores in the median run, "
        f"{quiet['foreign_cpu_max']:.2f} at most; {quiet['disturbed']} of {quiet['counted']} runs had more than "
        f"{QUIET_CORES} ({quiet['repeated']} more such runs were repeated); workers whose turn it was not used at most "
        f"{quiet['idle_cpu_max']:.2f}"
    )
    yield f"command: {report['command']}"


def _shown(spread: dict[str, float] | None) -> str:
    if spread is None:
        return "-"
    return f"{spread['median']:,.0f} ({spread['low']:,.0f} - {spread['high']:,.0f})"


def _gib(n_bytes: int | None) -> str:
    return "?" if n_bytes is None else f"{n_bytes / 2**30:.2f}"


@contextmanager
def _progress(console: Console, n_runs: int) -> Iterator[Callable[[str], None]]:
    """Called with what starts now: a bar in a terminal, a line each elsewhere."""
    if not console.is_terminal:
        yield lambda text: console.print(Text(text))
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("", total=n_runs)
        n_started = 0

        def advance(text: str) -> None:
            nonlocal n_started
            bar.update(task, description=text, completed=n_started)
            n_started += 1

        yield advance
        bar.update(task, completed=n_runs, description="done")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.engines", description="Tokens per second of this package and its peers, side by side."
    )
    parser.add_argument("--cells", type=_cells, default=list(CELLS), help="particles x prompt tokens: 10x3,50x256")
    parser.add_argument("--repeats", type=_at_least_one, default=5, help="rounds after one that warms up (5)")
    parser.add_argument("--steps", type=_at_least_one, default=32, help="new tokens for each particle (32)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (0)")
    parser.add_argument("--threads", type=_at_least_one, default=psutil.cpu_count(logical=False) or os.cpu_count())
    parser.add_argument("--peers", type=_peers, default=list(DEFAULT_PEERS), help=",".join(KINDS))
    parser.add_argument(
        "--patience", type=float, default=120, help="seconds to spend in all on waiting for a quiet machine (120)"
    )
    parser.add_argument("--model", default="smollm2", help="smollm2, a .gguf file or a local folder (smollm2)")
    parser.add_argument("--json", type=Path, default=Path(".cache/benchmark/engines.json"), help="where results go")
    parser.add_argument("--markdown", type=Path, help="where the tables go as Markdown, if anywhere")
    return parser


def _cells(text: str) -> list[Cell]:
    try:
        return parse_cells(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _peers(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in KINDS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no peer; expected some of {','.join(KINDS)}")
    return names


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
