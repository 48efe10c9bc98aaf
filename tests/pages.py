"""How the programs on pages of the documentation are run again, to be compared with what is printed there."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
# The pages were made in float32: rows in bfloat16 differ by 1e-2 between processors, those in float32 by 2e-5.
IN_FLOAT32 = "from genlm_backend.llm import loading\nloading.multiplies_bfloat16 = lambda: False\n"


def page_environment(folder: Path) -> dict[str, str]:
    """The environment of a process that loads models in float32; Python reads a file in `folder`."""
    (folder / "sitecustomize.py").write_text(IN_FLOAT32, encoding="utf-8")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), "HF_HUB_OFFLINE": "1"}


def n_lines_apart(printed: str, on_the_page: str) -> int:
    """How many lines differ by more than their numbers."""
    lines = [without_numbers(text).splitlines() for text in (printed, on_the_page)]
    matching = difflib.SequenceMatcher(None, *lines, autojunk=False).get_matching_blocks()
    return max(map(len, lines)) - sum(block.size for block in matching)


def without_numbers(text: str) -> str:
    return re.sub(r"-?\d+(\.\d+)?", "#", text)
