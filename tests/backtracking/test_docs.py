"""The programs on the pages about backtracking run as printed, in the order of the pages."""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs" / "backtracking"


@pytest.mark.model
def test_programs_on_the_pages_run(smollm2_path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for page in ("index", "migration", "extending", "modes"):
        exec("from genlm_backend.backtracking import *", names)
        names |= {"prompt": "Montreal is", "rules": names.get("ban")}
        for block in re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(), re.DOTALL):
            block = block.replace("range(100)", "range(3)").replace("max_new_tokens=40", "max_new_tokens=12")
            code = compile(block, page, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            outcome = eval(code, names)
            if inspect.iscoroutine(outcome):
                asyncio.run(outcome)
    assert (tmp_path / "walk.html").exists()
    assert capsys.readouterr().out
    names["llm"].close()
    names["generator"].llm.close()
