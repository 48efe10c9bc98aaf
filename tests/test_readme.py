"""The programs that README.md and the quick start print, run as printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def programs(page: str) -> list[str]:
    """The Python blocks of a page that belong together: each starts where one imports asyncio."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    runnable = [block for block in blocks if "import" in block]
    joined: list[str] = []
    for block in runnable:
        if block.startswith("import asyncio") or not joined:
            joined.append(block)
        else:
            joined[-1] += block
    return joined


def run_program(program: str, folder: Path) -> str:
    """What a program prints, in a process of its own."""
    script = folder / "program.py"
    script.write_text(program, encoding="utf-8")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, timeout=280)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.model
@pytest.mark.timeout(300)
def test_the_quick_start_runs_as_printed(smollm2_path: Path, tmp_path: Path) -> None:
    (program,) = programs("docs/index.md")
    printed = run_program(program, tmp_path)
    assert len(printed.splitlines()) >= 16  # five tokens, ten continuations, the counts
    assert "batches=10" in printed


@pytest.mark.model
@pytest.mark.timeout(300)
def test_the_readme_runs_as_printed(smollm2_path: Path, tmp_path: Path) -> None:
    (program,) = programs("README.md")
    lines = run_program(program, tmp_path).splitlines()
    weights = [float(line.split()[0]) for line in lines if re.match(r"\d\.\d{3}  Montreal is", line)]
    assert len(weights) == 10
    assert sum(weights) == pytest.approx(1.0, abs=0.01)
    (evidence,) = [float(line.split()[-1]) for line in lines if line.startswith("log evidence")]
    assert -10 < evidence < 0
    assert any("requests=100, batches=10, forwards=10" in line for line in lines)
