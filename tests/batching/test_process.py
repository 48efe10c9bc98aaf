"""The end of a process, Ctrl-C and fork: no hang, nothing on standard error, the right exit status."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXPECTED = {
    "exit_after_import": 0,
    "exit_after_load": 0,
    "exit_after_use": 0,
    "exit_mid_batch": 0,
    "exit_with_a_stuck_batch": 0,
    "interrupted_mid_batch": 130,
    "interrupted_in_a_synchronous_call": 130,
    "forked": 0,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What became of every scenario; see `processes`."""
    folder = tmp_path_factory.mktemp("processes")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "default"}
    command = [sys.executable, str(Path(__file__).with_name("processes.py")), str(folder), *EXPECTED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("scenario", EXPECTED)
def test_the_process_ends_well(folder: Path, scenario: str) -> None:
    code, seconds = (folder / f"{scenario}.code").read_text().split()
    assert (folder / f"{scenario}.err").read_text() == ""
    assert int(code) == EXPECTED[scenario]
    assert float(seconds) < 20, "generous: what is stuck is waited for two seconds"
