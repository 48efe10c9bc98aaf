"""Small random models of many architectures, for tests that hold for every kind of attention."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB_SIZE = 512
CONTEXT_LENGTH = 256

_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": CONTEXT_LENGTH,
}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": VOCAB_SIZE, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": CONTEXT_LENGTH}
    | _SPECIAL,
    "llama": _SMALL,
    "mistral": _SMALL | {"sliding_window": 8},
    "gemma2": _SMALL | {"sliding_window": 8},
    "gemma3_text": _SMALL | {"sliding_window": 8},
    "qwen2": _SMALL,
    "qwen3": _SMALL,
    "qwen3_moe": _SMALL | {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": _SMALL
    | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "sliding_window": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "phi3": _SMALL | _SPECIAL,
    "olmo2": _SMALL | _SPECIAL,
    "granite": _SMALL,
    "smollm3": _SMALL | _SPECIAL,
    "gpt_neox": {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT_LENGTH,
    }
    | _SPECIAL,
    "bloom": {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "n_layer": 4, "n_head": 4},
    "mamba": {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "num_hidden_layers": 2},
}
"""Configuration of each, small enough for a forward of a few milliseconds."""

NOT_PACKABLE = frozenset({"bloom", "mamba"})
"""Those whose attention is not a function of (query, visible keys): ALiBi by slot, and a recurrent state."""

PACKABLE = tuple(name for name in ARCHITECTURES if name not in NOT_PACKABLE)


def build(
    name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, attention: str = "sdpa", **changes: Any
) -> PreTrainedModel:
    """A random model of one architecture, in evaluation mode; equal arguments give equal weights.

    Args:
        name: A key of `ARCHITECTURES`, or any model type of transformers (then `changes` are added to the small sizes).
        seed: Of the weights; the global generator is left as it was.
        dtype: Of the weights.
        attention: `attn_implementation`; architectures without it fall back to "eager".
        changes: Configuration values that differ from the table.
    """
    options = copy.deepcopy(ARCHITECTURES.get(name, _SMALL)) | changes
    config = AutoConfig.for_model(name, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        except ValueError:
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model.eval().to(dtype)
