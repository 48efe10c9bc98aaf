"""`genlm-backend smc` from the outside."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from genlm_backend.cli import app
from genlm_backend.smc import Result

RUNNER = CliRunner()


def call(*arguments: str):
    return RUNNER.invoke(app, ["smc", *arguments])


def said(done) -> str:
    """What was printed, out of its box and on one line."""
    return " ".join(done.output.replace("│", " ").split())


def test_one_grammar_at_a_time(tmp_path: Path):
    schema = tmp_path / "schema.json"
    schema.write_text("{}")
    done = call("--schema", str(schema), "--regex", "a", "hello")
    assert done.exit_code == 2 and "give one of" in done.output


def test_a_file_that_is_not_there_or_a_wrong_proposal():
    assert call("--schema", "nowhere.json", "hello").exit_code == 2
    done = call("--proposal", "magic", "--regex", "a", "hello")
    assert done.exit_code == 2 and "direct or awrs" in done.output
    assert "needs one of" in call("--proposal", "awrs", "hello").output


@pytest.mark.parametrize("option", ["--html", "--save"])
def test_a_file_that_cannot_be_written_is_told_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
):
    def load(*_: object) -> None:
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr("genlm_backend.cli.smc.load", load)
    done = call("--regex", "a", option, str(tmp_path / "none" / "x"), "hello")
    assert done.exit_code == 2 and option in said(done) and "there is no folder" in said(done)
    locked = tmp_path / "locked"
    locked.touch()
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK or Path(path) != locked)
    done = call("--regex", "a", option, str(locked), "hello")
    assert done.exit_code == 2 and option in said(done) and "may not be written" in said(done)
    assert "was loaded first" in str(call("--regex", "a", option, str(tmp_path / "new"), "hello").exception)


@pytest.mark.model
@pytest.mark.parametrize("proposal", ["direct", "awrs"])
def test_a_regex_on_the_mock(smollm2_path: Path, tmp_path: Path, proposal: str):
    page, saved = tmp_path / "out.html", tmp_path / "out.json"
    done = call(
        *("--backend", "mock", "--regex", " (yes|no)\\.", "--particles", "4", "--max-tokens", "6"),
        *("--proposal", proposal, "--html", str(page), "--save", str(saved), "Is it?"),
    )
    assert done.exit_code == 0, done.output
    assert " yes." in done.output or " no." in done.output
    assert "log-evidence:" in done.output and "effective sample size:" in done.output
    assert "</html>" in page.read_text(encoding="utf-8")
    assert set(Result.load(saved).posterior()) <= {" yes.", " no."}


@pytest.mark.model
def test_a_schema_on_the_real_model(smollm2_path: Path, tmp_path: Path):
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}')
    arguments = ("--schema", str(schema), "--particles", "5", "--max-tokens", "16", "--seed", "3", "A number as JSON: ")
    saved = tmp_path / "out.json"
    assert call(*arguments, "--save", str(saved)).exit_code in (0, 1)
    result = Result.load(saved)
    assert all("n" in json.loads(text) for text in result.posterior())
    again = tmp_path / "again.json"
    call(*arguments, "--save", str(again))
    assert Result.load(again).values == result.values
