"""The programs of docs/vocabularies.md run as pasted, one after the other, and print what the page says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "vocabularies.md"
BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", re.DOTALL)


@pytest.mark.model
def test_the_programs_print_what_the_page_says(smollm2_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {"__name__": "pasted"}
    blocks = BLOCK.findall(PAGE.read_text(encoding="utf-8"))
    assert len(blocks) == 6
    for source, printed in blocks:
        exec(compile(source, str(PAGE), "exec"), names)
        assert capsys.readouterr().out == printed
