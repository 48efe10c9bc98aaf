"""TeamFunction: every task is done once, by as many threads as asked; the same without OpenMP and without a cache."""

from __future__ import annotations

import ctypes
import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch

from genlm_backend import compiled as of_module
from genlm_backend import team
from genlm_backend.bits import count_up, pointer
from genlm_backend.team import TeamFunction, has_team

_INT64 = np.uint64(0)


def _mark(work: Any) -> None:
    """Add 1 for each of work[1] tasks, and see how many threads there are."""
    marks, n = numba.carray(pointer(work[2], _INT64), work[1]), work[1]
    count_up_threads = numba.carray(pointer(work[3], _INT64), 1)
    is_counted = False
    while True:
        task = count_up(work)
        if task >= n:
            return
        if not is_counted:
            count_up_threads[0] += np.uint64(1)
            is_counted = True
        marks[task] += np.uint64(1)
        wasted = 0.0
        for i in range(2000):
            wasted += np.sqrt(float(i + task))
        if wasted < 0:
            return


@pytest.fixture(scope="module")
def mark() -> TeamFunction:
    return TeamFunction(_mark)


def run(function: TeamFunction, n_threads: int, n: int = 4000) -> tuple[np.ndarray[Any, Any], int]:
    marks, threads = np.zeros(n, np.int64), np.zeros(1, np.int64)
    function((n, marks.ctypes.data, threads.ctypes.data), n_threads)
    return marks, int(threads[0])


@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_every_task_is_done_once(mark: TeamFunction, n_threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)  # of this thread's team
    try:
        for _ in range(20):
            marks, n_seen = run(mark, n_threads)
            assert (marks == 1).all() and 1 <= n_seen <= n_threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not has_team(), reason="this torch has no OpenMP")
def test_threads_are_torchs_own(mark: TeamFunction) -> None:
    """A product with two threads makes torch's team; the function adds none."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.ones(400, 400) @ torch.ones(400, 400)
        torch.ones(10**6).sum()
        n_tasks = len(list(Path("/proc/self/task").iterdir())) if Path("/proc/self/task").exists() else 0
        most = max(run(mark, 2)[1] for _ in range(50))
        assert most == 2
        assert not n_tasks or len(list(Path("/proc/self/task").iterdir())) <= n_tasks  # one of others may have ended
    finally:
        torch.set_num_threads(before)


def test_without_openmp_the_calling_thread_does_it_all(mark: TeamFunction, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(team, "_parallel", lambda: None)
    assert not has_team()
    marks, n_seen = run(mark, 3)
    assert (marks == 1).all() and n_seen == 1


def test_all_threads_are_used_or_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A team of another size would make OpenMP end threads that torch starts again."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    assert [team.threads_for(n) for n in (0, 1, 127, 128, 500)] == [1, 1, 1, 16, 16]
    with ThreadPoolExecutor(1) as not_main:
        assert list(not_main.map(team.threads_for, (0, 7, 8, 50))) == [1, 1, 16, 16]


@pytest.mark.slow
def test_a_fork_of_a_process_that_had_no_team_of_ours_does_not_wait_for_torchs_threads() -> None:
    program = """
import os, sys, torch
from genlm_backend import sampling
torch.set_num_threads(2)
rows = torch.randn(200, 20_000)
torch.mm(rows, rows.t())
child = os.fork()
if not child:
    sampling.draw(rows, range(200))
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "0"


def test_openmp_is_looked_for_where_torch_is_linked(monkeypatch: pytest.MonkeyPatch) -> None:
    find = team._parallel.__wrapped__
    assert find() is not None or not torch.backends.openmp.is_available()
    with monkeypatch.context() as patched:
        patched.setattr(torch.backends.openmp, "is_available", lambda: False)
        assert find() is None
    monkeypatch.setattr(ctypes, "CDLL", lambda path: object())  # one that has no such function
    assert find() is None


@pytest.mark.thorough
@pytest.mark.parametrize("harm", [lambda f: f.write_bytes(b""), lambda f: f.write_bytes(f.read_bytes()[:50])])
def test_a_damaged_file_costs_one_more_compilation(
    harm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(of_module, "_told", set())
    TeamFunction(_mark)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert files
    for file in files:
        harm(file)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert (run(TeamFunction(_mark), 1, 10)[0] == 1).all()
    assert caplog.text.count("compiling anew") == 1


@pytest.mark.thorough
def test_without_a_folder_it_is_compiled_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr("numba.core.ccallback.CFunc.enable_caching", refuse)
    assert (run(TeamFunction(_mark), 1, 10)[0] == 1).all()
