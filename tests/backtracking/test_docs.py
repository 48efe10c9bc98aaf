"""The programs on the pages about backtracking run as printed, in the order of the pages."""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import genlm_backend
from genlm_backend.backtracking import generator
from genlm_backend.llm import MockAsyncLM
from tests.pages import n_lines_apart, page_environment

DOCS = Path(__file__).parents[2] / "docs" / "backtracking"


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_notebook_runs_as_shown(smollm2_path, tmp_path):
    """But for a draw that is another token on another machine: a line, and the trace of the first walk."""
    environment = page_environment(tmp_path)
    command = [sys.executable, str(DOCS / "make_notebook.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made, shown = ((folder / "notebook.md").read_text() for folder in (tmp_path, DOCS))
    assert n_lines_apart(made, shown) <= 2
    cells = json.loads((DOCS / "notebook.ipynb").read_text())["cells"]
    assert all("".join(cell["source"]) in shown for cell in cells), "the page is of this notebook"


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
