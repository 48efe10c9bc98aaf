"""What packed attention cannot serve is found at load and served correctly another way; mutants are caught."""

from __future__ import annotations

import asyncio
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb, eager_attention_forward

from genlm_backend.errors import SlowPathWarning
from genlm_backend.llm import AsyncTransformer
from genlm_backend.llm.hf import attention, packed, self_test
from genlm_backend.llm.hf.kv_pool import KVPool
from genlm_backend.llm.hf.plan import Plan, View, make_view
from genlm_backend.llm.hf.replica import replica, static_rope_length
from genlm_backend.llm.hf.self_test import Failed, check_packed, difference
from tests import architectures
from tests.llm.hf.walks import (
    DYNAMIC_ROPE,
    LONGROPE,
    TINY_NATS,
    fresh,
    packed_engine,
    plain_row,
    random_batch,
    random_ids,
    small,
)

pytestmark = pytest.mark.thorough


def check(model: Any) -> None:
    check_packed(packed_engine(model), replica(model), static_rope_length(model))


async def worst_of_a_walk(
    llm: AsyncTransformer, plain: Callable[[tuple[int, ...]], torch.Tensor], longest: int
) -> float:
    rng = random.Random(0)
    known = [random_ids(rng, longest - 5)]
    worst = 0.0
    for n in (1, 7, 3, 7):
        batch = [context.token_ids for context in random_batch(rng, known, n, longest)]
        rows = await asyncio.gather(*(llm.next_token_logprobs(ids) for ids in batch))
        for ids, row in zip(batch, rows, strict=True):
            worst = max(worst, difference(row[None], plain(ids)[None]).nats)
    return worst


# ---- traps


@pytest.mark.parametrize("name", architectures.PACKABLE)
def test_what_packed_attention_serves_passes_the_self_test(name: str) -> None:
    check(small(name))


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text", "qwen3_moe", "gpt_oss"])
def test_bfloat16_models_pass_the_self_test(name: str) -> None:
    check(small(name, torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
async def test_bloom_is_served_on_its_own_cache(dtype: torch.dtype, wrap: Callable[..., AsyncTransformer]) -> None:
    """ALiBi counts slots. In bfloat16 packed rows would be off by less than rounding: numbers alone do not show it."""
    model = small("bloom", dtype)
    with pytest.warns(SlowPathWarning, match="'cached'.*0 of 4 layers go through the attention interface"):
        llm = wrap(model)
    assert llm.path == "cached"
    worst = await worst_of_a_walk(llm, lambda ids: plain_row(model, ids), 40)
    assert worst <= (TINY_NATS if dtype == torch.float32 else 0.15)


async def test_mamba_is_served_without_a_cache(wrap: Callable[..., AsyncTransformer]) -> None:
    with pytest.warns(SlowPathWarning, match="'uncached'.*packed:.*cached: the model does not use the cache"):
        llm = wrap(small("mamba"))
    assert llm.path == "uncached"
    assert await worst_of_a_walk(llm, lambda ids: plain_row(small("mamba"), ids), 20) <= TINY_NATS
    assert llm.statistics()[4:] == (llm.statistics().row_hits, 0, 0, 0)


async def test_chunked_attention_is_right_beyond_the_chunk(wrap: Callable[..., AsyncTransformer]) -> None:
    """llama4_text with chunks of 8 and contexts of five chunks."""
    llm = wrap(small("llama4_text"))
    assert llm.path == "packed"
    assert await worst_of_a_walk(llm, lambda ids: plain_row(small("llama4_text"), ids), 40) <= TINY_NATS


async def test_chunks_and_windows_longer_than_the_probe_are_right(wrap: Callable[..., AsyncTransformer]) -> None:
    """The probe has 40 tokens; only the twin, whose windows are cut down, can show that they are kept."""
    for name, changes in (("llama4_text", {"attention_chunk_size": 64}), ("mistral", {"sliding_window": 64})):
        model = fresh(name, **changes)
        llm = wrap(model)
        assert llm.path == "packed"
        assert await worst_of_a_walk(llm, lambda ids, model=model: plain_row(model, ids), 150) <= TINY_NATS


@pytest.mark.parametrize(("name", "changes", "longest"), [("phi3", LONGROPE, 80), ("llama", DYNAMIC_ROPE, 100)])
async def test_rope_that_depends_on_the_longest_position_is_right_with_mixed_lengths(
    name: str, changes: dict[str, Any], longest: int, wrap: Callable[..., AsyncTransformer]
) -> None:
    """Short and long contexts in one batch, beyond the original length of 32; each row as from a fresh model, alone."""
    llm = wrap(fresh(name, **changes))
    assert llm.path == "packed"
    rng = random.Random(0)
    for lengths in ((20, 40), (longest, 5, 33, 32, 31), (10, longest - 1, 12)):
        batch = [random_ids(rng, n) for n in lengths]
        rows = await asyncio.gather(*(llm.next_token_logprobs(ids) for ids in batch))
        assert llm.statistics().requests == llm.statistics().row_hits + len(batch) or llm.statistics().batches
        for ids, row in zip(batch, rows, strict=True):
            assert difference(row[None], plain_row(fresh(name, **changes), ids)[None]).nats <= TINY_NATS
        oracle = await llm.next_token_logprobs_uncached(batch[0])
        assert difference(oracle[None], plain_row(fresh(name, **changes), batch[0])[None]).nats <= TINY_NATS
    assert llm.statistics().batches == 3
    llm.clear_cache()
    assert llm.statistics().kv_tokens == 0


def test_positions_mixed_in_one_packed_forward_would_be_wrong() -> None:
    """What the routing by length is for: the same contexts in one packed forward fail."""
    for name, changes in (("phi3", LONGROPE), ("llama", DYNAMIC_ROPE)):
        model = fresh(name, **changes)
        with pytest.raises(Failed, match="log-probabilities differ"):
            check_packed(packed_engine(model), replica(model), limit=None)


# ---- models of one's own


class OwnAttention(LlamaAttention):
    """Computes attention itself, past the attention interface."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Any,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        n_rows, n = hidden_states.shape[:2]
        query, key, value = (
            layer(hidden_states).view(n_rows, n, -1, self.head_dim).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        n_all = key.shape[2]
        rows, columns = torch.arange(n_all - n, n_all)[:, None], torch.arange(n_all)[None]
        mask = torch.zeros(n, n_all).masked_fill(columns > rows, -torch.inf)[None, None]
        out, _ = eager_attention_forward(self, query, key, value, mask, self.scaling)
        return self.o_proj(out.reshape(n_rows, n, -1)), None


class BiasedAttention(LlamaAttention):
    """Adds what depends on a token's place in the row that a forward is given, not on its position."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        place = torch.arange(hidden_states.shape[1], dtype=hidden_states.dtype)
        return super().forward(hidden_states + 0.05 * place[:, None], *args, **kwargs)


def llama_with(kind: type[LlamaAttention], dtype: torch.dtype = torch.float32) -> Any:
    class Changed(LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model.layers[1].self_attn = kind(config, 1)
            self.post_init()

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Changed._from_config(small("llama").config, attn_implementation="sdpa").eval().to(dtype)


async def test_a_layer_that_bypasses_the_attention_interface_is_found(wrap: Callable[..., AsyncTransformer]) -> None:
    model = llama_with(OwnAttention)
    with pytest.warns(SlowPathWarning, match="'cached'.*3 of 4 layers go through the attention interface"):
        llm = wrap(model)
    assert await worst_of_a_walk(llm, lambda ids: plain_row(model, ids), 30) <= TINY_NATS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
async def test_an_attention_with_a_bias_by_place_is_found(
    dtype: torch.dtype, wrap: Callable[..., AsyncTransformer]
) -> None:
    """Nothing in its structure shows; the numbers do, in bfloat16 those of the float32 twin."""
    model = llama_with(BiasedAttention, dtype)
    with pytest.warns(SlowPathWarning, match="packed: log-probabilities differ from plain forwards"):
        llm = wrap(model)
    if dtype == torch.float32:
        assert llm.path == "uncached"
        assert await worst_of_a_walk(llm, lambda ids: plain_row(model, ids), 30) <= TINY_NATS


def test_the_warning_names_the_reason_once_where_the_model_was_wrapped(wrap: Callable[..., AsyncTransformer]) -> None:
    model = fresh("bloom")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        wrap(model)
        wrap(model)
    assert [warning.category for warning in caught] == [SlowPathWarning]
    assert "BloomForCausalLM is served on the 'cached' path" in str(caught[0].message)
    assert "0 of 4 layers go through the attention interface" in str(caught[0].message)


def test_the_packed_path_warns_of_nothing(wrap: Callable[..., AsyncTransformer]) -> None:
    assert wrap(fresh("llama")).path == "packed"  # warnings are errors


# ---- twins


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("qwen3_moe", {"num_experts": 16, "num_experts_per_tok": 8, "moe_intermediate_size": 64}),
        ("cwm", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}),
        ("gemma3_text", {"num_hidden_layers": 6, "sliding_window": 64}),
        ("llama", {"vocab_size": 50}),
    ],
)
def test_a_twin_can_be_made(name: str, changes: dict[str, Any]) -> None:
    """More experts per token than a small twin would have; token ids that must be numbers; layers that differ."""
    model = fresh(name, dtype=torch.bfloat16, **changes)
    twin = self_test.make_twin(model)
    assert twin is not None
    assert {tensor.dtype for tensor in twin.parameters()} == {torch.float32}
    kinds = getattr(model.config, "layer_types", None)
    assert kinds is None or set(twin.config.layer_types) == set(kinds)
    check(model)


def test_twins_leave_the_models_configuration_alone() -> None:
    model = fresh("gemma3_text", sliding_window=64)
    before = model.config.to_dict()
    assert self_test.make_twin(model) is not None
    assert model.config.to_dict() == before


def test_a_half_precision_model_without_a_twin_is_not_packed(
    monkeypatch: pytest.MonkeyPatch, wrap: Callable[..., AsyncTransformer]
) -> None:
    monkeypatch.setattr(self_test, "make_twin", lambda model: None)
    with pytest.warns(SlowPathWarning, match="no small float32 twin"):
        assert wrap(fresh("llama", dtype=torch.bfloat16)).path == "cached"


# ---- mutants: each must fail


def drop_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    original = attention.TreeStep.mask
    monkeypatch.setattr(
        attention.TreeStep, "mask", lambda step, rule, is_plain, dtype: original(step, rule, True, dtype)
    )


def shift_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    original = attention.TreeStep.mask

    def mask(step: Any, rule: Any, is_plain: bool, dtype: torch.dtype) -> torch.Tensor:
        return original(step, lambda b, h, q, k: rule(b, h, q, (k - 1).clamp(min=0)), is_plain, dtype)

    monkeypatch.setattr(attention.TreeStep, "mask", mask)


def changed_view(monkeypatch: pytest.MonkeyPatch, change: Callable[[np.ndarray, Plan, int], None]) -> None:
    def mutant(plan: Plan, slots: Any, start: int, end: int) -> View:
        view = make_view(plan, slots, start, end)
        change(view.visible, plan, start)
        return view

    monkeypatch.setattr(packed, "make_view", mutant)


def see_a_sibling(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token sees what the new token before it sees, where both continue the same known prefix or token."""

    def change(visible: np.ndarray, plan: Plan, start: int) -> None:
        for row in range(1, len(visible)):
            if plan.positions[start + row] == plan.positions[start + row - 1]:
                visible[row] |= visible[row - 1]

    changed_view(monkeypatch, change)


def forget_an_ancestor(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(visible: np.ndarray, plan: Plan, start: int) -> None:
        if 3 < len(visible) < 15:  # not where a prompt is read
            visible[-1, np.flatnonzero(visible[-1])[-3]] = False

    changed_view(monkeypatch, change)


def miss_oneself(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(visible: np.ndarray, plan: Plan, start: int) -> None:
        if len(visible) > 1:
            visible[-1, -1] = False

    changed_view(monkeypatch, change)


def write_to_the_wrong_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    original = KVPool.write

    def write(pool: KVPool, layer: int, slots: Any, index: Any, key: torch.Tensor, value: torch.Tensor) -> Any:
        return original(pool, layer, slots, index, key, value.roll(1, 1) if layer == 1 and len(slots) > 3 else value)

    monkeypatch.setattr(KVPool, "write", write)


def swap_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    original = packed.PackedEngine._compute

    def compute(self: Any, kv: Any, plan: Any, contexts: Any, order: Any) -> torch.Tensor:
        return original(self, kv, plan, contexts, np.arange(len(order)))

    monkeypatch.setattr(packed.PackedEngine, "_compute", compute)


def count_positions_from_one(monkeypatch: pytest.MonkeyPatch) -> None:
    original = packed.make_plan

    def plan(*args: Any) -> Plan:
        made = original(*args)
        return made._replace(
            positions=[p + 1 if made.parents[i] < 0 and p else p for i, p in enumerate(made.positions)]
        )

    monkeypatch.setattr(packed, "make_plan", plan)


MUTANTS = [
    drop_the_window,
    shift_the_window,
    see_a_sibling,
    forget_an_ancestor,
    miss_oneself,
    write_to_the_wrong_slot,
    swap_rows,
    count_positions_from_one,
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_self_test_catches(
    mutant: Callable[..., None], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With windows longer than the probe, and weights as small as transformers makes them."""
    model = architectures.build("mistral", dtype=dtype, sliding_window=64)
    check(model)
    mutant(monkeypatch)
    with pytest.raises(Failed, match="log-probabilities differ from plain forwards"):
        check(model)


async def test_a_model_whose_packed_rows_are_wrong_is_served_correctly(
    monkeypatch: pytest.MonkeyPatch, wrap: Callable[..., AsyncTransformer]
) -> None:
    drop_the_window(monkeypatch)
    model = fresh("mistral")
    with pytest.warns(SlowPathWarning, match="'cached'.*packed: log-probabilities differ"):
        llm = wrap(model)
    assert await worst_of_a_walk(llm, lambda ids: plain_row(model, ids), 40) <= TINY_NATS
