"""`genlm-backend generate`: named errors, files of prompts, and texts that reach a pipe as they are."""

from __future__ import annotations

import io
import json
import re
import sys

import pytest

MOCK = ("--backend", "mock", "--seed", "1")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("",), "must not be empty"),
        (("hi", "--temperature", "inf"), "temperature is inf"),
        (("hi", "--mode", "exact", "--replace", "a=b"), "mode 'exact'"),
    ],
)
def test_a_named_error_is_one_line_and_exit_code_2(script, chatty, arguments, said):
    ended = script("generate", chatty, *MOCK, *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert ended.last_line.startswith("error: ") and said in ended.last_line and "Traceback" not in ended.err


def test_a_prompt_of_a_file_that_fails_loses_no_other(script, short, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("the river\n" + "the river " * 30 + "\nthe fox\n")
    ended = script("generate", "short", "--file", str(file), "--seed", "1", "--max-new-tokens", "3")
    lines = [json.loads(line) for line in ended.out.splitlines()]
    assert ended.code == 2 and "1 of 3 prompts" in ended.last_line
    assert [set(line) for line in lines[::2]] == [{"prompt", "text", "reason", "tokens", "drawn", "rollbacks"}] * 2
    assert set(lines[1]) == {"prompt", "error"} and "takes at most 59" in lines[1]["error"]
    file.write_text("the river\n\nthe fox\n")
    alone = script("generate", "short", "--file", str(file), "--seed", "1", "--max-new-tokens", "3")
    assert alone.code == 0
    assert json.loads(alone.out.splitlines()[0]) == lines[0], "as if the other had not failed"


def test_only_a_line_feed_ends_a_prompt_and_what_is_written_can_be_read(script, chatty, tmp_path):
    prompts = ["the\u2028river", "the\x85fox", "a\x0bb\x0cc\x1cd\x1de\x1ef", "two\nlines"]
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join([prompts[0], *(json.dumps({"prompt": p}) for p in prompts[1:])]), encoding="utf-8")
    ended = script("generate", chatty, *MOCK, "--file", str(file), "--max-new-tokens", "3")
    assert ended.code == 0, ended.err
    assert [json.loads(line)["prompt"] for line in ended.out.split("\n")[:-1]] == prompts
    file.write_text(ended.out, encoding="utf-8")
    assert script("generate", chatty, *MOCK, "--file", str(file), "--max-new-tokens", "3").out == ended.out


def test_a_byte_order_mark_is_no_part_of_a_prompt(script, chatty, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text('{"prompt": "the fox"}\n', encoding="utf-8-sig")
    ended = script("generate", chatty, *MOCK, "--file", str(file), "--max-new-tokens", "1")
    assert json.loads(ended.out)["prompt"] == "the fox"


@pytest.mark.parametrize("line", ['{"prompt": null}', '{"prompt": 5}', '{"prompt": "\\ud800"}', '{"text": "a"}', "{"])
def test_a_prompt_that_is_no_text_is_a_wrong_argument(script, chatty, tmp_path, line):
    file = tmp_path / "prompts.txt"
    file.write_text(f"the fox\n{line}\n")
    ended = script("generate", chatty, *MOCK, "--file", str(file))
    assert ended.code == 2 and "--file" in ended.told and "line 2 " in ended.told


def test_a_file_that_is_none_or_no_text_is_a_wrong_argument(script, chatty, tmp_path):
    ended = script("generate", chatty, *MOCK, "--file", str(tmp_path))
    assert ended.code == 2 and "--file" in ended.told and "directory" in ended.told
    (tmp_path / "latin").write_bytes(b"caf\xe9\n")
    ended = script("generate", chatty, *MOCK, "--file", str(tmp_path / "latin"))
    assert ended.code == 2 and "--file" in ended.told and "UTF-8" in ended.told


def test_a_page_is_of_one_prompt(script, chatty, tmp_path):
    (tmp_path / "prompts.txt").write_text("the fox\n")
    ended = script("generate", chatty, "--file", str(tmp_path / "prompts.txt"), "--trace", str(tmp_path / "x.html"))
    assert ended.code == 2 and "--trace" in ended.told


@pytest.mark.parametrize("command", ["chat", "generate"])
def test_a_text_reaches_a_pipe_as_it_is(script, chatty, command):
    def answer(*options):
        arguments = ("chat", chatty) if command == "chat" else ("generate", chatty, "the river")
        ended = script(*arguments, *MOCK, "--max-new-tokens", "20", *options, stdin=b"hello\n")
        assert ended.code == 0, ended.err
        return ended.out

    written = "\t\r\x07\x08\x0b\x0c\x1b[1m"
    [find, *_] = re.findall(r"(?a)\b[a-z_]+\b", answer())
    assert written in answer("--replace", f"{find}={json.dumps(written)}")


def test_a_terminal_gets_escapes_for_what_would_act_on_it(monkeypatch):
    from genlm_backend.cli.chat import write

    class Screen(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdout", Screen())
    write("a\tb\n\u3000é\U0001f468\u200d\U0001f469 \x1b[1m\x07\x9b1m\r\u202e\n")
    shown = "a\tb\n\u3000é\U0001f468\u200d\U0001f469 \\u001b[1m\\u0007\\u009b1m\\u000d\\u202e\n"
    assert sys.stdout.getvalue() == shown


@pytest.mark.parametrize("option", ["--stop", "--ban"])
def test_an_empty_string_to_look_for_is_a_wrong_argument(script, chatty, option):
    for command in (("chat", chatty), ("generate", chatty, "x")):
        ended = script(*command, *MOCK, option, "")
        assert ended.code == 2 and option in ended.told
