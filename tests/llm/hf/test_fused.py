"""Fused layers: their compiled calls beside float64, which models get them, and that what they get wrong is seen."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import random
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

from genlm_backend.llm import AsyncTransformer
from genlm_backend.llm.hf import fused
from genlm_backend.llm.hf.fused import MOST_ROWS, FusedLayer, fuse
from genlm_backend.llm.hf.layer_kernel import add_norm, gate, rotate
from genlm_backend.llm.hf.replica import replica
from genlm_backend.llm.hf.self_test import Failed, check_packed
from tests import architectures
from tests.llm.hf.walks import CHANGES, TINY_NATS, Walk, contexts_of, fresh, packed_engine, plain_row, random_ids, small

ROUNDING = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8}  # of what comes out: a few ulps, and one
KINDS = {torch.float32: np.uint32(0), torch.bfloat16: np.uint16(0)}
FUSED = {
    "llama": 4,
    "mistral": 4,
    "qwen2": 4,
    "qwen3": 4,
    "smollm3": 3,
}  # layers of four; smollm3's last rotates nothing
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def numbers(*shape: int, dtype: torch.dtype, seed: int = 0, size: float = 1.0) -> torch.Tensor:
    return (size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


# ---- the compiled calls


@DTYPES
@pytest.mark.parametrize(("n", "width"), [(1, 576), (7, 33), (3, 1)])
def test_a_norm_is_that_of_float64_and_adds_what_changed(dtype: torch.dtype, n: int, width: int) -> None:
    x, change = (numbers(n, width, dtype=dtype, seed=seed) for seed in (1, 2))
    weight = numbers(width, dtype=dtype, seed=3)
    kind, out, total = KINDS[dtype], torch.empty_like(x), torch.full_like(x, 9)
    for delta in (None, change):
        at_delta = 0 if delta is None else delta.data_ptr()
        addresses = x.data_ptr(), at_delta, total.data_ptr(), weight.data_ptr(), out.data_ptr()
        add_norm(kind, *addresses, n, width, 1e-5)
        whole = x if delta is None else x + delta
        assert torch.equal(total, torch.full_like(x, 9) if delta is None else whole)
        scaled = whole.double() / (whole.double().square().mean(1, keepdim=True) + 1e-5).sqrt()
        assert ((out.double() - weight.double() * scaled).abs() <= 2 * ROUNDING[dtype] * scaled.abs() * 4).all()


@DTYPES
@pytest.mark.parametrize(("n", "heads", "n_rotated", "dim"), [(1, 15, 12, 64), (5, 4, 3, 6), (2, 3, 3, 2)])
def test_heads_are_rotated_and_dealt_as_in_float64(
    dtype: torch.dtype, n: int, heads: int, n_rotated: int, dim: int
) -> None:
    x, cos, sin = numbers(n, heads, dim, dtype=dtype), *(numbers(n, dim, dtype=dtype, seed=s) for s in (1, 2))
    out = torch.empty(heads, n, dim, dtype=dtype)
    rotate(KINDS[dtype], *(t.data_ptr() for t in (x, cos, sin, out)), n, heads, n_rotated, dim)
    wide, c, s = x.double().transpose(0, 1), cos.double(), sin.double()
    half = torch.cat((-wide[..., dim // 2 :], wide[..., : dim // 2]), -1)
    want = wide * c + half * s
    bound = ROUNDING[dtype] * ((wide * c).abs() + (half * s).abs())
    assert ((out.double() - want).abs() <= bound)[:n_rotated].all()
    assert torch.equal(out[n_rotated:], x.transpose(0, 1)[n_rotated:])


@DTYPES
@pytest.mark.parametrize(("n", "width"), [(1, 1536), (6, 35)])
def test_a_gate_is_that_of_float64(dtype: torch.dtype, n: int, width: int) -> None:
    x = numbers(n, 2, width, dtype=dtype, size=8.0)
    x[0, 0, :9] = torch.tensor([0.0, -0.0, 300.0, -300.0, 88.0, -88.0, 1e-30, -1e-30, -20.0]).to(dtype)
    out = torch.empty(n, width, dtype=dtype)
    gate(KINDS[dtype], x.data_ptr(), out.data_ptr(), n, width)
    gates, ups = x.double()[:, 0], x.double()[:, 1]
    want = nn.functional.silu(gates) * ups
    bound = ROUNDING[dtype] * (4 + gates.abs() / 4) * want.abs()  # exp loses what its argument has before the point
    assert ((out.double() - want).abs() <= bound + 1e-34).all()


@DTYPES
@pytest.mark.parametrize("wrong", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_not_lost(dtype: torch.dtype, wrong: float) -> None:
    """A request with NaN fails by name only if NaN comes out; its neighbours' rows are untouched."""
    x = numbers(2, 8, dtype=dtype)
    x[0, 3] = wrong
    out, weight, kind = torch.empty_like(x), torch.ones(8, dtype=dtype), KINDS[dtype]
    add_norm(kind, x.data_ptr(), 0, 0, weight.data_ptr(), out.data_ptr(), 2, 8, 1e-5)
    assert out[0].isnan().any() and out[1].isfinite().all()
    rotated, ones = torch.empty_like(x), torch.ones(2, 8, dtype=dtype)
    rotate(kind, x.data_ptr(), ones.data_ptr(), ones.data_ptr(), rotated.data_ptr(), 2, 1, 1, 8)
    assert not rotated[0].isfinite().all() and rotated[1].isfinite().all()
    gated = torch.empty(2, 4, dtype=dtype)
    gate(kind, x.roll(1, 1).contiguous().data_ptr(), gated.data_ptr(), 2, 4)
    assert not gated[0].isfinite().all() and gated[1].isfinite().all()


# ---- which models get them


@pytest.mark.parametrize("name", [*architectures.PACKABLE, *CHANGES])
def test_layers_like_llamas_are_fused(name: str) -> None:
    assert fuse(replica(small(name))) == FUSED.get(name, 0)


def test_without_a_compiler_none_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    assert fuse(replica(small("llama"))) == 0


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the compiled calls that are made."""
    made: list[str] = []

    def counted(name: str, function: Any) -> Any:
        def call(*arguments: Any) -> None:
            made.append(name)
            function(*arguments)

        return call

    for name in ("add_norm", "rotate", "gate"):
        monkeypatch.setattr(fused, name, counted(name, getattr(fused, name)))
    return made


@pytest.mark.parametrize("name", FUSED)
def test_fused_rows_are_those_of_plain_forwards(name: str, calls: list[str]) -> None:
    model = small(name)
    walk = Walk(packed_engine(model), model)
    for n in (1, 6, 1, 9, 2):
        calls.clear()
        walk.step(n)
        assert sorted(calls) == sorted(["add_norm", "add_norm", "rotate", "gate"] * FUSED[name])
    assert walk.worst.nats <= TINY_NATS


def test_rows_of_bfloat16_are_nearer_to_float32_than_transformers_own(calls: list[str]) -> None:
    """Fewer roundings: on average over many rows, not on each."""
    half = fresh("llama", dtype=torch.bfloat16)
    exact = small("llama")
    for of_half, of_exact in zip(half.parameters(), exact.parameters(), strict=True):
        of_half.data.copy_(of_exact.data)
    rounded = fresh("llama")
    rounded.load_state_dict({name: weight.float() for name, weight in half.state_dict().items()})
    rng = random.Random(0)
    contexts = contexts_of(*(random_ids(rng, 12) for _ in range(40)))
    want = torch.stack([plain_row(rounded, context.token_ids) for context in contexts])

    def error(is_fused: bool) -> float:
        engine = packed_engine(half, is_fused=is_fused)
        rows = torch.cat([engine.evaluate(contexts[i : i + 8]) for i in range(0, 40, 8)])
        return float((rows.float().log_softmax(1) - want).abs().mean())

    ours, own = error(True), error(False)
    assert calls and 0 < ours < own


def test_many_rows_and_other_types_are_the_layers_own(calls: list[str]) -> None:
    model = small("llama")
    engine = packed_engine(model)
    ids = random_ids(random.Random(0), MOST_ROWS + 1)
    engine.evaluate(contexts_of(ids))
    assert not calls
    engine.evaluate(contexts_of(ids[:3] + [7]))
    assert calls
    calls.clear()
    other = fresh("llama", dtype=torch.float16)
    packed_engine(other).evaluate(contexts_of(ids[:5]))
    assert not calls


def test_heads_of_other_shapes_are_left_alone() -> None:
    attention = fresh("llama").model.layers[0].self_attn
    assert fused._has_whole_heads(attention)
    attention.head_dim = 15
    assert not fused._has_whole_heads(attention)
    attention.head_dim = 16
    attention.v_proj = nn.Linear(64, 16)
    assert not fused._has_whole_heads(attention)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_layers_with_a_users_hooks_are_left_alone(register: str) -> None:
    """A hook inside a layer, as programs that steer activations have, would be passed over."""
    model = fresh("llama")
    getattr(model.model.layers[2].mlp, register)(lambda *_: None)
    assert fuse(replica(model)) == 3


def test_layers_with_a_users_code_are_left_alone() -> None:
    class Doubled(LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            doubled: torch.Tensor = 2 * super().forward(x)
            return doubled

    model = fresh("llama")
    model.model.layers[1].mlp = Doubled(model.config)
    model.model.layers[0].self_attn.forward = model.model.layers[0].self_attn.forward
    assert fuse(replica(model)) == 2
    own = model.model.layers[2].forward
    model.model.layers[2].forward = lambda *arguments, **others: 1.01 * own(*arguments, **others)
    model.model.layers[3].__class__ = type("Steered", (LlamaDecoderLayer,), {"__module__": __name__})
    assert fuse(replica(model)) == 0


def test_attention_that_is_told_its_positions_is_left_alone(wrap: Callable[..., AsyncTransformer]) -> None:
    """Ministral 3 scales its queries from one position on, far beyond those that the self-test looks at."""
    small_one = architectures._SMALL | {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "llama_4_scaling_beta": 0.5,
            "original_max_position_embeddings": 64,
        }
    }
    try:
        config = AutoConfig.for_model("ministral3", **small_one)
    except ValueError:
        pytest.skip("this transformers has no Ministral 3")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    assert fuse(replica(model)) == 0
    llm, ids = wrap(model), random_ids(random.Random(0), 150)
    llm.next_token_logprobs_sync(ids[:-1])
    row = llm.next_token_logprobs_sync(ids)
    assert (row - asyncio.run(llm.next_token_logprobs_uncached(ids))).abs().max() <= TINY_NATS


def test_norms_of_another_type_are_the_layers_own() -> None:
    """transformers refuses them; the compiled calls would read past their end."""
    model = replica(fresh("llama").bfloat16())
    assert fuse(model) == 4
    x, angles = torch.randn(1, 3, 64).bfloat16(), torch.ones(1, 3, 16).bfloat16()
    layer = model.model.layers[1]
    layer.post_attention_layernorm.float()
    calls = []
    layer.forward._own = lambda *arguments, **others: calls.append(arguments)
    layer(x, position_embeddings=(angles, angles))
    assert len(calls) == 1


def test_whatever_a_fused_layer_raises_the_model_is_packed_without(
    wrap: Callable[..., AsyncTransformer], monkeypatch: pytest.MonkeyPatch
) -> None:
    def raising(*_: Any, **__: Any) -> None:
        raise ValueError("not enough values to unpack")

    monkeypatch.setattr(FusedLayer, "__call__", raising)
    llm = wrap(fresh("llama"))
    assert llm.path == "packed" and llm._service.engine.n_fused == 0  # type: ignore[attr-defined]


def test_without_a_compiler_models_are_packed_all_the_same(
    wrap: Callable[..., AsyncTransformer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    llm = wrap(fresh("llama"))
    assert llm.path == "packed" and llm._service.engine.n_fused == 0  # type: ignore[attr-defined]


def test_a_users_model_keeps_its_own_layers(wrap: Callable[..., AsyncTransformer]) -> None:
    model = fresh("llama")
    llm = wrap(model)
    assert llm._service.engine.n_fused == 4  # type: ignore[attr-defined]
    assert not any(isinstance(vars(layer).get("forward"), FusedLayer) for layer in model.model.layers)


# ---- mutants: the self-test at load must see each


def without_rotation(original: Callable[..., None]) -> Callable[..., None]:
    return lambda *arguments: original(*arguments[:7], 0, arguments[8])


def keys_not_rotated(original: Callable[..., None]) -> Callable[..., None]:
    return lambda *arguments: original(*arguments[:7], 4, arguments[8])


def nothing_added(original: Callable[..., None]) -> Callable[..., None]:
    def call(*arguments: Any) -> None:
        kind, x, delta, *others = arguments
        if not delta:
            return original(*arguments)
        zeros = torch.zeros(others[3] * others[4])
        return original(kind, x, zeros.data_ptr(), *others)

    return call


def another_eps(original: Callable[..., None]) -> Callable[..., None]:
    return lambda *arguments: original(*arguments[:-1], 1e-2)


def gates_for_ups(original: Callable[..., None]) -> Callable[..., None]:
    def call(kind: Any, x: int, out: int, n: int, width: int) -> None:
        held = torch.from_numpy(np.ctypeslib.as_array((ctypes.c_float * (2 * n * width)).from_address(x)))
        swapped = held.view(n, 2, width).flip(1).contiguous()
        original(kind, swapped.data_ptr(), out, n, width)

    return call


MUTANTS = [
    ("rotate", without_rotation),
    ("rotate", keys_not_rotated),
    ("add_norm", nothing_added),
    ("add_norm", another_eps),
    ("gate", gates_for_ups),
]


@pytest.mark.parametrize(("name", "mutant"), MUTANTS)
def test_the_self_test_sees_wrong_layers_and_they_are_not_fused(
    name: str, mutant: Any, monkeypatch: pytest.MonkeyPatch, wrap: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = fresh("llama")
    check_packed(packed_engine(model), replica(model), None)
    monkeypatch.setattr(fused, name, mutant(getattr(fused, name)))
    with pytest.raises(Failed, match="log-probabilities differ from plain forwards"):
        check_packed(packed_engine(model), replica(model), None)
    with caplog.at_level(logging.INFO):
        llm = wrap(model)
    assert llm.path == "packed" and llm._service.engine.n_fused == 0
    assert "layers of LlamaForCausalLM are not fused: log-probabilities differ" in caplog.text
