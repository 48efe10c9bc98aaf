"""Does an engine compute what plain forwards compute? Decided at load, on the model itself and on a small float32 twin.

The twin has the model's class and configuration with few layers, a small vocabulary and random weights, in float32,
and its windows and chunks are shorter than the probe: errors that bfloat16 hides, or that only a context longer than
the window shows, are found without running the whole model in float32.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from genlm_backend.llm.hf.attention import NotPackable, implementation_for
from genlm_backend.llm.hf.lists import list_cost
from genlm_backend.llm.hf.packed import PackedEngine
from genlm_backend.llm.hf.replica import replica
from genlm_backend.llm.hf.uncached import UncachedEngine
from genlm_backend.llm.service import Context, Engine

# Nats, over tokens with p > 1e-8. On the twin, correct architectures are within 3e-6 and the mildest trap is at 1e-3;
# on real weights in float32 rounding alone was seen to reach 6e-5 (SmolLM2-135M), and grows with the model.
TWIN_TOLERANCE = 5e-5
MODEL_TOLERANCE = 5e-4
HALF_PRECISION_TV = 0.15  # total variation on the model itself in 16 bits: gross errors only
WINDOW = 8
PROBE_TOKENS = 40
TWIN_VOCABULARY = 96
TWIN_LAYERS = 3
_logger = logging.getLogger(__name__)


class Failed(Exception):
    """An engine does not compute what plain forwards compute; the text says how."""


class Difference(NamedTuple):
    """Largest difference of log-probabilities over tokens with p > 1e-8, nats, and total variation, over probes."""

    nats: float
    total_variation: float


def check_packed(engine: PackedEngine, model: Any, limit: int | None) -> None:
    """Raise unless packed attention serves this model.

    Args:
        engine: The packed engine of the model.
        model: A replica with the model's own attention.
        limit: Longest context the engine will get.

    Raises:
        Failed: With the reason.
    """
    try:
        _check_layers(engine, model)
        _check_numbers(engine, UncachedEngine(model), limit, MODEL_TOLERANCE)
        twin = make_twin(model)
        if twin is not None:
            # Without lists, and with.
            for cost in (math.inf, 0.0) if list_cost(twin.device) < math.inf else (math.inf,):
                its_replica = replica(twin, implementation_for(own_attention(twin)))
                packed = PackedEngine(its_replica, kv_cache_bytes=2**30, is_fused=engine.n_fused > 0, list_cost=cost)
                _check_numbers(packed, UncachedEngine(twin), limit, TWIN_TOLERANCE)
        elif next(model.parameters()).dtype != torch.float32:
            raise Failed("no small float32 twin of the model could be made to compare with")
    except NotPackable as error:
        raise Failed(str(error)) from error


def check_engine(engine: Engine, model: Any, limit: int | None) -> None:
    """Raise `Failed` unless an engine agrees with plain forwards of the model, as closely as its dtype allows."""
    _check_numbers(engine, UncachedEngine(model), limit, MODEL_TOLERANCE)


def make_twin(model: Any) -> Any | None:
    """A small random float32 model of the same class and kind of layers; None if the class cannot be shrunk."""
    config = copy.deepcopy(model.config)
    try:
        _shrink(config.get_text_config())
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(0)  # torch.manual_seed would seed every GPU too
            twin = type(model)._from_config(config, dtype=torch.float32, attn_implementation=own_attention(model))
    except Exception as error:  # a class may refuse the smaller configuration in any way
        _logger.info("no twin of %s: %s", type(model).__name__, error)
        return None
    return twin.eval().to(model.device)


def _shrink(config: Any) -> None:
    """Make a configuration small, its windows and chunks shorter than the probe."""
    config.vocab_size = TWIN_VOCABULARY
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(config, name, None) is not None:  # not None: some configurations insist on a number
            setattr(config, name, TWIN_VOCABULARY - 1)
    n_layers = TWIN_LAYERS
    kinds = getattr(config, "layer_types", None)
    if kinds:
        n_layers = max(n_layers, next(n for n in range(1, len(kinds) + 1) if set(kinds[:n]) == set(kinds)))
    n_layers = min(n_layers, config.num_hidden_layers)
    config.num_hidden_layers = n_layers
    if kinds:
        config.layer_types = kinds[:n_layers]
    n_chosen = getattr(config, "num_experts_per_tok", None)
    n_experts = max(4, 2 * n_chosen) if isinstance(n_chosen, int) else 4
    most = {
        "sliding_window": WINDOW,
        "attention_chunk_size": WINDOW,
        "intermediate_size": 256,
        "moe_intermediate_size": 256,
        "num_local_experts": n_experts,
        "num_experts": n_experts,
        "n_routed_experts": n_experts,
        "n_group": 1,
        "topk_group": 1,
    }
    for name, value in most.items():
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, min(value, getattr(config, name)))


def own_attention(model: Any) -> str:
    """The attention implementation a model was loaded with."""
    return str(getattr(model.config, "_attn_implementation", None) or "eager")


def difference(got: torch.Tensor, want: torch.Tensor) -> Difference:
    """How far logits (n, vocab) are from others, as distributions."""
    got, want = got.double().log_softmax(-1), want.double().log_softmax(-1)
    likely = want > -18.42  # p > 1e-8
    nats = torch.where(likely, got - want, 0.0).nan_to_num(nan=torch.inf).abs().max()
    total_variation = 0.5 * (got.exp() - want.exp()).abs().sum(-1).max().nan_to_num(nan=torch.inf)
    return Difference(float(nats), float(total_variation))


def probes(n_ids: int, limit: int | None, is_brief: bool) -> list[list[Context]]:
    """Batches that prefill, branch, nest, extend several, go back, and re-ask, of at most `limit` tokens.

    The brief form prefills and branches only.
    """
    n = PROBE_TOKENS if limit is None else min(PROBE_TOKENS, limit - 2)
    ids = [(7 * i * i + 11 * i + 3) % n_ids for i in range(n + 8)]

    def context(*parts: list[int]) -> Context:
        return Context(None, tuple(token for part in parts for token in part))

    trunk, half = ids[: n - 6], ids[: n // 2]
    if is_brief:
        return [[context(half)], [context(trunk), context(half, ids[4:7])]]
    return [
        [context(half)],
        [context(trunk), context(half, ids[4:7]), context(ids[2:5])],
        [context(trunk, [ids[i]]) for i in range(5)] + [context(trunk, ids[:2]), context(half)],
        [context(trunk, [ids[i]], [ids[i + 1]]) for i in range(5)] + [context(half, ids[4:6])],
    ]


def _check_layers(engine: PackedEngine, model: Any) -> None:
    engine.evaluate([Context(None, (1, 2, 3))])
    n_layers = model.config.get_text_config().num_hidden_layers
    if sorted(engine.last_layers) != list(range(n_layers)):
        raise Failed(f"{len(engine.last_layers)} of {n_layers} layers go through the attention interface")


def _check_numbers(engine: Engine, oracle: UncachedEngine, limit: int | None, tolerance: float) -> None:
    model = oracle.model
    n_ids = model.get_input_embeddings().num_embeddings
    is_exact = next(model.parameters()).dtype == torch.float32
    check: Callable[[Difference], bool] = (
        (lambda d: d.nats <= tolerance) if is_exact else (lambda d: d.total_variation <= HALF_PRECISION_TV)
    )
    for probe in probes(n_ids, limit, is_brief=not is_exact):
        batch = list(dict.fromkeys(probe))
        got = engine.evaluate(batch)
        want = torch.cat([oracle.evaluate([context]) for context in batch])
        apart = difference(got, want)
        if not check(apart):
            raise Failed(
                f"log-probabilities differ from plain forwards by {apart.nats:.1e} nats "
                f"(total variation {apart.total_variation:.1e})"
            )
