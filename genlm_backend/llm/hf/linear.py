"""Linear layers on weights that were repacked once: faster for few rows on a CPU, in bfloat16 and float32."""

from __future__ import annotations

import platform
from typing import Any

import torch
from torch import nn

from genlm_backend.llm.loading import multiplies_bfloat16

ROWS_HINT = 32  # the batch the packing is made for; other sizes work
HALF_ERROR = 2.0**-36  # of a matrix's largest weight: far below what float32 loses in a sum of products
LARGEST_HALF = 2.0**15


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
        packed: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, self.packed, self.bias, "none", [], "")
        return packed


class HalfLinear(PackedLinear):
    """A float32 layer whose weight is read from 16 bits, for weights that lose nothing by it: FBGEMM's products.

    Sums and inputs are float32. Few rows cost what reading the weight costs, so half the bytes are half the time.

    Args:
        linear: The layer.
        scale: The weight is kept times this power of two.
    """

    def __init__(self, linear: nn.Linear, scale: float) -> None:
        super().__init__(linear)
        bias = None if linear.bias is None else linear.bias.detach() * scale
        self.packed = torch.ops.quantized.linear_prepack_fp16(linear.weight.detach() * scale, bias)
        self.scale = scale

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.quantized.linear_dynamic_fp16(rows, self.packed)
        return out if self.scale == 1 else out.div_(self.scale)


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


def pack(linear: nn.Linear) -> PackedLinear:
    """The fastest packed form of a layer that `gains`."""
    if linear.weight.dtype == torch.float32 and torch.backends.quantized.engine in ("x86", "fbgemm"):
        scale = half_scale(linear.weight.detach())
        if scale is not None:
            return HalfLinear(linear, scale)
    return BlockedLinear(linear)


Replaced = list[tuple[nn.Module, str, nn.Module]]


def pack_linears(model: Any) -> Replaced:
    """Replace a model's plain CPU linear layers in place.

    Returns:
        What was replaced, for `unpack_linears`; drop it to free the original weights. Empty where this is no gain.
    """
    replaced: Replaced = []
    packed: dict[int, PackedLinear] = {}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and gains(child.weight):
                if id(child) not in packed:
                    with torch.no_grad():
                        packed[id(child)] = pack(child).eval()
                setattr(parent, name, packed[id(child)])
                replaced.append((parent, name, child))
    return replaced


def gains(weight: torch.Tensor) -> bool:
    """Whether products with a repacked weight are faster; see docs/decisions.md."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.float32:
        return platform.machine().lower() in ("x86_64", "amd64")  # elsewhere not measured
    return weight.dtype == torch.bfloat16 and multiplies_bfloat16()


def unpack_linears(replaced: Replaced) -> None:
    """Put the original layers back."""
    for parent, name, child in replaced:
        setattr(parent, name, child)
