"""Copies of a model's modules that share its weights, so that a wrapped model stays as its owner left it."""

from __future__ import annotations

import copy
from typing import Any

from genlm_backend.llm.hf.linear import PackedLinear


def replica(model: Any, attention: str | None = None) -> Any:
    """A model of new module objects over the same parameters, in evaluation mode.

    Buffers that are saved with the weights are shared too. The others, such as frequencies of rotary embeddings, are
    copied: they are small, and some models write into them at each call (transformers since 5.23, for longrope).

    Args:
        model: Any transformers model; not changed.
        attention: Name of the attention implementation of the copy; None keeps the model's own.
    """
    saved = model.state_dict(keep_vars=True).values()
    shared: dict[int, Any] = {id(tensor): tensor for tensor in [*model.parameters(), *saved]}
    shared |= {id(module): module for module in model.modules() if isinstance(module, PackedLinear)}
    copied = copy.deepcopy(model, shared)
    if attention is not None:
        for module in copied.modules():
            config: Any = getattr(module, "config", None)
            if hasattr(config, "_attn_implementation"):
                config._attn_implementation = attention
    return copied.eval()


def reset_rope(model: Any) -> None:
    """Put rotary embeddings that adapt to the longest sequence seen back to where they start."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, str) and "dynamic" in kinds:
            module.register_buffer("inv_freq", module.original_inv_freq, persistent=False)
            module.max_seq_len_cached = module.original_max_seq_len
        elif isinstance(kinds, dict):
            for layer_type, kind in kinds.items():
                if "dynamic" in kind:
                    original = getattr(module, f"{layer_type}_original_inv_freq")
                    module.register_buffer(f"{layer_type}_inv_freq", original, persistent=False)
                    setattr(module, f"{layer_type}_max_seq_len_cached", module.original_max_seq_len)


def static_rope_length(model: Any) -> int | None:
    """The longest sequence up to which rotary embeddings do not depend on a batch's longest one; None if always."""
    limits: list[int] = []
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if kinds is None:
            continue
        parameters = getattr(module.config, "rope_parameters", None) or {}
        by_layer = kinds if isinstance(kinds, dict) else {None: kinds}
        for layer_type, kind in by_layer.items():
            of_layer = parameters.get(layer_type, {}) if layer_type is not None else parameters
            if "dynamic" in kind:
                limits.append(int(module.original_max_seq_len))
            elif kind == "longrope":
                limits.append(int(of_layer["original_max_position_embeddings"]))
    return min(limits) if limits else None
