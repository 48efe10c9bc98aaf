"""The console script in this process, and models for it."""

from __future__ import annotations

import copy
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from transformers import PreTrainedTokenizerFast

from genlm_backend import cli
from genlm_backend.llm import MockAsyncLM

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' and m['content'] == 'refused' %}"
    "{{ raise_exception('no such system message') }}{% endif %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


class Ended(NamedTuple):
    """How the console script ended."""

    code: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        return self.err.splitlines()[-1]

    @property
    def told(self) -> str:
        """What was told of a wrong argument: out of its box and on one line."""
        return " ".join(self.err.replace("│", " ").split())


Script = Callable[..., Ended]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Script:
    """Runs the console script: its arguments, and what comes through the pipe."""

    def call(*arguments: str, stdin: bytes = b"") -> Ended:
        monkeypatch.setattr(sys, "argv", ["genlm-backend", *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert isinstance(ended.value.code, int)
        return Ended(ended.value.code, *capsys.readouterr())

    return call


@pytest.fixture
def chatty_tokenizer(tiny_tokenizer_512: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """With a chat template that refuses one system message."""
    tokenizer = copy.deepcopy(tiny_tokenizer_512)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def chatty(chatty_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> str:
    """A folder with a tokenizer that has a chat template."""
    chatty_tokenizer.save_pretrained(tmp_path / "chatty")
    return str(tmp_path / "chatty")


@pytest.fixture
def short(chatty_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> MockAsyncLM:
    """Whatever `chat` and `generate` load is this model, whose context holds 59 tokens."""
    llm = MockAsyncLM(chatty_tokenizer)
    llm.max_length = 60
    monkeypatch.setattr("genlm_backend.cli.chat.load_model", lambda *_: llm)
    return llm
