"""Layers on repacked weights: products as exact as plain ones, 16 bits only where they lose nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import genlm_backend.llm.hf.linear as linear_module
from genlm_backend.llm.hf.linear import BlockedLinear, HalfLinear, Merged, Part, gains, half_scale, pack, pack_linears

pytestmark = pytest.mark.skipif(not gains(torch.empty(1, 1)), reason="no gain in float32 on this CPU")
needs_halves = pytest.mark.skipif(
    torch.backends.quantized.engine not in ("x86", "fbgemm"), reason="this build of torch has no FBGEMM"
)
# What float32 loses at most in a sum of 64 products and a bias, in any order: one rounding of a product, 64 of sums.
FLOAT32_ERROR = 65 * 2.0**-24


def layer(weight: torch.Tensor, bias: bool = True) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias)
    with torch.no_grad():
        linear.weight.copy_(weight)
    return linear


def random_weight(seed: int = 0, spread: float = 1.0) -> torch.Tensor:
    """(96, 64), logarithms spread over a few powers of ten as in trained matrices."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.randn(96, 64, generator=generator) * torch.exp(spread * torch.randn(96, 64, generator=generator))
    return 0.05 * size


def error(linear: nn.Linear, packed: nn.Module, rows: torch.Tensor) -> float:
    """Largest error beside float64, relative to the sum of the absolute products."""
    exact = rows.double() @ linear.weight.detach().double().T
    scale = rows.double().abs() @ linear.weight.detach().double().abs().T
    if linear.bias is not None:
        exact += linear.bias.detach().double()
        scale += linear.bias.detach().double().abs()
    with torch.inference_mode():
        return float(((packed(rows).double() - exact).abs() / scale).max())


@needs_halves
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [0.5, 2.5])
@pytest.mark.parametrize("bias", [True, False])
def test_weights_of_16_bits_lose_nothing(dtype: torch.dtype, spread: float, bias: bool) -> None:
    linear = layer(random_weight(spread=spread).to(dtype).float(), bias)
    packed = pack(linear)
    assert isinstance(packed, HalfLinear)
    for n_rows in (1, 5, 33):
        rows = torch.randn(1, n_rows, 64, generator=torch.Generator().manual_seed(n_rows))
        found = packed(rows)
        assert found.shape == (1, n_rows, 96)
        assert error(linear, packed, rows[0]) <= FLOAT32_ERROR


@needs_halves
def test_small_weights_are_kept_times_a_power_of_two() -> None:
    weight = random_weight().bfloat16().float()
    weight[0] *= 2.0**-14  # subnormal in float16
    assert not torch.equal(weight.half().float(), weight)
    linear = layer(weight)
    packed = pack(linear)
    assert isinstance(packed, HalfLinear)
    assert packed.scale > 1
    assert math.log2(packed.scale).is_integer()
    rows = torch.randn(7, 64, generator=torch.Generator().manual_seed(3))
    assert error(linear, packed, rows) <= FLOAT32_ERROR


@needs_halves
def test_weights_that_need_more_bits_are_kept_in_float32() -> None:
    linear = layer(random_weight())
    assert half_scale(linear.weight.detach()) is None
    packed = pack(linear)
    assert isinstance(packed, BlockedLinear)
    rows = torch.randn(7, 64, generator=torch.Generator().manual_seed(3))
    assert error(linear, packed, rows) <= FLOAT32_ERROR
    rounded = HalfLinear(linear, 1.0)  # what the choice avoids
    assert error(linear, rounded, rows) > 20 * error(linear, packed, rows)


@pytest.mark.parametrize("value", [0.0, math.inf, math.nan])
def test_weights_without_a_largest_are_kept_in_float32(value: float) -> None:
    weight = torch.full((4, 4), value)
    assert half_scale(weight) is None


def test_large_weights_are_scaled_down() -> None:
    weight = (random_weight() * 2.0**30).bfloat16().float()
    scale = half_scale(weight)
    assert scale is not None
    assert scale < 1
    assert float((weight * scale).abs().max()) <= 2.0**15


@needs_halves
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_layers_of_16_bits_are_summed_in_float32_and_rounded_once_where_they_would_be_emulated(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, bias: bool
) -> None:
    monkeypatch.setattr(linear_module, "multiplies_bfloat16", lambda: False)
    linear = layer(random_weight(), bias).to(dtype)
    assert gains(linear.weight)
    packed = pack(linear)
    assert isinstance(packed, HalfLinear)
    for n_rows in (1, 5, 33):
        rows = torch.randn(1, n_rows, 64, generator=torch.Generator().manual_seed(n_rows)).to(dtype)
        found = packed(rows)
        assert found.dtype == dtype and found.shape == (1, n_rows, 96)
        exact = nn.functional.linear(
            rows.double(), linear.weight.detach().double(), None if not bias else linear.bias.detach().double()
        )
        if n_rows == 1:
            assert torch.equal(found, linear(rows))
        half_ulp = torch.finfo(dtype).eps / 2
        assert ((found.double() - exact).abs() <= 1.01 * half_ulp * exact.abs() + 1e-6).all()


@needs_halves
def test_layers_of_16_bits_stay_where_float16_does_not_hold_them_or_their_cpu_multiplies_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    endless = layer(torch.full((4, 64), math.inf)).bfloat16()
    model = nn.ModuleDict({"endless": endless, "usual": layer(random_weight()).bfloat16()})
    monkeypatch.setattr(linear_module, "multiplies_bfloat16", lambda: False)
    assert [name for _, name, _ in pack_linears(model)] == ["usual"]
    assert model["endless"] is endless
    monkeypatch.setattr(linear_module, "multiplies_bfloat16", lambda: True)
    assert not gains(torch.empty(1, 1, dtype=torch.float16))


# ---- layers of the same rows as one product


class Projections(nn.Module):
    def __init__(self, sizes: tuple[int, int, int], bias: bool) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(24, size, bias=bias) for size in sizes)


@pytest.mark.parametrize("bias", [True, False])
def test_merged_layers_give_each_its_product(bias: bool) -> None:
    torch.manual_seed(0)
    module = Projections((32, 16, 8), bias)
    plain = [module.q_proj, module.k_proj, module.v_proj]
    replaced = pack_linears(module)
    assert [name for _, name, _ in replaced] == ["q_proj", "k_proj", "v_proj"]
    parts = [module.q_proj, module.k_proj, module.v_proj]
    assert all(isinstance(part, Part) for part in parts)
    rows, others = torch.randn(1, 5, 24), torch.randn(1, 5, 24)
    with torch.inference_mode():
        for order in ((0, 1, 2), (2, 1, 0), (1, 1, 2), (0, 0, 1)):
            for x in (rows, others, rows):
                for i in order:
                    torch.testing.assert_close(parts[i](x), plain[i](x))
        for i in (0, 1, 2, 0):  # another thread's rows between two parts
            torch.testing.assert_close(parts[i](rows), plain[i](rows))
            torch.testing.assert_close(parts[i](others), plain[i](others))


def test_a_product_is_made_once_and_not_kept_after_its_last_part() -> None:
    module = Projections((32, 16, 8), False)
    pack_linears(module)
    merged = module.q_proj.merged
    assert isinstance(merged, Merged)
    made = []
    merged.packed.register_forward_hook(lambda *_: made.append(1))
    with torch.inference_mode():
        for n in (1, 2):
            rows = torch.randn(1, 3, 24)
            for part in (module.q_proj, module.k_proj, module.v_proj):
                assert merged._last is None or part is not module.q_proj
                part(rows)
            assert len(made) == n and merged._last is None


def test_layers_that_cannot_be_one_are_packed_apart() -> None:
    module = Projections((32, 16, 8), False)
    module.k_proj = nn.Linear(24, 16, bias=True)
    pack_linears(module)
    assert not any(isinstance(part, Part) for part in module.children())
    tied = Projections((32, 16, 8), False)
    tied.v_proj = tied.k_proj
    pack_linears(tied)
    assert not any(isinstance(part, Part) for part in tied.children())
