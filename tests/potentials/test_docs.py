"""The programs of docs/grammars.md run as pasted, on the real model where the page says so."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

PAGE = Path(__file__).parents[2] / "docs" / "grammars.md"
BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", re.DOTALL)


def program(containing: str) -> tuple[str, str]:
    """The one program of the page with this in it, and what the page says that it prints."""
    (found,) = [pair for pair in BLOCK.findall(PAGE.read_text(encoding="utf-8")) if containing in pair[0]]
    return found


def run(source: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "pasted"}
    exec(compile(source, str(PAGE), "exec"), names)
    return names


@pytest.mark.model
@pytest.mark.timeout(300)
def test_the_extracted_json_is_valid(smollm2_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = run(program("Grammar.json_schema")[0])
    jsonschema.validate(json.loads(capsys.readouterr().out.splitlines()[-1]), names["schema"])


def test_the_lexed_and_the_written_language_differ_as_printed(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("xgrammar", reason='needs xgrammar: pip install "genlm-backend[xgrammar]"')
    source, printed = program("ContextFree.lark")
    run(source)
    assert capsys.readouterr().out == printed


def test_sql_from_a_black_box_is_corrected(capsys: pytest.CaptureFixture[str]) -> None:
    names = run(program('load_parser("sql")')[0])
    assert names["prefix"] == "SELECT * FROM students WHERE name " and "LIKE" in names["candidates"]
    assert names["result"].valid and names["result"].num_grammar_corrections == 1
    assert names["result"].response in capsys.readouterr().out


def test_a_server_is_a_model() -> None:
    assert callable(run(program("base_url")[0])["model"])


def test_every_program_is_run() -> None:
    assert len(BLOCK.findall(PAGE.read_text(encoding="utf-8"))) == 4
