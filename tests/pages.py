"""How the programs on pages of the documentation are run again, to be compared with what is printed there."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parent.parent
# The pages were made with the model in its own bfloat16, which a processor without fast products of it would widen.
SAME_TYPE = "from genlm_backend.llm import loading\nloading._widen = lambda model: None\n"


def page_environment(folder: Path) -> dict[str, str]:
    """The environment of a process in which models keep their checkpoint's type; Python reads a file in `folder`."""
    (folder / "sitecustomize.py").write_text(SAME_TYPE, encoding="utf-8")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), "HF_HUB_OFFLINE": "1"}
