"""Virtual environments of the peers, made once under `.cache/benchmark/` in the repository."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
CACHE = ROOT / ".cache" / "benchmark"
GENLM_VERSION = "0.3.1"


class PeerUnavailable(Exception):
    """A peer cannot be measured here; says why."""


def our_python(tell: Callable[[str], None]) -> Path:
    """The Python that runs this."""
    return Path(sys.executable)


def our_torch() -> str:
    """The requirement that is our torch: first, from the default index and without a local part (+cpu), so that what
    follows is resolved against it."""
    return f"torch=={importlib.metadata.version('torch').split('+')[0]}"


def genlm_python(tell: Callable[[str], None]) -> Path:
    """The Python of an environment with genlm-backend from PyPI, on our torch and our transformers.

    Raises:
        PeerUnavailable: It could not be installed.
    """
    transformers = importlib.metadata.version("transformers")
    steps = [[our_torch()], [f"genlm-backend=={GENLM_VERSION}", f"transformers=={transformers}"]]
    return make_environment(f"genlm-backend-{GENLM_VERSION}", steps, tell)


def make_environment(name: str, steps: list[list[str]], tell: Callable[[str], None]) -> Path:
    """The Python of `.cache/benchmark/NAME`, made with one `pip install` per step unless it is there already.

    Raises:
        PeerUnavailable: A step failed; what is there is made anew the next time.
    """
    folder = CACHE / name
    stamp = folder / "installed.json"
    wanted = json.dumps([sys.version_info[:2], steps])
    python = folder / "bin" / "python"
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    tell(f"making the environment of {name}")
    _run([sys.executable, "-m", "venv", str(folder)])
    for step in steps:
        tell(f"installing {' '.join(step)}")
        _run([str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check", *step])
    stamp.write_text(wanted)
    return python


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise PeerUnavailable(f"`{' '.join(command[1:])}` failed: {' '.join(errors[-3:])}")
