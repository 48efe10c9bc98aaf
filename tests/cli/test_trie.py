"""The command `trie`: its probabilities against enumeration, and what it prints and draws."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from genlm_backend import cli
from genlm_backend.cli.trie import next_bytes
from genlm_backend.llm import MockAsyncLM
from genlm_backend.trie import TokenCharacterTrie


@pytest.fixture
def llm(tiny_tokenizer_512: PreTrainedTokenizerFast) -> Iterator[MockAsyncLM]:
    model = MockAsyncLM(tiny_tokenizer_512)
    yield model
    model.close()


@pytest.mark.parametrize("prefix", [b"", b"t"])
@pytest.mark.thorough
def test_next_bytes_are_sums_over_tokens(llm: MockAsyncLM, prefix: bytes) -> None:
    row = llm.next_token_logprobs_sync(llm.tokenizer.encode("a"))
    found = next_bytes(TokenCharacterTrie(llm.byte_vocab), llm.byte_vocab, row, prefix)
    going_on = [
        i for i, token in enumerate(llm.byte_vocab) if token.startswith(prefix) and not (prefix and token.is_special)
    ]
    total = float(row[going_on].exp().sum())
    assert sum(entry.probability for entry in found) == pytest.approx(1)
    assert [entry.probability for entry in found] == sorted((entry.probability for entry in found), reverse=True)
    for entry in found:
        if entry.byte is not None:
            ids = [
                i
                for i in going_on
                if llm.byte_vocab[i][len(prefix) :][:1] == bytes([entry.byte]) and not llm.byte_vocab[i].is_special
            ]
            assert entry.probability == pytest.approx(float(row[ids].exp().sum()) / total, rel=1e-5)
            assert entry.token_ids[0] == max(ids, key=lambda i: float(row[i]))


@pytest.fixture
def mock_folder(tmp_path: Path, tiny_tokenizer_512: PreTrainedTokenizerFast) -> Path:
    tiny_tokenizer_512.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the console script."""
    monkeypatch.setattr(sys, "argv", ["genlm-backend", "trie", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def test_the_command_prints_a_table_and_writes_a_picture(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], mock_folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("graphviz")
    picture = tmp_path / "trie.gv"
    arguments = ["a", "--model", str(mock_folder), "--backend", "mock", "--top", "5", "--picture", str(picture)]
    code, out, _ = run(monkeypatch, capsys, *arguments)
    assert code == 0 and "next byte" in out and "others" in out and "entropy" in out
    assert "digraph" in picture.read_text(encoding="utf-8")


def test_a_beginning_that_no_token_has_is_a_wrong_argument(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], mock_folder: Path
) -> None:
    code, _, err = run(
        monkeypatch, capsys, "a", "--model", str(mock_folder), "--backend", "mock", "--begun", "\x00\x00\x00"
    )
    assert code == 2 and "--begun" in err


@pytest.fixture
def loads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> None:
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr("genlm_backend.cli.trie.load", load)


def test_a_picture_that_cannot_be_drawn_is_a_wrong_argument(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, loads_nothing: None
) -> None:
    if shutil.which("dot") is None:
        pytest.importorskip("pygraphviz")
    code, _, err = run(monkeypatch, capsys, "a", "--picture", str(tmp_path / "x.xyz"))
    assert code == 2 and "--picture" in err and ".svg, .png, .pdf or .gv" in " ".join(err.replace("│", " ").split())


@pytest.mark.parametrize("name", ["none/x.gv", "none/x.svg", "."])
def test_a_picture_in_no_folder_is_a_wrong_argument(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    loads_nothing: None,
    name: str,
) -> None:
    code, _, err = run(monkeypatch, capsys, "a", "--picture", str(tmp_path / name))
    assert code == 2 and "--picture" in err and "folder" in err


@pytest.mark.model
@pytest.mark.timeout(300)  # loading, where the machine has other work
def test_the_real_model_knows_the_capital_of_france_and_it_is_drawn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], smollm2_path: Path, tmp_path: Path
) -> None:
    if shutil.which("dot") is None:
        pytest.importorskip("pygraphviz")
    picture = tmp_path / "next.svg"
    arguments = ["The capital of France is", "--begun", " ", "--model", str(smollm2_path), "--top", "1"]
    code, out, _ = run(monkeypatch, capsys, *arguments, "--picture", str(picture))
    assert code == 0 and "Paris" in out
    svg = ElementTree.parse(picture).getroot()
    assert svg.tag == "{http://www.w3.org/2000/svg}svg"
    drawn = [text.text for text in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert "␣P" in drawn and "␣Par" in drawn
    assert torch.get_default_dtype() == torch.float32
