"""The programs on the pages about backtracking run as printed, in the order of the pages."""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
from pathlib import Path

import pytest

import genlm_backend
from genlm_backend.backtracking import generator
from genlm_backend.llm import MockAsyncLM

DOCS = Path(__file__).parents[2] / "docs" / "backtracking"


@pytest.mark.model
def test_programs_on_the_pages_run(smollm2_path, tmp_path, monkeypatch, capsys):
    """Only the tokenizer is the real one: the rows are noise, which is quick, and takes back as much as any."""
    monkeypatch.chdir(tmp_path)

    def load(name, backend=None, llm_opts=None):
        return MockAsyncLM.from_name(name)

    monkeypatch.setattr(genlm_backend, "load_model_by_name", load, raising=False)
    monkeypatch.setattr(generator, "load_model_by_name", load)
    names: dict = {}
    for page in ("index", "migration", "extending", "modes"):
        exec("from genlm_backend.backtracking import *", names)
        names |= {"prompt": "Montreal is", "rules": names.get("ban")}
        for block in re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(), re.DOTALL):
            block = block.replace("range(100)", "range(3)")
            code = compile(block, page, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            outcome = eval(code, names)
            if inspect.iscoroutine(outcome):
                asyncio.run(outcome)
    assert (tmp_path / "walk.html").exists()
    assert capsys.readouterr().out
    names["llm"].close()
    names["generator"].llm.close()
