"""Loading by name: local folders, types, and what is refused because it could run code."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, T5Config

from genlm_backend.errors import ModelNotFound, RemoteCodeRefused, UnsafeWeights, UnsupportedModel
from genlm_backend.llm import AsyncTransformer, load_model_by_name
from genlm_backend.llm.hf.linear import HalfLinear, PackedLinear, Part, gains, pack_linears
from genlm_backend.llm.hf.self_test import difference
from tests.llm.hf.walks import TINY_NATS, plain_row, random_ids, small

PROMPT = random_ids(random.Random(4), 12)


class Canary:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.fixture
def folder(tmp_path: Path, tiny_tokenizer_512: Any) -> Path:
    """A folder with a configuration and a tokenizer, without weights."""
    tiny_tokenizer_512.save_pretrained(tmp_path)
    small("llama").config.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("load", [AsyncTransformer.from_name, lambda name: load_model_by_name(name, "hf")])
async def test_a_local_folder_with_safetensors(load: Any, folder: Path) -> None:
    small("llama").save_pretrained(folder)
    async with load(str(folder)) as llm:
        assert llm.path == "packed"
        assert llm.device.type == "cpu" or torch.cuda.is_available()
        row = (await llm.next_token_logprobs(PROMPT)).cpu()
        assert difference(row[None], plain_row(small("llama"), PROMPT)[None]).nats <= TINY_NATS


async def test_constructor_options_are_passed_on(folder: Path) -> None:
    small("llama").save_pretrained(folder)
    async with AsyncTransformer.from_name(str(folder), device="cpu", kv_cache_bytes=5 * 1024, batch_size=2) as llm:
        await llm.batch_next_token_logprobs([PROMPT[:n] for n in (3, 5, 7)])
        assert llm.statistics().batches == 2
        assert llm.statistics().kv_tokens <= 5


@pytest.mark.parametrize(
    ("hf_opts", "dtype"),
    [
        (None, torch.float32),
        ({"dtype": torch.bfloat16}, torch.bfloat16),
        pytest.param({"dtype": "bfloat16"}, torch.bfloat16, marks=pytest.mark.thorough),
        pytest.param({"torch_dtype": torch.bfloat16}, torch.bfloat16, marks=pytest.mark.thorough),
        pytest.param({"torch_dtype": "auto"}, torch.float32, marks=pytest.mark.thorough),
    ],
)
def test_the_type_is_the_checkpoints_own_unless_given(hf_opts: Any, dtype: torch.dtype, folder: Path) -> None:
    small("llama").save_pretrained(folder)
    llm = AsyncTransformer.from_name(str(folder), hf_opts=hf_opts, device="cpu")
    assert llm.model.dtype == dtype
    assert hf_opts is None or set(hf_opts) <= {"dtype", "torch_dtype"}
    llm.close()


@pytest.mark.parametrize("is_fast", [True, False])
@pytest.mark.thorough
def test_sixteen_bits_are_widened_where_they_are_slow_unless_asked_for(
    is_fast: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("genlm_backend.llm.loading.multiplies_bfloat16", lambda: is_fast)
    small("llama", torch.bfloat16).save_pretrained(folder)
    for hf_opts, dtype in [
        (None, torch.bfloat16 if is_fast else torch.float32),
        ({"dtype": "auto"}, torch.bfloat16),
        ({"dtype": torch.bfloat16}, torch.bfloat16),
    ]:
        llm = AsyncTransformer.from_name(str(folder), hf_opts=hf_opts, device="cpu")
        assert {weight.dtype for weight in llm.model.parameters()} == {dtype}
        llm.close()


@pytest.mark.parametrize(
    ("dtype", "total_variation"), [(torch.bfloat16, 2e-2), (torch.float32, 1e-5)], ids=["bfloat16", "float32"]
)
@pytest.mark.thorough
async def test_a_model_of_our_own_is_faster_and_still_the_same_model(
    folder: Path, dtype: torch.dtype, total_variation: float
) -> None:
    """Nobody else uses it, so its linear layers may be repacked; rows and `generate` stay."""
    plain = small("llama", dtype)
    plain.save_pretrained(folder)
    async with AsyncTransformer.from_name(str(folder), hf_opts={"dtype": dtype}, device="cpu") as llm:
        assert llm.path == "packed"
        assert isinstance(llm.model.lm_head, PackedLinear) == gains(plain.lm_head.weight)
        for n in (1, 5, 12):
            row = await llm.next_token_logprobs(PROMPT[:n])
            found = difference(row[None], plain_row(plain, PROMPT[:n])[None])
            assert found.total_variation <= total_variation
            assert dtype == torch.bfloat16 or found.nats <= TINY_NATS
        ids = torch.tensor([PROMPT])
        out = llm.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=0
        )
        assert out.shape == (1, 16)


@pytest.mark.thorough
@pytest.mark.thorough
@pytest.mark.skipif(
    not gains(torch.empty(1, 1)) or torch.backends.quantized.engine not in ("x86", "fbgemm"),
    reason="float32 layers do not read from 16 bits on this CPU",
)
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
async def test_a_checkpoint_of_16_bits_in_float32_is_read_from_16_bits_and_loses_nothing(
    folder: Path, stored: torch.dtype
) -> None:
    small("llama", stored).save_pretrained(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    async with AsyncTransformer.from_name(str(folder), hf_opts={"dtype": torch.float32}, device="cpu") as llm:
        names = [name for name, module in plain.named_modules() if type(module) is torch.nn.Linear]
        packed = [llm.model.get_submodule(name) for name in names]
        packed = [module.merged.packed if isinstance(module, Part) else module for module in packed]
        assert len(names) == 29 and all(isinstance(module, HalfLinear) for module in packed)
        assert llm.path == "packed" and llm._service.engine.n_fused == 4  # type: ignore[attr-defined]
        for n in (1, 5, 12):
            row = await llm.next_token_logprobs(PROMPT[:n])
            assert difference(row[None], plain_row(plain, PROMPT[:n])[None]).nats <= TINY_NATS


async def test_a_model_of_our_own_that_cannot_be_packed_gets_its_layers_back(folder: Path) -> None:
    small("bloom", torch.bfloat16).save_pretrained(folder)
    with pytest.warns(UserWarning, match="0 of 4 layers"):
        llm = AsyncTransformer.from_name(str(folder), device="cpu")
    assert not any(isinstance(module, PackedLinear) for module in llm.model.modules())
    row = await llm.next_token_logprobs(PROMPT)
    assert difference(row[None], plain_row(small("bloom", torch.bfloat16), PROMPT)[None]).total_variation <= 2e-2
    await llm.aclose()


def test_a_wrapped_models_layers_are_never_repacked(wrap: Any) -> None:
    model = small("llama", torch.bfloat16)
    wrap(model)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_only_plain_layers_are_repacked_and_shared_ones_once(dtype: torch.dtype) -> None:
    if not gains(torch.empty(1, 1, dtype=dtype)):
        pytest.skip(f"no gain for {dtype} on this CPU")

    class Special(torch.nn.Linear):
        pass

    shared = torch.nn.Linear(8, 4, dtype=dtype)
    model = torch.nn.ModuleDict(
        {
            "a": shared,
            "b": torch.nn.ModuleDict({"a": shared}),
            "c": Special(8, 4, dtype=dtype),
            "d": torch.nn.Linear(8, 4, dtype=torch.float64),
        }
    )
    rows = torch.randn(3, 8, dtype=dtype)
    want = shared(rows)
    pack_linears(model)
    assert model["a"] is model["b"]["a"]
    assert isinstance(model["a"], PackedLinear)
    assert [type(model[name]) for name in "cd"] == [Special, torch.nn.Linear]
    assert torch.allclose(model["a"](rows).float(), want.float(), atol=1e-2)


def test_pickled_weights_are_refused_unread(folder: Path) -> None:
    canary = folder / "canary"
    with (folder / "pytorch_model.bin").open("wb") as file:
        pickle.dump(Canary(canary), file)
    with pytest.raises(UnsafeWeights, match="use_safetensors"):
        AsyncTransformer.from_name(str(folder))
    assert not canary.exists()


async def test_pickled_weights_are_read_when_asked_for(folder: Path) -> None:
    torch.save(small("llama").state_dict(), folder / "pytorch_model.bin")
    async with AsyncTransformer.from_name(str(folder), hf_opts={"use_safetensors": False}, device="cpu") as llm:
        row = await llm.next_token_logprobs(PROMPT)
        assert difference(row[None], plain_row(small("llama"), PROMPT)[None]).nats <= TINY_NATS


def bring_code(folder: Path, model_type: str) -> Path:
    canary = folder / "canary"
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": model_type,
        "architectures": ["CanaryForCausalLM"],
        "auto_map": {"AutoConfig": "canary_code.CanaryConfig", "AutoModelForCausalLM": "canary_code.CanaryForCausalLM"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "canary_code.py").write_text(f"open({str(canary)!r}, 'w').close()\n")
    return canary


@pytest.mark.parametrize("hf_opts", [None, {"trust_remote_code": False}])
def test_a_model_with_code_of_its_own_is_refused_unread(hf_opts: Any, folder: Path) -> None:
    small("llama").save_pretrained(folder)
    canary = bring_code(folder, "home_made")
    with pytest.raises(RemoteCodeRefused, match="trust_remote_code=True"):
        AsyncTransformer.from_name(str(folder), hf_opts=hf_opts)
    assert not canary.exists()


async def test_code_beside_a_model_that_transformers_knows_is_not_run(folder: Path) -> None:
    small("llama").save_pretrained(folder)
    canary = bring_code(folder, "llama")
    async with AsyncTransformer.from_name(str(folder), device="cpu") as llm:
        row = await llm.next_token_logprobs(PROMPT)
        assert difference(row[None], plain_row(small("llama"), PROMPT)[None]).nats <= TINY_NATS
    assert not canary.exists()


@pytest.mark.parametrize("name", ["no-such-owner/no-such-model", "./no/such/folder", "no-such-file.gguf"])
def test_what_is_not_there_is_named(name: str) -> None:
    with pytest.raises(ModelNotFound, match=r"no-such|no/such"):
        AsyncTransformer.from_name(name)


def test_a_folder_without_weights_is_no_model(folder: Path) -> None:
    with pytest.raises(ModelNotFound):
        AsyncTransformer.from_name(str(folder))


def test_a_configuration_that_contradicts_itself_is_named(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_attention_heads": 7}))
    with pytest.raises(UnsupportedModel, match="cannot load"):
        AsyncTransformer.from_name(str(folder))


def test_an_encoder_decoder_is_refused_before_its_weights_are_read(folder: Path) -> None:
    T5Config(vocab_size=512, decoder_start_token_id=0).save_pretrained(folder)
    with pytest.raises(UnsupportedModel, match="encoder-decoder model"):
        AsyncTransformer.from_name(str(folder))


def test_options_of_the_repository_reach_tokenizer_configuration_and_weights(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """genlm-backend 0.3.1 loads the tokenizer without them."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    small("llama").save_pretrained(folder)
    given: list[tuple[str, dict[str, Any]]] = []
    for kind in (AutoConfig, AutoModelForCausalLM, AutoTokenizer):
        original = kind.from_pretrained

        def spy(where: Any, *args: Any, kind: Any = kind, original: Any = original, **options: Any) -> Any:
            given.append((kind.__name__, options))
            return original(where, *args, **options)

        monkeypatch.setattr(kind, "from_pretrained", spy)
    options = {"revision": "main", "cache_dir": str(folder / "cache"), "local_files_only": True}
    AsyncTransformer.from_name(str(folder), hf_opts=options, device="cpu").close()
    assert {name for name, _ in given} == {"AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"}
    for _, got in given:
        assert {name: got.get(name) for name in options} == options
