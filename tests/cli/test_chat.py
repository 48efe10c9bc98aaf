"""`genlm-backend chat`: what is kept when an answer fails, and models that it refuses."""

from __future__ import annotations

import json

import pytest

from genlm_backend.backtracking import ChatPipeline, Generator
from genlm_backend.errors import EvaluationFailed, InvalidRequest, UnsupportedModel
from genlm_backend.llm import MockAsyncLM

MOCK = ("--backend", "mock", "--seed", "1")


def lines(*typed: object) -> bytes:
    return "".join(f"{line}\n" for line in typed).encode()


def contents(path) -> list[str]:
    return [message["content"] for message in json.loads(path.read_text(encoding="utf-8"))]


def roles(path) -> list[str]:
    return [message["role"] for message in json.loads(path.read_text(encoding="utf-8"))]


def test_a_question_that_is_refused_is_told_and_the_conversation_goes_on(script, short, tmp_path):
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    typed = lines("hello", "the river " * 30, f"/save {before}", "you?", f"/save {after}")
    ended = script("chat", "short", "--seed", "1", "--max-new-tokens", "3", stdin=typed)
    assert ended.code == 2 and "Traceback" not in ended.err
    assert ended.last_line.startswith("error: ") and "takes at most 59" in ended.last_line
    assert roles(before) == ["user", "assistant"] and contents(before)[0] == "hello"
    assert roles(after) == ["user", "assistant"] * 2 and contents(after)[2] == "you?"


def test_an_answer_that_fails_midway_keeps_what_was_said(script, short, tmp_path):
    full, anew = tmp_path / "full.json", tmp_path / "anew.json"
    typed = lines("hello", f"/save {full}", "and you?", "/reset", "the fox", f"/save {anew}")
    ended = script("chat", "short", "--seed", "5", "--max-new-tokens", "200", stdin=typed)
    assert ended.code == 2 and ended.err.count("error: ") == 3, ended.err
    assert roles(full) == ["user", "assistant"]
    said = contents(full)[1]
    assert len(said) > 20 and said in ended.out
    assert contents(anew)[0] == "the fox" and len(contents(anew)) == 2


def test_an_engine_that_fails_ends_no_conversation(script, short, monkeypatch):
    prompt_ids, asked = ChatPipeline.prompt_ids, []

    def fails_once(self, messages):
        asked.append(messages[-1]["content"])
        if asked[-1] == "hello":
            raise EvaluationFailed(3, "no memory")
        return prompt_ids(self, messages)

    monkeypatch.setattr(ChatPipeline, "prompt_ids", fails_once)
    ended = script("chat", "short", "--seed", "1", "--max-new-tokens", "3", stdin=lines("hello", "you?"))
    assert ended.code == 2 and "no memory" in ended.err and asked[-1] == "you?"


def test_a_model_without_a_chat_template_is_an_error_of_one_line(script, tiny_tokenizer_512, tmp_path):
    tiny_tokenizer_512.save_pretrained(tmp_path / "plain")
    ended = script("chat", str(tmp_path / "plain"), *MOCK, stdin=b"hello\n")
    assert (ended.code, ended.out) == (2, "")
    assert ended.last_line.startswith("error: ") and "no chat template" in ended.last_line


def test_a_system_message_that_the_template_refuses_is_told_before_a_question(script, chatty):
    assert script("chat", chatty, *MOCK, "--system", "be brief").code == 0
    ended = script("chat", chatty, *MOCK, "--system", "refused")
    assert (ended.code, ended.out) == (2, "")
    assert ended.last_line.startswith("error: ") and "no such system message" in ended.last_line


def test_the_pipeline_names_what_the_template_refuses(chatty_tokenizer):
    pipeline = ChatPipeline(Generator(MockAsyncLM(chatty_tokenizer)))
    with pytest.raises(InvalidRequest, match="no such system message"):
        pipeline.prompt_ids([{"role": "system", "content": "refused"}, {"role": "user", "content": "."}])
    chatty_tokenizer.chat_template = None
    with pytest.raises(UnsupportedModel, match="no chat template") as refused:
        pipeline.prompt_ids([{"role": "user", "content": "."}])
    assert isinstance(refused.value, ValueError)


def test_an_interrupt_at_the_end_of_a_pipe_is_exit_code_130(script, chatty, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    assert script("chat", chatty, *MOCK).code == 130


def test_saving_needs_a_file(script, chatty):
    ended = script("chat", chatty, *MOCK, stdin=b"/save\n")
    assert ended.code == 0 and "name a file: /save FILE" in ended.out


def test_a_line_that_is_no_utf_8_is_refused(script, chatty):
    ended = script("chat", chatty, *MOCK, "--max-new-tokens", "3", stdin=b"\xff\n/help\n")
    assert ended.code == 2 and "UTF-8" in ended.out and "/reset" in ended.out and "Traceback" not in ended.err
