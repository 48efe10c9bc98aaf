"""How the console script ends: wrong arguments, errors that name options of Python, interrupts."""

from __future__ import annotations

import threading

import pytest

from genlm_backend import cli
from genlm_backend.errors import RemoteCodeRefused, UnsafeWeights

NO_UTF_8 = "\udcff"  # how Python hands on the byte 0xff of an argument


@pytest.mark.parametrize("command", ["sis", "smc", "trie", "generate"])
def test_a_prompt_that_is_no_utf_8_is_a_wrong_argument(script, chatty, command):
    arguments = (chatty, NO_UTF_8) if command == "generate" else (NO_UTF_8, "--model", chatty)
    ended = script(command, *arguments, "--backend", "mock")
    assert (ended.code, ended.out) == (2, "") and "'prompt'" in ended.told.lower() and "UTF-8" in ended.told


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "m", "x", "--stop", NO_UTF_8),
        ("generate", "m", "x", "--ban", NO_UTF_8),
        ("generate", "m", "x", "--replace", f"a={NO_UTF_8}"),
        ("chat", "m", "--system", NO_UTF_8),
        ("trie", "x", "--begun", NO_UTF_8),
        ("smc", "x", "--regex", NO_UTF_8),
    ],
)
def test_another_text_that_is_no_utf_8_is_a_wrong_argument(script, arguments):
    ended = script(*arguments)
    assert ended.code == 2 and arguments[-2] in ended.told and "UTF-8" in ended.told


def test_a_prompt_from_the_input_that_is_no_utf_8_is_a_wrong_argument(script, chatty):
    ended = script("generate", chatty, "-", "--backend", "mock", stdin=b"caf\xe9")
    assert ended.code == 2 and "PROMPT" in ended.told and "UTF-8" in ended.told


@pytest.mark.parametrize("option", ["--schema", "--lark"])
def test_a_grammar_that_is_no_utf_8_is_a_wrong_argument(script, chatty, tmp_path, option):
    (tmp_path / "grammar").write_bytes(b'"\xe9"')
    ended = script("smc", "x", option, str(tmp_path / "grammar"), "--model", chatty, "--backend", "mock")
    assert ended.code == 2 and option in ended.told and "UTF-8" in ended.told


@pytest.mark.parametrize("error", [UnsafeWeights("a-model", "hf_opts={}"), RemoteCodeRefused("a-model")])
def test_an_error_whose_remedy_is_an_option_of_python_says_what_to_do_here(script, monkeypatch, error):
    def load(*_):
        raise error

    monkeypatch.setattr("genlm_backend.cli.sis.load", load)
    ended = script("sis", "x")
    assert ended.code == 2 and ended.last_line.startswith(f"error: {error}; commands have no such option")


@pytest.mark.parametrize("name", ["genlm-apart", "genlm-engine", None])
def test_an_interrupt_while_torch_computes_does_not_take_the_interpreter_down(script, monkeypatch, name):
    """A thread inside of torch would abort the process; without one it ends as every program does."""
    go, did = threading.Event(), []
    thread = threading.Thread(target=go.wait, name=name, daemon=True)

    def app():
        thread.start()
        raise SystemExit(130)

    monkeypatch.setattr(cli, "app", app)
    monkeypatch.setattr("atexit._run_exitfuncs", lambda: did.append("exit functions"))
    monkeypatch.setattr("os._exit", did.append)
    assert script("sis", "x").code == 130
    assert did == (["exit functions", 130] if name else [])
    go.set()
    thread.join()
