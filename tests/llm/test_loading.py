"""Loading by name: which engine is taken where none is named, and errors whose remedy works as they tell it."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, dynamic_module_utils

from genlm_backend import llm
from genlm_backend.cli.loading import load
from genlm_backend.errors import (
    BackendUnavailable,
    InvalidDevice,
    InvalidEngineOption,
    ModelNotFound,
    RemoteCodeRefused,
    UnsafeWeights,
    UnsupportedModel,
)
from genlm_backend.llm import AsyncVirtualLM, MockAsyncLM, load_model_by_name, loading
from genlm_backend.llm.vllm import core
from genlm_backend.llm.vllm import model as of_vllm


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Names of the engines that are asked to load something, with their options; nothing is loaded."""
    asked: list[tuple[str, dict[str, Any]]] = []

    def kind(name: str) -> Any:
        def from_name(model: str, **options: Any) -> None:
            asked.append((name, options))

        return type(name, (), {"from_name": staticmethod(from_name)})

    monkeypatch.setattr(llm, "BACKENDS", {name: kind(name) for name in llm.BACKENDS})
    return asked


def there(monkeypatch: pytest.MonkeyPatch, *, cuda: bool, vllm: bool) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *of: (
            (SimpleNamespace(origin="there") if vllm else None) if name == "vllm" else find_spec(name, *of)
        ),
    )


@pytest.mark.parametrize(
    ("cuda", "vllm", "expected"), [(True, True, "vllm"), (True, False, "hf"), (False, True, "hf"), (False, False, "hf")]
)
def test_without_a_name_it_is_vllm_where_cuda_and_vllm_are_there(
    monkeypatch: pytest.MonkeyPatch, taken: list[Any], cuda: bool, vllm: bool, expected: str
) -> None:
    there(monkeypatch, cuda=cuda, vllm=vllm)
    load_model_by_name("some/model", llm_opts={"batch_size": 3})
    load_model_by_name("some/model", "mock")
    load_model_by_name("some/model", "hf")
    load_model_by_name("some/model", llm_opts={"hf_opts": {}})
    assert taken == [(expected, {"batch_size": 3}), ("mock", {}), ("hf", {}), ("hf", {"hf_opts": {}})]


def test_a_command_that_names_a_device_takes_the_engine_that_can_choose_it(
    monkeypatch: pytest.MonkeyPatch, taken: list[Any], tiny_model_folder: Path
) -> None:
    from rich.console import Console

    there(monkeypatch, cuda=True, vllm=True)
    for backend, device in ((None, None), (None, "cpu"), ("vllm", None)):
        load(str(tiny_model_folder), backend, Console(quiet=True), device)
    with pytest.raises(typer.BadParameter, match="chooses its device itself"):
        load(str(tiny_model_folder), "vllm", Console(quiet=True), "cpu")
    assert taken == [("vllm", {}), ("hf", {"device": "cpu"}), ("vllm", {})]


@pytest.fixture
def home_made(tmp_path: Path, tiny_tokenizer_512: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tokenizer with code of its own."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "home-made"
    tiny_tokenizer_512.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "HomeMade", "auto_map": {"AutoTokenizer": [None, "home_made.HomeMade"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "home_made.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n\n\nclass HomeMade(PreTrainedTokenizerFast):\n    pass\n"
    )
    return folder


def test_the_mock_takes_what_the_refusal_of_code_tells_to_pass(home_made: Path) -> None:
    with pytest.raises(RemoteCodeRefused, match="pass trust_remote_code=True"):
        MockAsyncLM.from_name(str(home_made))
    mock = MockAsyncLM.from_name(str(home_made), trust_remote_code=True)
    assert type(mock.tokenizer).__name__ == "HomeMade"
    mock.close()


def test_vllm_takes_what_the_refusal_of_code_tells_to_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def open_core(where: str, options: dict[str, Any]) -> None:
        seen.append(options)
        raise MemoryError

    monkeypatch.setattr(of_vllm, "load_tokenizer", lambda name, **options: seen.append(options))
    monkeypatch.setattr(of_vllm, "open_core", open_core)
    with pytest.raises(MemoryError):
        AsyncVirtualLM.from_name("some/model", {"dtype": "float32"}, trust_remote_code=True)
    assert seen == [{"trust_remote_code": True}, {"dtype": "float32", "trust_remote_code": True}]


def test_what_vllm_refuses_is_told_with_the_option_of_vllm() -> None:
    pickles = core._explained("some/model", RuntimeError("Cannot find any model weights with `some/model`"))
    assert isinstance(pickles, UnsafeWeights) and "engine_opts={'load_format': 'auto'}" in str(pickles)
    code = core._explained("some/model", ValueError("Please pass the argument `trust_remote_code=True` to allow it"))
    assert isinstance(code, RemoteCodeRefused) and "pass trust_remote_code=True" in str(code)


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (ImportError("It needs packages that were not found: abc. Run `pip install abc`"), "with: pip install abc$"),
        (ImportError("Using it requires Abc: `pip install 'abc>=0.26.0'`"), "with: pip install 'abc>=0.26.0'$"),
        (ImportError("\nThe tokenizer requires the Abc library\n"), r"\(The tokenizer requires.*that the message in"),
        (ModuleNotFoundError("No module named 'abc'", name="abc"), "the package with the module 'abc'"),
    ],
)
def test_a_missing_package_is_told_with_its_command(raised: ImportError, told: str) -> None:
    def fails() -> None:
        raise raised

    with pytest.raises(BackendUnavailable, match=told):
        loading._named("some/model", fails)


@pytest.fixture
def no_weights_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the weights are read")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", ""])
def test_a_device_that_is_not_there_is_refused_before_the_weights_are_read(
    no_weights_read: None, tiny_model_folder: Path, device: str
) -> None:
    with pytest.raises(InvalidDevice, match="Invalid device"):
        load_model_by_name(str(tiny_model_folder), "hf", {"device": device})


def test_a_device_beside_a_map_of_devices_is_refused(no_weights_read: None, tiny_model_folder: Path) -> None:
    with pytest.raises(InvalidEngineOption, match=r"device='cpu': .*device_map"):
        load_model_by_name(str(tiny_model_folder), "hf", {"device": "cpu", "hf_opts": {"device_map": "auto"}})


@pytest.mark.parametrize(
    ("file", "damaged"),
    [
        ("model.safetensors", lambda content: content[:1000]),
        ("model.safetensors", lambda content: content[:-1000]),
        ("model.safetensors", lambda content: b""),
        ("model.safetensors", lambda content: bytes(len(content))),
        ("tokenizer.json", lambda content: content[:1000]),
        ("tokenizer.json", lambda content: b""),
        ("tokenizer.json", lambda content: b'{"model": 3, "added_tokens": []}'),
        ("config.json", lambda content: content[:50]),
        ("tokenizer_config.json", lambda content: content[:50]),
    ],
)
def test_a_damaged_file_is_named(tiny_model_folder: Path, tmp_path: Path, file: str, damaged: Any) -> None:
    folder = tmp_path / "harmed"
    shutil.copytree(tiny_model_folder, folder)
    (folder / file).write_bytes(damaged((folder / file).read_bytes()))
    with pytest.raises((UnsupportedModel, ModelNotFound), match="harmed"):
        load_model_by_name(str(folder), "hf")


def test_a_name_of_thousands_of_letters_is_no_model() -> None:
    with pytest.raises((UnsupportedModel, ModelNotFound)):
        load_model_by_name("x" * 5000, "mock")
