"""The programs of docs/tries.md run as pasted, each alone, on the real model where the page says so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "tries.md"
BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", re.DOTALL)


def run(containing: str) -> tuple[dict[str, Any], str]:
    """What the one program of the page with this in it leaves behind, and what the page says that it prints."""
    ((source, printed),) = [pair for pair in BLOCK.findall(PAGE.read_text(encoding="utf-8")) if containing in pair[0]]
    names: dict[str, Any] = {"__name__": "pasted"}
    exec(compile(source, str(PAGE), "exec"), names)
    return names, printed


def test_four_words() -> None:
    names, _ = run("mass_sum")
    assert len(names["masses"]) == 13


@pytest.mark.model
@pytest.mark.timeout(300)  # loading, where the machine has other work
def test_masses_of_the_real_model(
    smollm2_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("genlm_backend.llm.loading.multiplies_bfloat16", lambda: False)  # float32, as on the page
    _, printed = run("ByteMarginal")
    assert printed and capsys.readouterr().out == printed


def test_every_program_is_run() -> None:
    assert len(BLOCK.findall(PAGE.read_text(encoding="utf-8"))) == 2
