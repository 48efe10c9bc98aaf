"""A peer in a process of its own: loads once, then answers requests, one line of JSON each, until its input ends.

Runs in the peer's virtual environment: only the standard library and torch are imported here.
"""

from __future__ import annotations

import asyncio
import gc
import importlib.metadata
import json
import os
import platform
import sys
import sysconfig
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from benchmark.workloads import Workload, from_json


def installed_version(name: str) -> str:
    """Of what is installed in this environment: the folder that it runs in has a genlm-backend of its own."""
    (found,) = importlib.metadata.distributions(name=name, path=[sysconfig.get_path("purelib")])
    return found.version


class Timing(NamedTuple):
    """Seconds since the start, all on one clock.

    Attributes:
        first_s: Until every particle had its first token: the prompt is computed within.
        total_s: Until every particle had its last.
        n_tokens: Tokens drawn in all.
        draw_s: Time spent drawing tokens from rows, where the peer leaves that to its user.
        counts: What else the peer counted.
        texts: What each particle wrote, where its text and not its length is the task.
    """

    first_s: float
    total_s: float
    n_tokens: int
    draw_s: float | None = None
    counts: dict[str, float] | None = None
    texts: list[str] | None = None


class Peer(ABC):
    """What a file in `benchmark.peers` defines."""

    @abstractmethod
    def __init__(self, model_path: str) -> None:
        """Load the model, in bfloat16."""

    @abstractmethod
    def clear(self) -> None:
        """Forget what earlier runs left in caches; not timed."""

    @abstractmethod
    def run(self, workload: Workload) -> Timing:
        """Grow the particles; the prompt is computed within."""

    def version(self) -> str:
        """Of the software that is measured."""
        return importlib.metadata.version("transformers")


NextToken = Callable[[int, int, list[int]], Awaitable[int]]
"""Particle, step, and its tokens so far, to its next token."""


async def grow(workload: Workload, next_token: NextToken) -> tuple[float, float, int]:
    """One coroutine per particle, all at once: the time on the clock when each had one token, when all were done, and
    the number of tokens.
    """
    first: list[float] = []

    async def particle(index: int) -> int:
        ids = list(workload.prompt_ids)
        for step in range(workload.n_steps):
            ids.append(await next_token(index, step, ids))
            if step == 0:
                first.append(time.perf_counter())
        return len(ids) - len(workload.prompt_ids)

    n_tokens = await asyncio.gather(*(particle(i) for i in range(workload.n_particles)))
    return max(first), time.perf_counter(), sum(n_tokens)


def serve(peer_class: type[Peer]) -> None:
    """Be the worker: `python -m benchmark.peers.NAME MODEL_PATH THREADS`."""
    answers = _private_stdout()
    try:
        peer, ready = _load(peer_class, sys.argv[1], int(sys.argv[2]))
    except Exception as error:
        _send(answers, {"error": _in_words(error)})
        return
    _send(answers, ready)
    for line in sys.stdin:
        try:
            answer = _run(peer, from_json(json.loads(line)))
        except Exception as error:
            answer = {"error": _in_words(error)}
        _send(answers, answer)


def _private_stdout() -> TextIO:
    """Where answers go; whatever else prints goes to the error stream."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def _load(peer_class: type[Peer], model_path: str, n_threads: int) -> tuple[Peer, dict[str, Any]]:
    import torch

    torch.set_num_threads(n_threads)
    started = time.perf_counter()
    peer = peer_class(model_path)
    load_s = time.perf_counter() - started
    if torch.get_num_threads() != n_threads:
        raise RuntimeError(
            f"torch has {torch.get_num_threads()} threads after loading; all peers are given {n_threads}"
        )
    gc.collect()
    ready = {
        "load_s": load_s,
        "peak_bytes": _memory_bytes("VmHWM"),
        "rss_bytes": _memory_bytes("VmRSS"),
        "threads": torch.get_num_threads(),
        "version": peer.version(),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy")},
    }
    return peer, ready


def _run(peer: Peer, workload: Workload) -> dict[str, Any]:
    peer.clear()
    gc.collect()
    _reset_peak()
    cpu_s = time.process_time()
    timing = peer.run(workload)
    expected = workload.n_particles * workload.n_steps
    if timing.texts is None and timing.n_tokens != expected:
        raise RuntimeError(f"{timing.n_tokens} tokens were drawn; expected {expected}")
    return timing._asdict() | {
        "cpu_s": time.process_time() - cpu_s,
        "peak_bytes": _memory_bytes("VmHWM"),
        "rss_bytes": _memory_bytes("VmRSS"),
    }


def _memory_bytes(name: str) -> int | None:
    """Resident memory of this process, now or at its peak; None where the system does not tell."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def _send(answers: TextIO, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


def _in_words(error: Exception) -> str:
    traceback.print_exc()
    return f"{type(error).__name__}: {error}"
