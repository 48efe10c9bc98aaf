"""Linear layers on weights that oneDNN has repacked once: faster for few rows on a CPU, in bfloat16 and float32."""

from __future__ import annotations

import platform
from typing import Any

import torch
from torch import nn

from genlm_backend.llm.loading import multiplies_bfloat16

ROWS_HINT = 32  # the batch the packing is made for; other sizes work


class PackedLinear(nn.Module):
    """A linear layer on a CPU; holds its weight in oneDNN's blocked layout only."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = None if linear.bias is None else linear.bias.detach()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS_HINT)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        packed: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, self.packed, self.bias, "none", [], "")
        return packed


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
                        packed[id(child)] = PackedLinear(child).eval()
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
