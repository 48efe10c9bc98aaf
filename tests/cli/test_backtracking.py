"""`genlm-backend chat` and `generate`: pipes, terminals, wrong names, interruption."""

from __future__ import annotations

import copy
import json
import logging
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from genlm_backend.cli import app
from genlm_backend.cli.chat import asked_by, operator_by_name

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
PATIENCE_S = 90
AGAIN_S = 5


def save_chatty(tokenizer: PreTrainedTokenizerFast, folder: Path) -> str:
    tokenizer.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": TEMPLATE}))
    return str(folder)


@pytest.fixture
def model(tmp_path, tiny_tokenizer_512) -> str:
    return save_chatty(tiny_tokenizer_512, tmp_path / "chatty")


@pytest.fixture
def endless_model(tmp_path, tiny_tokenizer_512) -> str:
    """Its answers never end by themselves."""
    endless = copy.deepcopy(tiny_tokenizer_512)
    endless.eos_token = None
    return save_chatty(endless, tmp_path / "endless")


def run(*arguments: str, input: str | None = None):
    return CliRunner().invoke(app, list(arguments), input=input)


MOCK = ("--backend", "mock", "--seed", "1")


def test_piped_lines_are_answered_until_the_input_ends(model):
    result = run("chat", model, *MOCK, "--max-new-tokens", "5", input="hello\nand you?\n")
    assert result.exit_code == 0, result.output
    assert len(result.stdout.strip()) > 5 and "> " not in result.stdout


@pytest.mark.parametrize("word", ["exit", "quit", "/quit"])
def test_words_that_end_it(model, word):
    result = run("chat", model, *MOCK, input=f"{word}\nnot asked\n")
    assert (result.exit_code, result.stdout) == (0, "")


def test_commands_save_and_reset_and_unknown_ones(model, tmp_path):
    saved = tmp_path / "talk.json"
    lines = f"hello\n/save {saved}\n/reset\n/help\n/nonsense\n/save {tmp_path}/none/x\n"
    result = run("chat", model, *MOCK, "--system", "be brief", "--max-new-tokens", "3", input=lines)
    assert result.exit_code == 0, result.output
    roles = [message["role"] for message in json.loads(saved.read_text())]
    assert roles == ["system", "user", "assistant"]
    assert "/reset" in result.stdout and "unknown command '/nonsense'" in result.stdout
    assert "cannot be written" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--operator", "nonsense"), "probability_threshold"),
        (("--strategy", "nonsense"), "creative"),
        (("--operator", "repetition", "--operator-arg", "nonsense"), "key=value"),
        (("--operator", "repetition", "--operator-arg", "max_repetitions=0"), "1 or more"),
        (("--operator", "repetition", "--operator-arg", "nonsense=1"), "nonsense"),
        (("--operator-arg", "a=1"), "no operator"),
        (("--strategy", "antislop"), "--ban"),
        (("--strategy", "nonsense"), "replace"),
        (("--strategy", "nonsense"), "chain:"),
        (("--strategy", "replace"), "--replace"),
        (("--strategy", "replace", "--replace", "So"), "FIND=TEXT"),
        (("--strategy", "chain"), "chain:replace,antislop"),
        (("--strategy", "chain:creative,nonsense"), "'nonsense'"),
    ],
)
def test_wrong_names_exit_with_2_and_tell_the_right_ones(model, arguments, told):
    for command in (("chat", model), ("generate", model, "x")):
        result = run(*command, *arguments)
        assert result.exit_code == 2
        assert told in " ".join(result.output.split())


@pytest.mark.parametrize("name", ["ngram_overlap", "NGramOverlap"])
def test_operators_by_both_names(name):
    assert operator_by_name(name, ["ngram_size=2"]).ngram_size == 2
    assert operator_by_name("none", []) is None


@pytest.mark.parametrize("command", ["chat", "generate"])
def test_one_v_tells_rollbacks_and_two_what_a_text_came_to(model, command, quiet_after):
    for flag, levels in ((None, ()), ("-v", ("INFO",)), ("-vv", ("INFO", "DEBUG"))):
        quiet_after()
        operator = ("--operator", "probability_threshold", "--operator-arg", "min_probability=0.02")
        arguments = (*MOCK, *operator, "--max-new-tokens", "8", *([flag] if flag else []))
        if command == "chat":
            result = run("chat", model, *arguments, input="hello\n")
        else:
            result = run("generate", model, "the river", *arguments)
        assert result.exit_code == 0, result.output
        assert ("took back" in result.stderr) == ("INFO" in levels)
        assert ("drawn, " in result.stderr and "ended by" in result.stderr and "DEBUG" in result.stderr) == (
            "DEBUG" in levels
        )
        assert "took back" not in result.stdout


@pytest.fixture
def quiet_after():
    """Takes away what `-v` sets for the whole process."""
    logger = logging.getLogger("genlm_backend")
    before, level = list(logger.handlers), logger.level

    def quiet():
        logger.handlers[:] = before
        logger.setLevel(level)

    yield quiet
    quiet()


def text_under(model, *arguments):
    result = run("generate", model, "the river", *MOCK, "--max-new-tokens", "12", *arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_strategy_replaces_and_several_are_a_chain(model):
    plain = text_under(model)
    find = next(c for c in plain if c.isalpha())
    for name in ("replace", "ReplaceStrategy"):
        assert find in plain and "!!" not in plain
        text = text_under(model, "--strategy", name, "--replace", f'{find}="!!"')
        assert text == text_under(model, "--replace", f"{find}=!!"), "with its argument alone, too"
    rules = asked_by("none", [], "chain:replace,AntiSlop,creative", ["e"], ["So=But", "a=b"])(None).rules
    assert [type(rule).__name__ for rule in rules] == ["Chain"]
    assert [type(rule).__name__ for rule in rules[0].rules] == ["Replace", "Replace", "Phrases", "Creative"]
    assert (
        "e"
        not in text_under(model, "--strategy", "chain:antislop,replace", "--ban", "e", "--replace", "So=But").split()
    )


def test_one_prompt_gives_its_text_and_a_page(model, tmp_path):
    page = tmp_path / "walk.html"
    arguments = ("--ban", "e", "--max-new-tokens", "8", "--trace", str(page))
    result = run("generate", model, "the river", *MOCK, *arguments)
    assert result.exit_code == 0, result.output
    assert "8 tokens" in result.output and "<!doctype html>" in page.read_text()


def test_a_page_that_cannot_be_written_is_told_before_the_model_is_loaded(tmp_path, monkeypatch):
    def load(*_):
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr("genlm_backend.cli.generate.load", load)
    result = run("generate", "no-model", "hello", "--trace", str(tmp_path / "none" / "page.html"))
    told = " ".join(result.output.replace("│", " ").split())
    assert result.exit_code == 2 and "--trace" in told and "there is no folder" in told


def test_a_file_of_prompts_gives_lines_of_json_in_order(model, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text('the river\n\n{"prompt": "the fox"}\nthe city\n')
    result = run("generate", model, "--file", str(file), *MOCK, "--max-new-tokens", "4", "--operator", "never")
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["prompt"] for line in lines] == ["the river", "the fox", "the city"]
    assert all(line["tokens"] <= 4 and line["rollbacks"] == 0 for line in lines)
    again = run("generate", model, "--file", str(file), *MOCK, "--max-new-tokens", "4", "--operator", "never")
    assert again.stdout == result.stdout


def test_prompt_or_file(model):
    assert run("generate", model).exit_code == 2
    assert run("generate", model, "x", "--mode", "nonsense").exit_code == 2


class Terminal:
    """A program in a pseudo-terminal: keys in, screen out."""

    def __init__(self, *arguments: str) -> None:
        self._pid, self._fd = pty.fork()
        if self._pid == 0:
            os.environ |= {"TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
            os.execv(sys.executable, [sys.executable, *arguments])
        self.screen = ""
        self._is_over = False

    def wait_for(self, text: str, n: int = 1) -> None:
        assert self._shows(text, n, PATIENCE_S), self.screen[-2000:]

    def _shows(self, text: str, n: int, within_s: float) -> bool:
        end = time.monotonic() + within_s
        while self.screen.count(text) < n and time.monotonic() < end and not self._is_over:
            self._read()
        return self.screen.count(text) >= n

    def type(self, keys: str) -> None:
        os.write(self._fd, keys.encode())

    def press(self, keys: str, shows: str = "", n: int = 1) -> None:
        """Like `type`, but as late after what is on the screen as a person would, and again until a text is shown.

        Python loses a Ctrl-C that comes between the echo of a key and its wait for the next one, until that next one.
        """
        time.sleep(0.5)
        self.type(keys)
        end = time.monotonic() + PATIENCE_S
        while shows and not self._shows(shows, n, AGAIN_S):
            assert time.monotonic() < end and not self._is_over, self.screen[-2000:]
            self.type(keys)

    def interrupt(self) -> None:
        os.kill(self._pid, signal.SIGINT)

    def wait(self) -> int:
        end = time.monotonic() + PATIENCE_S
        while not self._is_over and time.monotonic() < end:
            self._read()
        _, status = os.waitpid(self._pid, 0)
        os.close(self._fd)
        return os.waitstatus_to_exitcode(status)

    def _read(self) -> None:
        if select.select([self._fd], [], [], 0.1)[0]:
            try:
                data = os.read(self._fd, 65536)
            except OSError:  # how Linux tells that the other end is closed
                data = b""
            self._is_over = not data
            self.screen += data.decode("utf-8", "replace")


HUMAN = """
from genlm_backend.backtracking import BacktrackSampler, HumanGuidanceStrategy
from genlm_backend.llm import MockAsyncLM
from genlm_backend.llm.loading import load_tokenizer
import sys
llm = MockAsyncLM(load_tokenizer(sys.argv[1]))
sampler = BacktrackSampler(llm, HumanGuidanceStrategy(llm))
tokens = list(sampler.generate("the river", max_new_tokens=2, seed=0))
best = llm.next_token_logprobs_sync(llm.encode("the river")).topk(3).indices.tolist()
print("FIRST", best.index(tokens[0]), len(tokens))
"""


@pytest.mark.thorough
def test_a_person_chooses_in_a_terminal(model):
    down, up = "\x1bOB", "\x1bOA"
    terminal = Terminal("-c", HUMAN, model)
    terminal.wait_for("%)", 3)  # three options
    terminal.type("\n")  # the best one
    terminal.wait_for("Go back")
    terminal.type(down * 3 + "\n")  # go back
    time.sleep(0.5)
    terminal.type(down + "\n")  # the second
    time.sleep(0.5)
    terminal.type(up + up + "\n")  # around the end: the last token
    assert terminal.wait() == 0, terminal.screen[-2000:]
    assert "FIRST 1 2" in terminal.screen


@pytest.mark.thorough
def test_ctrl_c_ends_the_menu(model):
    terminal = Terminal("-c", HUMAN, model)
    terminal.wait_for("%)", 3)
    terminal.press("\x03")
    assert terminal.wait() == -signal.SIGINT, terminal.screen[-2000:]
    assert "KeyboardInterrupt" in terminal.screen.rpartition("\x1b[?1049l")[2], (
        "told after the menu has left the screen"
    )


@pytest.mark.thorough
def test_an_answer_is_interrupted_without_losing_the_conversation(endless_model, tmp_path):
    saved = tmp_path / "talk.json"
    terminal = Terminal(
        "-m", "genlm_backend.cli", "chat", endless_model, *MOCK, "--max-new-tokens", "1000000", "--top-k", "0"
    )
    terminal.wait_for("> ")
    terminal.type("hello\r")
    n = len(terminal.screen)
    while len(terminal.screen) < n + 300:
        terminal._read()
    terminal.interrupt()
    terminal.wait_for("(stopped)")
    terminal.wait_for("> ", 2)
    terminal.type(f"/save {saved}\r")
    terminal.wait_for("saved to")
    terminal.type("/quit\r")
    assert terminal.wait() == 0
    said = json.loads(saved.read_text())
    assert [m["role"] for m in said] == ["user", "assistant"] and len(said[1]["content"]) > 50


@pytest.mark.thorough
def test_ctrl_c_at_the_prompt_ends_only_when_pressed_twice_on_an_empty_line(model, tmp_path):
    saved = tmp_path / "talk.json"
    hint, ctrl_c = "Ctrl-C once more", "\x03"
    terminal = Terminal("-m", "genlm_backend.cli", "chat", model, *MOCK, "--max-new-tokens", "3")
    terminal.wait_for("> ")
    terminal.type("hello\r")
    terminal.wait_for("> ", 2)
    terminal.press(ctrl_c, hint)
    terminal.wait_for("> ", 3)
    terminal.type("half a lin")
    terminal.wait_for("half a lin")
    terminal.press(ctrl_c, "> ", 4)  # discards what was typed
    terminal.type(f"/save {saved}\r")
    terminal.wait_for("saved to")
    assert [m["content"] for m in json.loads(saved.read_text())][:1] == ["hello"]
    terminal.wait_for("> ", 5)
    terminal.press(ctrl_c, hint, 2)
    terminal.wait_for("> ", 6)
    terminal.press(ctrl_c)
    assert terminal.wait() == 0, terminal.screen[-2000:]
    assert "Traceback" not in terminal.screen and terminal.screen.count(hint) == 2


@pytest.mark.thorough
def test_a_file_of_prompts_shows_its_progress_in_a_terminal(model, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("the river\nthe fox\nthe city\n")
    terminal = Terminal("-m", "genlm_backend.cli", "generate", model, "--file", str(file), *MOCK)
    assert terminal.wait() == 0, terminal.screen[-2000:]
    assert "texts" in terminal.screen and "3/3" in terminal.screen and "\u2501" in terminal.screen
    assert terminal.screen.count('"prompt"') == 3
    result = run("generate", model, "--file", str(file), *MOCK)
    assert "3/3" not in result.output, "no bar where no one looks"


def test_help_needs_no_model():
    here = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "genlm_backend.cli", "chat", "--help"],
        capture_output=True,
        text=True,
        cwd=here,
        check=True,
    )
    assert "operator" in done.stdout and "| torch\n" not in done.stderr
