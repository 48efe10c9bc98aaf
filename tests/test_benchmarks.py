"""Benchmarks that need no peer run, in their smallest form: nothing else would notice that one is broken."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.parametrize(
    "arguments",
    [
        ["benchmark.grammars", "--masks", "--repeats", "1"],
        ["benchmark.smc", "--ours", "--only", "json", "--particles", "2", "--repeats", "1"],
        ["benchmark.engines", "--peers", "ours", "--cells", "2x3", "--steps", "2", "--repeats", "1", "--patience", "0"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_benchmark_runs(arguments: list[str], smollm2_path: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", *arguments, "--json", str(report)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(report.read_text(encoding="utf-8"))["commit"]
