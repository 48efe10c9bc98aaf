"""Small models whose rows depend strongly on what they see, their plain rows, and random walks over contexts."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from typing import Any

import torch

from genlm_backend.llm.hf.attention import implementation_for, register
from genlm_backend.llm.hf.packed import PackedEngine
from genlm_backend.llm.hf.replica import replica
from genlm_backend.llm.hf.self_test import Difference, difference, own_attention
from genlm_backend.llm.service import Context, Engine
from tests import architectures

TINY_NATS = 2e-5  # over tokens with p > 1e-8, float32, small random models
SPREAD = 0.1  # of the random weights: five times the usual, so that a wrong mask moves rows by 0.1 nats and more

CHANGES: dict[str, dict[str, Any]] = {
    "llama4_text": {
        "attention_chunk_size": 8,
        "intermediate_size_mlp": 128,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "moe_layers": [1, 3],
    },
    "olmo3": {"sliding_window": 8},
    "cohere2": {"sliding_window": 8},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "phi": {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [1.0 + i for i in range(8)],
        "original_max_position_embeddings": 32,
        "factor": 8.0,
    },
    "original_max_position_embeddings": 32,
    "max_position_embeddings": 256,
}
DYNAMIC_ROPE = {
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    "max_position_embeddings": 32,
}


def fresh(name: str, **changes: Any) -> Any:
    """A new model; equal arguments give equal weights."""
    spread = {"init_std": SPREAD} if name == "opt" else {"initializer_range": SPREAD}
    return architectures.build(name, **(spread | CHANGES.get(name, {}) | changes))


@functools.cache
def small(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The same model for every test that does not change it."""
    return fresh(name, dtype=dtype)


def packed_engine(model: Any, kv_cache_bytes: int = 10**7, **options: Any) -> PackedEngine:
    """A packed engine on a copy of a model, without the self-test."""
    register()
    return PackedEngine(replica(model, implementation_for(own_attention(model))), kv_cache_bytes, **options)


def plain_logits(model: Any, contexts: Sequence[Context]) -> torch.Tensor:
    """(contexts, logits) from one call of the model per context, each from its first token: the oracle."""
    rows = []
    with torch.inference_mode():
        for context in contexts:
            rows.append(model(input_ids=torch.tensor([context.token_ids]), use_cache=False).logits[0, -1])
    return torch.stack(rows)


def plain_row(model: Any, token_ids: Sequence[int]) -> torch.Tensor:
    """(logits,) float32 log-probabilities by a plain call."""
    return plain_logits(model, [Context(None, tuple(token_ids))])[0].float().log_softmax(-1)


def contexts_of(*token_ids: Sequence[int]) -> list[Context]:
    return [Context(None, tuple(ids)) for ids in token_ids]


def random_ids(rng: random.Random, n: int) -> list[int]:
    return [rng.randrange(3, architectures.VOCAB_SIZE) for _ in range(n)]


def random_batch(rng: random.Random, known: list[list[int]], n: int, longest: int) -> list[Context]:
    """Contexts that extend, branch off, go back to, or repeat known ones; they become known too."""
    batch = []
    for _ in range(n):
        start = rng.choice(known)
        ids = start[: rng.randrange(1, len(start) + 1)] + random_ids(rng, rng.randrange(4))
        batch.append(Context(None, tuple(ids[:longest])))
        known.append(ids[:longest])
    return list(dict.fromkeys(batch))


class Walk:
    """Compares an engine with plain calls of a model, batch after batch, and remembers the worst difference."""

    def __init__(self, engine: Engine, model: Any, seed: int = 0, longest: int = 40) -> None:
        self.engine = engine
        self.model = model
        self.rng = random.Random(seed)
        self.longest = longest
        self.known = [random_ids(self.rng, 25)]
        self.worst = Difference(0.0, 0.0)
        self.n_most = 0
        self.layouts: set[tuple[int, bool]] = set()

    def step(self, n: int) -> None:
        """Ask for up to `n` contexts at once."""
        self.check(random_batch(self.rng, self.known, n, self.longest))

    def check(self, batch: list[Context]) -> None:
        got = self.engine.evaluate(batch)
        apart = difference(got, plain_logits(self.model, batch))
        self.worst = Difference(*map(max, self.worst, apart))
        self.n_most = max(self.n_most, len(batch))


def check_books(engine: Any) -> None:
    """The tree holds exactly the slots that the pool has given out, within the budget."""
    kv = engine.kv
    kv.tree.check_integrity()
    assert kv.pool.n_used == kv.tree.n_tokens
    assert kv.n_bytes <= kv.budget_bytes
