"""FusedLayer: a decoder layer as its products and one compiled call between each two, for few rows on a CPU.

A step of a few particles is bound by reading the weights once; the sixty small operations that a layer of transformers
has between its products take about as long again.

Importing this file imports numba.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numba
import numpy as np
import torch
from torch import nn

from genlm_backend.llm.hf.attention import tree_attention
from genlm_backend.llm.hf.layer_kernel import add_norm, gate, rotate
from genlm_backend.llm.hf.linear import Merged, PackedLinear, Part

MOST_ROWS = 128  # the compiled calls have one thread; with more rows the work of all pays

# What attention may be given: no position_ids, on which it might depend in places that no self-test looks at.
_OF_ATTENTION = {
    *("hidden_states", "position_embeddings", "attention_mask", "past_key_value", "past_key_values"),
    *("cache_position", "kwargs"),
}
_KINDS = {torch.float32: np.uint32(0), torch.bfloat16: np.uint16(0)}  # see `add_norm`


def fuse(model: Any) -> int:
    """Give those decoder layers of a model that are built like Llama's a faster forward; the number of them.

    Layers of the same parts may put them together otherwise: whether the result is theirs, a self-test must show.

    Args:
        model: One that nobody else uses, see `replica`.
    """
    if model.device.type != "cpu" or numba.config.DISABLE_JIT:
        return 0
    layers = [module for module in model.modules() if _is_like_llama(module)]
    angles = _Angles()
    for layer in layers:
        layer.forward = FusedLayer(layer, angles)
    return len(layers)


class _Angles:
    """The rotary embeddings of a forward, looked at once for all its layers."""

    def __init__(self) -> None:
        self.pair: Any = None
        self.kind: tuple[Any, Any] | None = None  # shape (1, n, head_dim) and type; None for what rotates otherwise
        self.cos = self.sin = 0  # addresses

    def look_at(self, pair: Any) -> None:
        self.pair, self.kind = pair, None
        if isinstance(pair, tuple) and len(pair) == 2:
            cos, sin = pair
            if (cos.shape, cos.dtype) == (sin.shape, sin.dtype) and cos.is_contiguous() and sin.is_contiguous():
                self.kind = cos.shape, cos.dtype
                self.cos, self.sin = cos.data_ptr(), sin.data_ptr()


class FusedLayer:
    """The forward of one decoder layer: attention with rotary embeddings, then a gated MLP, a norm before each.

    With many rows, or types or positions that the compiled calls do not know, it is the layer's own.

    Args:
        layer: As `fuse` chooses it.
        angles: Shared by the layers of a model.
    """

    def __init__(self, layer: Any, angles: _Angles) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._own = type(layer).forward.__get__(layer)
        self._angles = angles
        self._before, self._after = layer.input_layernorm, layer.post_attention_layernorm
        self._attention = attention
        of_heads = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        self._norms = [self._before, self._after, *(norm for norm in of_heads if norm is not None)]
        self._head_dim: int = attention.head_dim
        n_heads, n_kv_heads = (layer.out_features // self._head_dim for layer in (attention.q_proj, attention.k_proj))
        self._heads = [n_heads, n_kv_heads, n_kv_heads]  # of queries, keys, values
        self._width: int = mlp.up_proj.out_features
        self._queries_keys_values = _as_one((attention.q_proj, attention.k_proj, attention.v_proj))
        self._gates_and_ups = _as_one((mlp.gate_proj, mlp.up_proj))
        self._o_proj, self._down_proj = attention.o_proj, mlp.down_proj

    def __call__(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Any = None,
        **others: Any,
    ) -> torch.Tensor:
        shape, dtype, angles = hidden_states.shape, hidden_states.dtype, self._angles
        if angles.pair is not position_embeddings:
            angles.look_at(position_embeddings)
        kind = _KINDS.get(dtype)
        _, n, width = shape
        if (
            kind is None
            or not hidden_states.is_cpu  # its owner may move a model
            or n > MOST_ROWS
            or angles.kind != ((1, n, self._head_dim), dtype)
            or past_key_values is not None
            or any(norm.weight.dtype != dtype for norm in self._norms)
            or not hidden_states.is_contiguous()
        ):
            own: torch.Tensor = self._own(
                hidden_states,
                attention_mask=attention_mask,
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
                **others,
            )
            return own
        x = hidden_states.data_ptr()
        normed, total = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
        at_normed = normed.data_ptr()
        add_norm(kind, x, 0, 0, self._before.weight.data_ptr(), at_normed, n, width, _eps(self._before))
        change = self._o_proj(self._attended(kind, self._queries_keys_values(normed), attention_mask))
        weight = self._after.weight.data_ptr()
        add_norm(kind, x, change.data_ptr(), total.data_ptr(), weight, at_normed, n, width, _eps(self._after))
        gates_and_ups = self._gates_and_ups(normed)
        gated = torch.empty(1, n, self._width, dtype=dtype)
        gate(kind, gates_and_ups.data_ptr(), gated.data_ptr(), n, self._width)
        return total.add_(self._down_proj(gated))

    def _attended(self, kind: Any, product: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """(1, n, columns of queries, keys and values) -> (1, n, heads * value_dim)."""
        attention, n, head_dim, heads = self._attention, product.shape[1], self._head_dim, self._heads
        if hasattr(attention, "q_norm"):
            queries, keys, values = product.unflatten(2, (-1, head_dim)).split(heads, 2)
            product = torch.cat((attention.q_norm(queries), attention.k_norm(keys), values), 2)
        dealt = torch.empty(1, sum(heads), n, head_dim, dtype=product.dtype)
        n_rotated = heads[0] + heads[1]
        angles = self._angles
        rotate(kind, product.data_ptr(), angles.cos, angles.sin, dealt.data_ptr(), n, sum(heads), n_rotated, head_dim)
        query, key, value = dealt.split(heads, 1)
        attended, _ = tree_attention(attention, query, key, value, mask, attention.scaling)
        return attended.reshape(1, n, -1)


def _as_one(layers: Sequence[Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    """The products of linear layers with the same rows, side by side."""
    first = layers[0]
    if isinstance(first, Part) and first.merged.n_parts == len(layers):
        packed: Callable[[torch.Tensor], torch.Tensor] = first.merged.packed
        return packed
    return lambda rows: torch.cat([layer(rows) for layer in layers], 2)


def _is_like_llama(layer: nn.Module) -> bool:
    parts = dict(layer.named_children())
    if set(parts) != {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}:
        return False
    if not all(_runs_its_class(module) for module in layer.modules()):
        return False
    if not all(_has_no_hooks(module) for module in layer.modules() if module is not layer):
        return False  # those of the layer itself are called all the same
    if not set(inspect.signature(parts["self_attn"].forward).parameters) <= _OF_ATTENTION:
        return False
    in_attention, in_mlp = (dict(parts[name].named_children()) for name in ("self_attn", "mlp"))
    norms = [parts["input_layernorm"], parts["post_attention_layernorm"]]
    return (
        set(in_attention) - {"q_norm", "k_norm"} == {"q_proj", "k_proj", "v_proj", "o_proj"}
        and set(in_mlp) == {"gate_proj", "up_proj", "down_proj", "act_fn"}
        and _is_silu(in_mlp["act_fn"])
        and all(isinstance(getattr(norm, "weight", None), nn.Parameter) and _eps(norm) is not None for norm in norms)
        and all(len(list(norm.parameters())) == 1 for norm in norms)
        and not any(list(parts[name].parameters(recurse=False)) for name in ("self_attn", "mlp"))
        and _has_whole_heads(parts["self_attn"])
        and getattr(parts["self_attn"], "use_rope", True)
        and not hasattr(layer, "residual_multiplier")
        and isinstance(getattr(parts["self_attn"], "scaling", None), float)
    )


def _has_whole_heads(attention: Any) -> bool:
    """Whether queries, keys and values are heads of one even size, keys as many as values."""
    size = getattr(attention, "head_dim", None)
    n_queries, n_keys, n_values = (
        getattr(layer, "out_features", -1) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    return isinstance(size, int) and not (size % 2 or n_queries % size or n_keys % size) and n_keys == n_values


def _runs_its_class(module: nn.Module) -> bool:
    """Whether it runs transformers' code or torch's: other code would be passed over."""
    is_known = type(module).__module__.startswith(("transformers.", "torch.nn.")) or isinstance(
        module, PackedLinear | Merged
    )
    return is_known and "forward" not in vars(module)


def _has_no_hooks(module: nn.Module) -> bool:
    return not (module._forward_hooks or module._forward_pre_hooks)


def _is_silu(activation: nn.Module) -> bool:
    x = torch.linspace(-9.0, 9.0, 64)
    return torch.allclose(activation(x), nn.functional.silu(x))


def _eps(norm: Any) -> float | None:
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return eps if isinstance(eps, float) else None
