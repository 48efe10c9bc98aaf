"""JSON under a grammar, beside the libraries that write it: `python -m benchmark.grammars`; `--masks` for masks alone.

The task is the benchmark that speculative-grammar-backtracking published: an object with exactly ten pairs of strings,
from SmolLM2. Counted are the tokens of the responses per second, one at a time and sixteen, and how many responses
parse as JSON and are such an object. Everyone draws with the same temperature and nucleus from the same model in
one type, in turn, round after round, each in a process of its own; the first round warms up. Drawn, not greedy as it
was published, because sixteen greedy texts are one text; with strings of bounded length, because otherwise no way to
write them can promise an end. After `--limit` seconds a run is stopped, and its rate is of what it wrote until then.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmark.environments import CACHE, PeerUnavailable, make_environment, our_python, our_torch
from benchmark.json_task import LARK, PROMPT, is_valid
from benchmark.machine import commit, describe_machine, dtype, machine_line, markdown_table, with_notes
from benchmark.workers import QUIET_CORES, Patience, Worker, WorkerFailed
from benchmark.workloads import Workload
from genlm_backend.packed_mask import n_words
from genlm_backend.potentials import grammar

TRANSFORMERS_CFG, GRAMMAR_GUIDE = "0.2.7", "0.0.11"
MOST_TOKENS = 900  # more than the longest text of the bounded grammar has bytes
TARGETS = {1: 2.0, 16: 8.0}  # ours is to be so many times as fast as the best peer, and all of its texts valid
WARM_UP_TOKENS = 30
GRACE_S = 120.0  # after the limit, for the text that a peer writes to its end; then its process is ended
MASK_TARGET_US = 50.0
MASK_BATCHES = (1, 10, 50)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "email": {"type": "string", "format": "email"},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 5},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
            "required": ["street", "zip"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "email", "tags", "address"],
    "additionalProperties": False,
}
TEXT = (
    '{"name": "Ada Lovelace", "age": 36, "email": "ada@engine.org", "tags": ["poetry", "numbers"], '
    '"address": {"street": "12 St James\'s Square", "zip": "10115"}}'
)


class Kind(NamedTuple):
    """A peer: how it is titled, what runs it, and whether it is one of ours."""

    title: str
    python: Callable[[Callable[[str], None]], Path]
    is_ours: bool = False
    has_batches: bool = False


def transformers_cfg_python(tell: Callable[[str], None]) -> Path:
    """transformers-cfg on our torch, and the transformers 4 that it was written for.

    Raises:
        PeerUnavailable: It could not be installed.
    """
    steps = [[our_torch()], [f"transformers-cfg=={TRANSFORMERS_CFG}", "transformers<5"]]
    return make_environment(f"transformers-cfg-{TRANSFORMERS_CFG}", steps, tell)


def grammar_guide_python(tell: Callable[[str], None]) -> Path:
    """grammar-guide on our torch, with the guidance that it imports, and a transformers whose caches both read.

    Raises:
        PeerUnavailable: It could not be installed.
    """
    packages = [f"grammar-guide=={GRAMMAR_GUIDE}", "guidance==0.1.16", "transformers==4.45.2", "numpy==1.26.4"]
    return make_environment(f"grammar-guide-{GRAMMAR_GUIDE}", [[our_torch()], packages], tell)


KINDS = {
    "grammar_walk": Kind("ours: walk, mask", our_python, is_ours=True, has_batches=True),
    "grammar_walk_plain": Kind("ours: walk, mask, no guesses", our_python, is_ours=True, has_batches=True),
    "grammar_guided": Kind("ours: aguide", our_python, is_ours=True, has_batches=True),
    "transformers_cfg": Kind("transformers-cfg", transformers_cfg_python, has_batches=True),
    "grammar_guide": Kind("grammar-guide", grammar_guide_python),
    "naive_guide": Kind("naive: guide over generate", our_python),
}
BEST = "grammar_walk"  # the one of ours that targets are for
USUAL = ["grammar_walk", "transformers_cfg", "grammar_guide", "naive_guide"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; 0 if everything was measured."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what was measured is shown
    console = Console(stderr=True)
    report: dict[str, Any] = {
        "time_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(),
        "machine": describe_machine(),
        "command": f"python -m benchmark.grammars {' '.join(sys.argv[1:] if arguments is None else arguments)}".strip(),
        "model": options.model,
    }
    report |= measure_masks(options) if options.masks else measure(options, console)
    path = options.json or CACHE / ("masks.json" if options.masks else "grammars.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    text = masks_to_markdown(report) if options.masks else to_markdown(report)
    table = _masks_table(report) if options.masks else _table(report)
    (Console() if sys.stdout.isatty() else Console(width=160)).print(table)
    print(text)
    if options.markdown is not None:
        options.markdown.write_text(text, encoding="utf-8")
    return 1 if report.get("unavailable") else 0


# ---- texts per second


def measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Start the workers, and let each write, round after round."""
    from genlm_backend.backtracking import load_parser
    from genlm_backend.llm.demo_model import resolve_model
    from genlm_backend.llm.loading import load_tokenizer

    def tell(text: str) -> None:
        console.print(Text(f"{text} ..."))

    model_path = Path(resolve_model(options.model, tell))
    prompt_ids = list(load_tokenizer(str(model_path)).encode(PROMPT))
    parser = load_parser(LARK)
    workers: list[Worker] = []
    unavailable: dict[str, str] = {}
    samples: list[dict[str, Any]] = []
    try:
        for name in options.peers:
            try:
                python = KINDS[name].python(tell)
                tell(f"loading {KINDS[name].title}")
                workers.append(Worker(name, python, model_path, options.threads))
            except (PeerUnavailable, WorkerFailed) as reason:
                unavailable[name] = str(reason)
                tell(f"{KINDS[name].title} cannot be measured here: {reason}")
        ready = {worker.name: worker.ready for worker in workers}
        for sample in _rounds(workers, unavailable, prompt_ids, options, tell):
            texts = sample["reply"]["texts"]
            sample["n_valid"] = sum(map(is_valid, texts))
            sample["n_in_grammar"] = sum(map(parser.is_valid, texts))
            samples.append(sample)
    except KeyboardInterrupt:
        if not samples:
            raise
        tell("stopped: the table has what was measured so far")
    finally:
        for worker in workers:
            worker.close()
    counted = [sample for sample in samples if sample["round"] or options.repeats == 0]
    measured = {sample["peer"] for sample in counted}
    rows = {name: _row(name, counted, options.texts) for name in options.peers if name in measured}
    of_peers = [row for name, row in rows.items() if not KINDS[name].is_ours]
    best = {n: max((row[n]["tokens_per_s"] for row in of_peers if n in row), default=None) for n in options.texts}
    return {
        "ready": ready,
        "unavailable": unavailable,
        "texts": options.texts,
        "threads": options.threads,
        "repeats": max((sample["round"] for sample in samples), default=0),
        "rows": rows,
        "best_peer": best,
        "samples": samples,
        "limit_s": options.limit,
        "most_tokens": options.tokens,
        "quiet_cores": QUIET_CORES,
    }


def _rounds(
    workers: Sequence[Worker],
    unavailable: dict[str, str],
    prompt_ids: list[int],
    options: argparse.Namespace,
    tell: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """Every worker and number of texts in turn, round after round; who fails is left out from then on."""
    patience = Patience(options.patience)
    for number in range(options.repeats + 1):
        turn = number % max(len(workers), 1)
        for worker in [*workers[turn:], *workers[:turn]]:
            for n in options.texts:
                if worker.name in unavailable or (number == 0 and n > 1 and len(options.texts) > 1):
                    continue
                counts_as_one = options.one_by_one_as_at_1 and 1 in options.texts
                if n > 1 and not KINDS[worker.name].has_batches and counts_as_one:
                    continue
                patience.wait_for_quiet()
                most = options.tokens if number or not options.repeats else min(options.tokens, WARM_UP_TOKENS)
                workload = Workload(prompt_ids, n, most, options.seed + number, options.limit)
                try:
                    reply = worker.run(workload, at_most_s=options.limit + GRACE_S)
                except WorkerFailed as failure:
                    unavailable[worker.name] = f"failed at {n}: {failure}"
                    continue
                rate = reply["n_tokens"] / reply["total_s"]
                is_stopped = reply["total_s"] >= options.limit
                done = f"{rate:.1f} tokens/s in {reply['total_s']:.0f} s{', stopped' if is_stopped else ''}"
                tell(f"round {number}/{options.repeats}: {KINDS[worker.name].title}, {n} at once: {done}")
                yield {
                    "peer": worker.name,
                    "n": n,
                    "round": number,
                    "tokens_per_s": rate,
                    "is_stopped": is_stopped,
                    "reply": reply,
                }


def _row(name: str, counted: Sequence[dict[str, Any]], numbers: Sequence[int]) -> dict[int, dict[str, Any]]:
    """What a peer did, by how many texts there were at once; what it has no batches for counts as at one."""
    row = {}
    for n in numbers:
        of = [s for s in counted if s["peer"] == name and s["n"] == n]
        is_as_at_1 = not of and not KINDS[name].has_batches
        if is_as_at_1:
            of = [s for s in counted if s["peer"] == name]
        if not of:
            continue  # stopped before its turn came
        rates = [s["tokens_per_s"] for s in of]
        row[n] = {
            "tokens_per_s": statistics.median(rates),
            "low": min(rates),
            "high": max(rates),
            "n_valid": sum(s["n_valid"] for s in of),
            "n_in_grammar": sum(s["n_in_grammar"] for s in of),
            "n_texts": sum(s["n"] for s in of),
            "n_stopped": sum(s["is_stopped"] for s in of),
            "is_as_at_1": is_as_at_1,
        }
    return row


def _lines(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    numbers = report["texts"]
    header = ["", *(text for n in numbers for text in (f"tokens/s, {n} at once", "valid", "in the grammar"))]
    lines = []
    for name, row in report["rows"].items():
        line = [KINDS[name].title]
        for n in numbers:
            cell = row.get(n)
            if cell is None:
                line += ["not measured", "", ""]
                continue
            how = " as at 1" if cell["is_as_at_1"] else f", {cell['n_stopped']} stopped" if cell["n_stopped"] else ""
            line += [
                f"{cell['tokens_per_s']:.1f} ({cell['low']:.1f} - {cell['high']:.1f}){how}",
                f"{cell['n_valid']} of {cell['n_texts']}",
                f"{cell['n_in_grammar']} of {cell['n_texts']}",
            ]
        lines.append(line)
    if BEST in report["rows"]:
        line = ["ours / the best peer (target)"]
        for n in numbers:
            best, ours = report["best_peer"][n], report["rows"][BEST].get(n)
            ratio = ours["tokens_per_s"] / best if best and ours else None
            line += ["-" if ratio is None else f"{ratio:.1f} ({TARGETS.get(n, 0):g})", "", ""]
        lines.append(line)
    return header, lines


def _table(report: dict[str, Any]) -> Table:
    header, lines = _lines(report)
    return _as_table("JSON objects with ten pairs of strings: tokens of the responses per second", header, lines)


def to_markdown(report: dict[str, Any]) -> str:
    """The table and what is to be known about it."""
    versions = "; ".join(
        f"{KINDS[name].title} {ready['version']} (torch {ready['versions']['torch']}, "
        f"transformers {ready['versions']['transformers']}, numpy {ready['versions']['numpy']})"
        for name, ready in report["ready"].items()
    )
    notes = [
        f"{_of_machine(report)}; {report['threads']} threads each; {report['model']}, {dtype()}; "
        f"{report['repeats']} rounds after one that warms up: median (smallest - largest)",
        versions,
        "grammar-guide and the naive row write one text after another, as they have no more; transformers-cfg writes "
        "all in one static batch; ours are coroutines",
        f"at most {report['most_tokens']} tokens each; a run is stopped after {report['limit_s']:g} s: of ours only "
        "finished texts count then, of transformers-cfg all tokens; the others finish the text that they are at",
        *(f"{KINDS[name].title} was not measured: {reason}" for name, reason in report["unavailable"].items()),
        f"command: `{report['command']}`",
    ]
    return with_notes(markdown_table(*_lines(report)), notes)


# ---- masks


def measure_masks(options: argparse.Namespace) -> dict[str, Any]:
    """Microseconds of one mask, alone and in batches, by one thread and by all; and whether Python runs meanwhile."""
    import llguidance

    from genlm_backend.llm.demo_model import resolve_model
    from genlm_backend.llm.loading import load_tokenizer
    from genlm_backend.potentials import Grammar, GrammarVocabulary
    from genlm_backend.tokenization import decode_vocab

    tokenizer = load_tokenizer(resolve_model(options.model, lambda text: None))
    vocabulary = GrammarVocabulary(decode_vocab(tokenizer)[0])
    constraint = Grammar.json_schema(vocabulary, SCHEMA)
    states, token_ids = [constraint.start()], tokenizer.encode(TEXT)
    for token_id in token_ids:
        states.append(constraint.extend(states[-1], token_id))
    assert constraint.is_complete(states[-1]) and len(states) >= max(MASK_BATCHES), len(states)
    constraint.masks(states)  # the lexer's states are made at their first use
    rows: dict[str, dict[int, dict[str, float]]] = {}
    for n_threads in sorted({1, options.threads}):
        grammar._threads = llguidance.LLExecutor(n_threads)
        rows[str(n_threads)] = {n: _mask_times(constraint, states, token_ids, n, options.repeats) for n in MASK_BATCHES}
    grammar._threads = llguidance.LLExecutor(1)  # one core is left for Python
    share = _share_of_python(constraint, states)
    grammar._threads = None
    return {"masks": rows, "vocab": vocabulary.n_tokens, "python_runs": share}


def _mask_times(
    constraint: Any, states: Sequence[Any], token_ids: Sequence[int], n: int, repeats: int
) -> dict[str, float]:
    """Of a step of so many particles, each somewhere else in the text: the share of one of them.

    Each has just read its token: a parser remembers the mask that it made last, and its copies do too.
    """
    times = []
    for number in range(max(repeats, 1) * 40):
        at = [(number + i) % len(token_ids) for i in range(n)]
        batch = [constraint.extend(states[i], token_ids[i]) for i in at]
        started = time.perf_counter()
        constraint.masks(batch)
        times.append((time.perf_counter() - started) / n * 1e6)
    times.sort()
    return {"median": statistics.median(times), "p95": times[int(len(times) * 0.95)], "max": times[-1]}


def _share_of_python(constraint: Any, states: Sequence[Any]) -> float:
    """How much a thread counts in Python while masks are made, relative to what it counts alone."""
    ends, counted = threading.Event(), 0

    def counting() -> None:
        nonlocal counted
        while not ends.is_set():
            counted += 1

    def rate(beside: Callable[[], object]) -> float:
        before, started = counted, time.perf_counter()
        while time.perf_counter() < started + 0.1:
            beside()
        return (counted - before) / (time.perf_counter() - started)

    batch = list(states) * 40
    live = [(constraint._parser(state).deep_copy(), i) for i, state in enumerate(batch)]
    words = np.zeros((len(batch), n_words(constraint.n_tokens + 1)), np.uint32)

    def fill() -> None:
        grammar._executor().unsafe_compute_mask_ptr(live, words.ctypes.data, words.strides[0], len(batch))

    thread = threading.Thread(target=counting)
    thread.start()
    ratios = []
    for _ in range(20):  # in turn, so that what else the machine does meets both
        alone = rate(lambda: time.sleep(0.1))
        ratios.append(rate(fill) / alone)
    ends.set()
    thread.join()
    return statistics.median(ratios)


def _mask_lines(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    header = ["particles", *(f"{n} threads: median, p95, max" for n in report["masks"])]
    lines = [
        [str(n), *(f"{t[n]['median']:.1f}, {t[n]['p95']:.1f}, {t[n]['max']:.1f}" for t in report["masks"].values())]
        for n in MASK_BATCHES
    ]
    return header, lines


def _masks_table(report: dict[str, Any]) -> Table:
    return _as_table("microseconds per particle and step of a mask", *_mask_lines(report))


def masks_to_markdown(report: dict[str, Any]) -> str:
    """The table and what is to be known about it."""
    notes = [
        f"{_of_machine(report)}; llguidance {importlib.metadata.version('llguidance')}, vocabulary of "
        f"{report['vocab']:,} tokens; a JSON Schema with nested objects, an array and formats; "
        f"target: a median below {MASK_TARGET_US:g}",
        "while a thread fills masks, a thread that counts in Python counts "
        f"{report['python_runs']:.0%} of what it counts alone",
        f"command: `{report['command']}`",
    ]
    return with_notes(markdown_table(*_mask_lines(report)), notes)


# ---- showing it


def _as_table(title: str, header: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in header:
        table.add_column(name)
    for line in lines:
        table.add_row(*line)
    return table


def _of_machine(report: dict[str, Any]) -> str:
    changed = " with changes" if report["commit"]["has_changes"] else ""
    return f"{machine_line(report['machine'])}; {report['time_utc']}; commit {report['commit']['id'][:12]}{changed}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmark.grammars", description="JSON under a grammar.")
    parser.add_argument("--masks", action="store_true", help="measure masks instead: no model, no peer")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--texts", type=lambda text: [int(n) for n in text.split(",")], default=[1, 16])
    parser.add_argument("--tokens", type=int, default=MOST_TOKENS, help="most of one text")
    parser.add_argument("--limit", type=float, default=40.0, help="seconds after which a run is stopped")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peers", type=_peers, default=USUAL, help=f"some of {','.join(KINDS)}")
    parser.add_argument(
        "--one-by-one-as-at-1",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="peers without batches are not asked for several texts; their rate is that of one, and the table says so",
    )
    parser.add_argument("--patience", type=float, default=120.0, help="seconds to wait for a quiet machine")
    parser.add_argument("--json", type=Path, help="where results go")
    parser.add_argument("--markdown", type=Path, help="where the table goes")
    return parser


def _peers(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in KINDS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no peer; expected some of {','.join(KINDS)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
