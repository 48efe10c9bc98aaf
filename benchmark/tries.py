"""Building tries and weighing their nodes, beside genlm-backend 0.3.1: `python -m benchmark.tries`.

Two vocabularies: that of a model, and one of 150,000 entries made from it by joining random pairs of its tokens, or
that of `--tokenizer`. Both packages run in processes of their own and take turns, task by task and round by round; the
first round warms up. Every task gives its full output, a number for each node. Before anything is timed, both outputs
are compared at every node, matched by the bytes that lead to it, with what genlm-backend's sequential trie computes in
float64. Each call gets another row. "After a forward": 256 MiB were read just before, as a language model's weights
are, so nothing of the trie is left in the processor's caches.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from benchmark.workers import Patience

BATCH = 32
N_ENTRIES = 150_000
SEED = 0
PREFIXES = [b" t", b" the", b"in", b"x", b" pre", b"\n", b"{", b"qu"]
AFTER_A_FORWARD = ", after a forward"
PARALLEL = ", parallel"
# Relative, at any node: sums in float32 on a device, and whatever else is added in float64.
TOLERANCE_PARALLEL = 2e-6
TOLERANCE = 3e-7


class Task(NamedTuple):
    """One row of the table.

    Attributes:
        name: What is measured.
        peer: The class of genlm-backend that does the same; None if none does.
        target: At least so many times as fast.
        repeats: Calls in one turn; the median of all calls of all rounds is told.
        whole: For a query of some nodes: our task that computes all of them, which it is compared with.
    """

    name: str
    peer: str | None
    target: float | None
    repeats: int
    whole: str | None = None


# The parallel trie of genlm-backend is its fastest for batches on a CPU, the other one for single rows.
TASKS = (
    Task("build", "sequential", 10, 1),
    Task("sum, 1 row", "sequential", 20, 20),
    Task("max, 1 row", "sequential", 20, 20),
    Task("sum, 1 row, after a forward", "sequential", 20, 10),
    Task("max, 1 row, after a forward", "sequential", 20, 10),
    Task("sum, 32 rows", "sequential", 8, 2),
    Task("max, 32 rows", "sequential", 8, 2),
    Task("sum, 32 rows, parallel", "parallel", 8, 2),
    Task("max, 32 rows, parallel", "parallel", 8, 2),
    Task("sum, 1 row, parallel", "parallel", 20, 10),
    Task("max, 1 row, parallel", "parallel", 20, 10),
    Task("logsumexp, 1 row", None, None, 10),
    Task("logsumexp, 32 rows", None, None, 1),
    Task("next bytes after a prefix, 1 row", None, None, 20, "logsumexp, 1 row"),
    Task("next bytes of a new token, 1 row", None, None, 20, "logsumexp, 1 row"),
    Task("children of one node, 1 row", None, None, 20, "sum, 1 row"),
    Task("1 prefix, 1 row", None, None, 20, "sum, 1 row"),
    Task("8 prefixes, 1 row", None, None, 20, "sum, 1 row"),
)


class Worker:
    """One package's process."""

    def __init__(self, package: str, python: Path, environment: dict[str, str] | None = None) -> None:
        from benchmark.environments import CACHE, ROOT

        CACHE.mkdir(parents=True, exist_ok=True)
        with (CACHE / f"tries-{package}.log").open("w") as log:
            self._process = subprocess.Popen(
                [str(python), "-m", "benchmark.tries", "--worker", package],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
                env=os.environ | {"HF_HUB_OFFLINE": "1"} | (environment or {}),
                start_new_session=True,  # Ctrl-C is for the one that asks
            )

    def ask(self, **question: Any) -> Any:
        """The answer to one question."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"the process of {self._process.args!r} ended; see its log in .cache/benchmark")
        return json.loads(answer)

    def close(self, at_once: bool = False) -> None:
        """End the process."""
        if at_once:
            self._process.kill()
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(60)


# ---- in a worker; only torch, numpy and the package that is measured are imported


def serve(package: str) -> None:
    """Answer questions, one line of JSON each, until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    measured = _Measured(package)
    for line in sys.stdin:
        question = json.loads(line)
        answer = getattr(measured, question.pop("method"))(**question)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


class _Measured:
    def __init__(self, package: str) -> None:
        torch.set_num_threads(2)
        self.package = package
        self.elsewhere = np.ones(2**25)

    def start(self) -> dict[str, Any]:
        """Import; then the first trie and the first sums, compiled or read from the cache."""
        from benchmark.worker import installed_version

        started = time.perf_counter()
        if self.package == "ours":
            import genlm_backend
            from genlm_backend import tokenization, trie

            version = genlm_backend.__version__
        else:
            from genlm.backend import tokenization, trie

            version = installed_version("genlm-backend")
        self.trie, self.tokenization = trie, tokenization
        import_s = time.perf_counter() - started
        started = time.perf_counter()
        small = trie.TokenCharacterTrie([tokenization.Token(i, word) for i, word in enumerate([b"a", b"ab", b"b"])])
        for rows in (np.ones((1, 3), np.float32), np.ones((1, 3))):
            small.weight_sum(rows[0])
            small.weight_max(rows[0])
        return {"version": version, "import_s": import_s, "first_use_s": time.perf_counter() - started}

    def load(self, words: list[str], scale: float) -> dict[str, Any]:
        """Take a vocabulary, and make the rows; gives the number of nodes and a digest of what they stand for."""
        self.decode = [self.tokenization.Token(i, base64.b64decode(word)) for i, word in enumerate(words)]
        self.rows = peaked_rows(BATCH, len(self.decode), scale)
        self.sequential = self.trie.TokenCharacterTrie(self.decode)
        self.parallel = self.trie.ParallelTokenCharacterTrie(self.decode, device="cpu")
        if self.package == "ours":
            self.log_rows = np.log(self.rows)
            self.new_token = self.trie.NextByteTokens(self.sequential)
            self.after = self.trie.NextByteTokens(self.sequential, b" t")
        digests = set()
        for trie in (self.sequential, self.parallel):
            self.by_path, digest = by_path(trie.children, trie.root)
            digests.add(digest)
        assert len(digests) == 1  # the same numbering in both
        return {"n_nodes": len(self.by_path), "digest": digest}

    def save(self, name: str, path: str) -> None:
        """Write the output of a task, its nodes in the order of their bytes."""
        self.row = torch.from_numpy(self.rows[0])
        np.save(path, np.asarray(self._work(name)(), np.float64)[..., self.by_path])

    def run(self, name: str, repeats: int) -> list[float]:
        """Seconds of each call."""
        work = self._work(name)
        seconds = []
        for i in range(repeats):
            self.row = torch.from_numpy(self.rows[i % BATCH])
            if name.endswith(AFTER_A_FORWARD):
                self.elsewhere.sum()
            started = time.perf_counter()
            output = work()
            seconds.append(time.perf_counter() - started)
            del output  # freed between two calls, outside what is timed
        return seconds

    def _work(self, name: str) -> Callable[[], Any]:
        if name.endswith(AFTER_A_FORWARD):
            return self._work(name.removesuffix(AFTER_A_FORWARD))
        sequential, parallel, rows = self.sequential, self.parallel, torch.from_numpy(self.rows)
        work: dict[str, Callable[[], Any]] = {
            "build": lambda: _ready(self.trie.TokenCharacterTrie(self.decode)),
            "sum, 1 row": lambda: sequential.weight_sum(self.row),
            "max, 1 row": lambda: sequential.weight_max(self.row),
            "sum, 1 row, parallel": lambda: parallel.weight_sum(self.row),
            "max, 1 row, parallel": lambda: parallel.weight_max(self.row),
            "sum, 32 rows": lambda: sequential.batch_weight_sum(rows),
            "max, 32 rows": lambda: sequential.batch_weight_max(rows),
            "sum, 32 rows, parallel": lambda: parallel.batch_weight_sum(rows),
            "max, 32 rows, parallel": lambda: parallel.batch_weight_max(rows),
            "logsumexp, 1 row": lambda: sequential.weight_logsumexp(self.log_rows[0]),
            "logsumexp, 32 rows": lambda: sequential.batch_weight_logsumexp(self.log_rows),
            "next bytes after a prefix, 1 row": lambda: self.after.log_masses(self.log_rows[0]).log_masses,
            "next bytes of a new token, 1 row": lambda: self.new_token.log_masses(self.log_rows[0]).log_masses,
            "children of one node, 1 row": lambda: sequential.children_weights(self.row, sequential.find(b" t")),
            "1 prefix, 1 row": lambda: sequential.prefix_weights(self.row, PREFIXES[:1]),
            "8 prefixes, 1 row": lambda: sequential.prefix_weights(self.row, PREFIXES),
        }
        return work[name]


def _ready(trie: Any) -> Any:
    """Ours prepares its sums at the first one; that belongs to building. Freeing does not: the trie is returned."""
    if hasattr(trie, "layout"):
        _ = trie.layout.forks
    return trie


def by_path(children: Sequence[Any], root: int) -> tuple[npt.NDArray[np.int64], str]:
    """The nodes in the order of the bytes that lead to them, parents first, and a digest of those bytes.

    A leaf hangs on the edge `(None, index of its token)` and comes before what goes on.
    """
    nodes, digest, waiting = [], hashlib.sha256(), [((), int(root))]
    while waiting:
        edge, node = waiting.pop()
        nodes.append(node)
        below = sorted(
            ((edge[1],) if isinstance(edge, tuple) else (-1, int(edge)), int(child))
            for edge, child in dict(children[node]).items()
        )
        digest.update(repr((edge, len(below))).encode())
        waiting.extend(reversed(below))
    return np.array(nodes), digest.hexdigest()


def peaked_rows(n: int, n_tokens: int, scale: float) -> npt.NDArray[np.float32]:
    """Rows of probabilities as a model's are: few tokens hold most of the mass."""
    logits = np.random.default_rng(SEED).normal(0, scale, (n, n_tokens))
    p = np.exp(logits - logits.max(1, keepdims=True))
    return (p / p.sum(1, keepdims=True)).astype(np.float32)


# ---- in the main process


def joined(vocabulary: Sequence[bytes], n: int) -> list[bytes]:
    """A vocabulary of n entries: this one, and joined random pairs of its entries."""
    rng = np.random.default_rng(SEED)
    words = dict.fromkeys(vocabulary)
    while len(words) < n:
        pairs = rng.integers(0, len(vocabulary), (n - len(words), 2)).tolist()
        words.update(dict.fromkeys(vocabulary[a] + vocabulary[b] for a, b in pairs))
    return list(words)[:n]


def measure(options: argparse.Namespace, tell: Callable[[str], None]) -> dict[str, Any]:
    """Run every task on both packages."""
    from benchmark.environments import genlm_python
    from benchmark.machine import commit, describe_machine
    from benchmark.workers import Patience

    patience = Patience(options.patience)
    vocabularies = read_vocabularies(options)
    cold_s = first_use_without_cache()
    workers = {"ours": Worker("ours", Path(sys.executable)), "genlm": Worker("genlm", genlm_python(tell))}
    ready = {package: worker.ask(method="start") for package, worker in workers.items()}
    tables = {}
    is_measured = is_interrupted = False
    for title, words in vocabularies.items():
        tell(f"building tries of {title}")
        encoded = [base64.b64encode(word).decode() for word in words]
        tries = {package: worker.ask(method="load", words=encoded, scale=4.0) for package, worker in workers.items()}
        assert tries["ours"] == tries["genlm"], tries
        tell(f"{title}: comparing every node")
        errors = compare(workers)
        seconds: dict[str, dict[str, list[float]]] = {task.name: {package: [] for package in workers} for task in TASKS}
        n_nodes = tries["ours"]["n_nodes"]
        tables[title] = {"n_tokens": len(words), "n_nodes": n_nodes, "seconds": seconds, "largest_errors": errors}
        try:
            for turn in range(options.rounds + 1):
                tell(f"{title}: round {turn} of {options.rounds}")
                _take_turns(workers, seconds if turn else None, patience)
                is_measured = is_measured or bool(turn)
        except KeyboardInterrupt:  # the rounds that were done are told
            if not is_measured:
                for worker in workers.values():
                    worker.close(at_once=True)
                raise
            is_interrupted = True
            tell("interrupted")
            break
    for worker in workers.values():
        worker.close(at_once=is_interrupted)
    return {
        "commit": commit(),
        "machine": describe_machine(),
        "packages": ready,
        "ours_first_use_without_cache_s": cold_s,
        "is_interrupted": is_interrupted,
        "vocabularies": tables,
    }


def _take_turns(
    workers: dict[str, Worker], seconds: dict[str, dict[str, list[float]]] | None, patience: Patience
) -> None:
    """One round of every task; without `seconds` to put the times into, a warm-up."""
    for task in TASKS:
        patience.wait_for_quiet()
        for package, worker in workers.items():
            if package == "ours" or task.peer is not None:
                answer = worker.ask(method="run", name=task.name, repeats=task.repeats)
                if seconds is not None:
                    seconds[task.name][package] += answer


def compare(workers: dict[str, Worker]) -> dict[str, dict[str, float]]:
    """By task and package: the largest error at any node of any row, relative to genlm-backend's float64.

    The float32 sums of genlm-backend's parallel trie are off by much more than ours may be; that is told, not judged.
    """
    found = {}
    with tempfile.TemporaryDirectory() as folder:

        def output(package: str, name: str) -> npt.NDArray[np.float64]:
            path = Path(folder) / f"{package}.npy"
            workers[package].ask(method="save", name=name, path=str(path))
            array: npt.NDArray[np.float64] = np.load(path)
            return array

        names = [f"{operation}, {rows}" for operation in ("sum", "max") for rows in ("1 row", f"{BATCH} rows")]
        for name in names:
            right = output("genlm", name)
            for of_class, tolerance in (("", TOLERANCE), (PARALLEL, TOLERANCE_PARALLEL)):
                errors = {package: _largest_error(output(package, name + of_class), right) for package in workers}
                if not errors["ours"] <= tolerance:
                    raise SystemExit(f"{name + of_class}: ours is off by {errors['ours']:.2g} at some node")
                found[name + of_class] = errors
    return found


def _largest_error(array: npt.NDArray[np.float64], right: npt.NDArray[np.float64]) -> float:
    assert array.shape == right.shape and right.all()
    return float((np.abs(array - right) / np.abs(right)).max())


def read_vocabularies(options: argparse.Namespace) -> dict[str, list[bytes]]:
    """The two vocabularies, by name."""
    from genlm_backend.llm.demo_model import resolve_model
    from genlm_backend.llm.loading import load_tokenizer
    from genlm_backend.tokenization import decode_vocab

    def read(name: str) -> list[bytes]:
        path = resolve_model(name, lambda _: None) if not Path(name).exists() else Path(name)
        return [token.byte_string for token in decode_vocab(load_tokenizer(str(path)))[0]]

    first = read(options.model)
    large = joined(first, N_ENTRIES) if options.tokenizer is None else read(options.tokenizer)
    return {options.model: first, f"{len(large):,} entries": large}


def first_use_without_cache() -> float:
    """Seconds until ours has built its first trie and summed, when numba has to compile everything."""
    with tempfile.TemporaryDirectory() as folder:
        worker = Worker("ours", Path(sys.executable), {"NUMBA_CACHE_DIR": folder})
        first_use_s: float = worker.ask(method="start")["first_use_s"]
        worker.close()
    return first_use_s


def main() -> int:
    """Measure, print the tables, keep every number."""
    from rich.console import Console
    from rich.table import Table

    from benchmark.environments import CACHE

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="whose vocabulary")
    parser.add_argument("--tokenizer", help="a folder with the large vocabulary, instead of the made one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--patience", type=float, default=120.0, help="most seconds to wait for a quiet machine")
    parser.add_argument("--json", type=Path, default=CACHE / "tries.json")
    parser.add_argument("--markdown", type=Path, help="where the table goes as Markdown, if anywhere")
    options = parser.parse_args()
    console, progress = Console(), Console(stderr=True)
    report = measure(options, lambda text: progress.print(f"{text} ...", markup=False))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if options.markdown is not None:
        options.markdown.write_text(to_markdown(report), encoding="utf-8")
    for title, of_vocabulary in report["vocabularies"].items():
        table = Table(title=f"{title}: {of_vocabulary['n_tokens']:,} tokens, {of_vocabulary['n_nodes']:,} nodes")
        for column in ("", "ours, ms", "genlm-backend, ms", "times", "target", "off by, ours", "theirs"):
            table.add_column(column, justify="right" if column else "left")
        for task in TASKS:
            seconds = of_vocabulary["seconds"][task.name]
            ours, theirs = (_spread(seconds[package]) for package in ("ours", "genlm"))
            if task.whole:
                theirs = f"ours, {task.whole}"
            errors = of_vocabulary["largest_errors"].get(task.name, {})
            off_by = [f"{errors[package]:.1e}" if errors else "" for package in ("ours", "genlm")]
            target = f"{task.target:g}" if task.target else ""
            table.add_row(task.name, ours, theirs, _times(task, of_vocabulary), target, *off_by)
        console.print(table)
    for note in _notes(report):
        console.print(note, soft_wrap=True, markup=False)
    console.print(f"every number: {options.json}", soft_wrap=True)
    return 0


def to_markdown(report: dict[str, Any]) -> str:
    """The table, for the documentation."""
    from benchmark.machine import markdown_table, with_notes

    header, rows = ["", "target"], []
    for title, of_vocabulary in report["vocabularies"].items():
        header += [f"{title}, {of_vocabulary['n_tokens']:,} tokens: ours / theirs, ms", "times"]
    for task in TASKS:
        row = [task.name, f"{task.target:g}" if task.target else ""]
        for of_vocabulary in report["vocabularies"].values():
            medians = [_median_ms(of_vocabulary["seconds"][task.name][package]) for package in ("ours", "genlm")]
            row += [" / ".join(filter(None, medians)), _times(task, of_vocabulary)]
        rows.append(row)
    return with_notes(markdown_table(header, rows), _notes(report))


def _notes(report: dict[str, Any]) -> Iterator[str]:
    from benchmark.machine import machine_line

    packages = report["packages"]
    yield (
        f"first use (import of numba, first trie, first sums): {packages['ours']['first_use_s']:.1f} s, "
        f"{report['ours_first_use_without_cache_s']:.1f} s when compiled for the first time on a machine; "
        f"genlm-backend {packages['genlm']['version']}: {packages['genlm']['first_use_s']:.1f} s, each time"
    )
    for title, of_vocabulary in report["vocabularies"].items():
        for package in ("ours", "genlm"):
            errors = {
                name: max(
                    (of_task[package] for task, of_task in of_vocabulary["largest_errors"].items() if name in task),
                    default=0.0,
                )
                for name in ("sum", "max")
            }
            yield f"{title}, largest relative error of {package}: " + ", ".join(
                f"{name} {error:.1e}" for name, error in errors.items()
            )
    if report["is_interrupted"]:
        yield "interrupted before all rounds were done: the medians are of fewer"
    changed = " with changes" if report["commit"]["has_changes"] else ""
    yield f"{machine_line(report['machine'])}; 2 threads; commit {report['commit']['id'][:12]}{changed}"
    yield (
        "medians (in the terminal with the 10th to 90th percentile) of all calls; those of a few nodes are compared "
        "with our own call for all nodes"
    )


def _times(task: Task, of_vocabulary: dict[str, Any]) -> str:
    seconds = of_vocabulary["seconds"]
    slower = seconds[task.whole]["ours"] if task.whole else seconds[task.name]["genlm"]
    return f"{statistics.median(slower) / statistics.median(seconds[task.name]['ours']):.1f}" if slower else ""


def _median_ms(seconds: Sequence[float]) -> str:
    if not seconds:
        return ""
    median_ms = statistics.median(seconds) * 1e3
    return f"{median_ms:,.0f}" if median_ms >= 100 else f"{median_ms:.3g}"


def _spread(seconds: Sequence[float]) -> str:
    if not seconds:
        return ""
    low, median, high = np.quantile(np.array(seconds) * 1e3, [0.1, 0.5, 0.9])
    return f"{median:.3g} ({low:.3g} to {high:.3g})"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        serve(sys.argv[2])
    else:
        sys.exit(main())
