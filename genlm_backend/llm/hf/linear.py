"""Linear layers on weights that were repacked once: faster for few rows on a CPU, in 16 bits and in float32."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from genlm_backend.llm.loading import multiplies_bfloat16

ROWS_HINT = 32  # the batch the packing is made for; other sizes work
HALF_ERROR = 2.0**-36  # of a matrix's largest weight: far below what float32 loses in a sum of products
LARGEST_HALF = 2.0**15
HALVES = (torch.bfloat16, torch.float16)
SAME_ROWS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # layers of one module that read the same rows


class PackedLinear(nn.Module):
    """A linear layer on a CPU that holds its weight only in a layout made for products with few rows."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features


class BlockedLinear(PackedLinear):
    """The weight in oneDNN's blocked layout, in its own precision."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.bias = None if linear.bias is None else linear.bias.detach()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS_HINT)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(rows, self.packed, self.bias, "none", [], "")
        return product


class HalfLinear(PackedLinear):
    """A layer whose weight is read from 16 bits, for weights that lose nothing by it: FBGEMM's products.

    Sums are float32 and rounded once, to the type of the rows. Few rows cost what reading the weight costs, so for
    float32 half the bytes are half the time; 16-bit layers are spared the products that their CPU has to emulate.

    Args:
        linear: The layer.
        scale: The weight is kept times this power of two.
    """

    def __init__(self, linear: nn.Linear, scale: float) -> None:
        super().__init__(linear)
        bias = None if linear.bias is None else linear.bias.detach().float() * scale
        self.packed = torch.ops.quantized.linear_prepack_fp16(linear.weight.detach().float() * scale, bias)
        self.scale = scale
        # One row of 16 bits torch itself multiplies as fast, without changing types. A mapped file stays mapped anyway.
        self.of_one_row = None if linear.weight.dtype == torch.float32 else (linear.weight.detach(), linear.bias)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        if self.of_one_row is not None and rows.numel() == self.in_features:
            return nn.functional.linear(rows, *self.of_one_row)
        out: torch.Tensor = torch.ops.quantized.linear_dynamic_fp16(rows.float(), self.packed)
        return (out if self.scale == 1 else out.div_(self.scale)).to(rows.dtype)


class Merged(nn.Module):
    """Layers that read the same rows, as one packed product: fewer calls, and longer stretches of memory to read.

    The last product is kept while its parts are asked for, and used only for the very rows it was made of.

    Args:
        packed: Of all weights, one below the other.
        n_parts: How many layers it stands for.
    """

    def __init__(self, packed: PackedLinear, n_parts: int) -> None:
        super().__init__()
        self.packed = packed
        self.n_parts = n_parts
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None  # rows and product; set at once, for any thread

    def product(self, rows: torch.Tensor, part: int) -> torch.Tensor:
        last = self._last
        if last is None or last[0] is not rows:
            last = rows, self.packed(rows)
        self._last = None if part == self.n_parts - 1 else last
        return last[1]


class Part(PackedLinear):
    """One of the layers that are merged.

    Args:
        linear: The layer.
        merged: What computes it along with others.
        part: Its number there.
        start: The first of its columns in the product.
    """

    def __init__(self, linear: nn.Linear, merged: Merged, part: int, start: int) -> None:
        super().__init__(linear)
        self.merged = merged
        self.columns = slice(start, start + linear.out_features)
        self._part = part

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.merged.product(rows, self._part)[..., self.columns]


def half_scale(weight: torch.Tensor) -> float | None:
    """The power of two times which a float32 weight fits float16 without loss; None if there is none.

    Any float16 checkpoint does, and a bfloat16 one but for weights 2^-36 below its matrix's largest.
    """
    largest = float(weight.abs().max())
    if not 0 < largest < torch.inf:
        return None
    for scale in (1.0, 2.0 ** float(torch.tensor(LARGEST_HALF / largest).log2().floor())):
        if largest * scale <= LARGEST_HALF:
            error = float(((weight * scale).half().float() - weight * scale).abs().max())
            if error <= HALF_ERROR * largest * scale:
                return scale
    return None


def pack(linear: nn.Linear) -> PackedLinear | None:
    """The fastest packed form of a layer that `gains`; None for a weight of 16 bits that float16 does not hold."""
    weight = linear.weight.detach()
    if _has_halves() and not (weight.dtype == torch.bfloat16 and multiplies_bfloat16()):
        scale = half_scale(weight.float())
        if scale is not None:
            return HalfLinear(linear, scale)
    return BlockedLinear(linear) if weight.dtype == torch.float32 or multiplies_bfloat16() else None


Replaced = list[tuple[nn.Module, str, nn.Module]]


def pack_linears(model: Any) -> Replaced:
    """Replace a model's plain CPU linear layers in place.

    Returns:
        What was replaced, for `unpack_linears`; drop it to free the original weights. Empty where this is no gain.
    """
    replaced: Replaced = []
    packed: dict[int, PackedLinear | None] = {}
    for parent in list(model.modules()):
        for names in SAME_ROWS:
            for name, child, part in _merge(parent, names):
                setattr(parent, name, part.eval())
                replaced.append((parent, name, child))
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and gains(child.weight):
                if id(child) not in packed:
                    with torch.no_grad():
                        packed[id(child)] = pack(child)
                if (instead := packed[id(child)]) is not None:
                    setattr(parent, name, instead.eval())
                    replaced.append((parent, name, child))
    return replaced


def _merge(parent: nn.Module, names: Sequence[str]) -> list[tuple[str, nn.Linear, Part]]:
    """Parts that stand for layers of a module; none if they cannot be one."""
    layers: list[nn.Linear] = [layer for name in names if type(layer := getattr(parent, name, None)) is nn.Linear]
    if len(layers) < len(names) or len(set(map(id, layers))) < len(names):
        return []
    if len({(layer.weight.dtype, layer.in_features, layer.bias is None) for layer in layers}) > 1:
        return []
    if not gains(layers[0].weight) or (layers[0].weight.dtype in HALVES and not multiplies_bfloat16()):
        return []  # of 16 bits that are emulated, `HalfLinear` keeps the weights as they are too
    with torch.no_grad():
        n_rows = sum(layer.out_features for layer in layers)
        has_bias = layers[0].bias is not None
        whole = nn.Linear(layers[0].in_features, n_rows, bias=has_bias, device="meta")
        whole.weight = nn.Parameter(torch.cat([layer.weight.detach() for layer in layers]), requires_grad=False)
        if has_bias:
            whole.bias = nn.Parameter(torch.cat([layer.bias.detach() for layer in layers]), requires_grad=False)
        packed = pack(whole)
    if packed is None:
        return []
    merged, starts = Merged(packed, len(names)), [0, *accumulate(layer.out_features for layer in layers)]
    return [
        (name, layer, Part(layer, merged, part, start))
        for part, (name, layer, start) in enumerate(zip(names, layers, starts, strict=False))
    ]


def gains(weight: torch.Tensor) -> bool:
    """Whether products with a repacked weight are faster; see docs/decisions.md."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if multiplies_bfloat16() and weight.dtype != torch.float32:
        return weight.dtype == torch.bfloat16
    is_measured = platform.machine().lower() in ("x86_64", "amd64")
    return is_measured and (weight.dtype == torch.float32 or (weight.dtype in HALVES and _has_halves()))


def _has_halves() -> bool:
    """Whether this build of torch has FBGEMM's products with weights in 16 bits."""
    return torch.backends.quantized.engine in ("x86", "fbgemm")


def unpack_linears(replaced: Replaced) -> None:
    """Put the original layers back."""
    for parent, name, child in replaced:
        setattr(parent, name, child)
