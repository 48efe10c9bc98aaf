"""Processes that answer a benchmark's workloads, each in the Python of its peer; and waiting for a quiet machine."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from benchmark.environments import CACHE, ROOT
from benchmark.machine import dtype
from benchmark.workloads import Workload

QUIET_CORES = 0.2  # more than this, busy with anything else, disturbs a run; the housekeeping of a machine is below


class Patience:
    """How many more seconds may be spent on waiting for a quiet machine and on repeating disturbed runs."""

    def __init__(self, seconds: float) -> None:
        self.left_s = seconds

    def wait_for_quiet(self) -> None:
        """Return when the machine has been quiet for a second, or patience is out."""
        while self.left_s > 0:
            before, started = busy_s(), time.perf_counter()
            time.sleep(1.0)
            waited_s = time.perf_counter() - started
            if (busy_s() - before) / waited_s <= QUIET_CORES:
                return
            self.left_s -= waited_s


class WorkerFailed(Exception):
    """A peer raised, or its process ended."""


class Worker:
    """A peer's process."""

    def __init__(self, name: str, python: Path, model_path: Path, n_threads: int) -> None:
        self.name = name
        CACHE.mkdir(parents=True, exist_ok=True)
        self._log = CACHE / f"{name}.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [str(python), "-m", f"benchmark.peers.{name}", str(model_path), str(n_threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
                start_new_session=True,  # Ctrl-C is for the driver, which ends its workers
                env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(n_threads), "BENCHMARK_DTYPE": dtype()},
            )
        self.ready = self._receive()

    def run(self, workload: Workload, *, at_most_s: float | None = None) -> dict[str, Any]:
        """What the worker measured.

        Args:
            workload: What it is to do.
            at_most_s: Seconds after which its process is ended.

        Raises:
            WorkerFailed: It raised, or ended, or was ended.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(workload._asdict()) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        if at_most_s is None:
            return self._receive()
        timer = threading.Timer(at_most_s, self._process.kill)
        timer.start()
        try:
            return self._receive()
        except WorkerFailed as failure:
            raise failure if timer.is_alive() else WorkerFailed(f"no answer within {at_most_s:.0f} s") from failure
        finally:
            timer.cancel()

    def cpu_s(self) -> float:
        """Processor time used so far by a process that lives."""
        times = psutil.Process(self._process.pid).cpu_times()
        return float(times.user + times.system)

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            pass
        try:
            self._process.wait(10)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):  # the second Ctrl-C loses nothing
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        message: dict[str, Any] = json.loads(line)
        if "error" in message:
            raise WorkerFailed(message["error"])
        return message

    def _ended(self) -> WorkerFailed:
        code = self._process.wait()
        last = self._log.read_text(errors="replace").splitlines()[-3:]
        return WorkerFailed(f"its process ended with code {code}: {' '.join(last)}")


def busy_s() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.system + getattr(times, "nice", 0.0))
