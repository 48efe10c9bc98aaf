"""The packed engine computes what plain forwards compute, each new token once, whatever the order of the questions."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from genlm_backend.llm.hf import attention, layout, packed, self_test
from genlm_backend.llm.hf.layout import Layout
from genlm_backend.llm.hf.plan import View
from genlm_backend.llm.hf.uncached import UncachedEngine
from genlm_backend.llm.service import Context
from tests import architectures
from tests.llm.hf.walks import CHANGES, TINY_NATS, Walk, check_books, contexts_of, packed_engine, random_ids, small

pytestmark = pytest.mark.thorough

NAMES = [*architectures.PACKABLE, *CHANGES]
BYTES_PER_TOKEN = 4 * 2 * 2 * 16 * 4  # layers, key and value, heads, width, float32: of the small llama


@pytest.mark.parametrize("name", NAMES)
def test_packed_equals_plain_with_evictions_segments_and_split_plans(name: str) -> None:
    """Contexts up to five times the window of those that have one; a budget smaller than one context."""
    model = small(name)
    engine = packed_engine(model, step_tokens=3, plan_tokens=8)
    engine.evaluate(contexts_of([5]))
    engine = packed_engine(model, kv_cache_bytes=30 * engine.kv.pool.bytes_per_slot, step_tokens=3, plan_tokens=8)
    walk = Walk(engine, model)
    n_batches = 0
    for n in (1, 6, 1, 9, 2, 6):
        walk.step(n)
        check_books(engine)
        n_batches += 1
    counts = engine.counts()
    assert walk.worst.nats <= TINY_NATS
    assert walk.n_most > 1
    assert counts.evictions > 0
    assert counts.forwards > 2 * n_batches
    assert counts.kv_tokens <= 30


@pytest.mark.parametrize(("name", "shares_keys"), [("llama", True), ("mistral", True), ("gpt2", False)])
def test_heads_that_share_keys_are_folded_for_few_queries_only(
    name: str, shares_keys: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are the plain ones on both sides of the limit; who folds where, is told by the masks that are made."""
    model = small(name)
    folded: list[int] = []
    plain_folded = attention.TreeStep.folded

    def noted(step: attention.TreeStep, mask: torch.Tensor, n_repeats: int) -> torch.Tensor:
        folded.append(n_repeats)
        return plain_folded(step, mask, n_repeats)

    monkeypatch.setattr(attention.TreeStep, "folded", noted)
    for n, is_few in ((attention.FOLDED_QUERIES, True), (attention.FOLDED_QUERIES + 1, False)):
        folded.clear()
        engine = packed_engine(model)
        ids = random_ids(random.Random(n), n)
        apart = self_test.difference(
            engine.evaluate(contexts_of(ids)), UncachedEngine(model).evaluate(contexts_of(ids))
        )
        assert apart.nats <= TINY_NATS
        assert bool(folded) == (is_few and shares_keys)
        assert all(n_repeats > 1 for n_repeats in folded)


def test_masks_are_folded_for_each_number_of_repeats() -> None:
    step = attention.TreeStep.__new__(attention.TreeStep)
    step._folded = {}
    mask = torch.zeros(2, 1, 3, 5)
    assert [step.folded(mask, n).shape[2] for n in (2, 4, 2)] == [6, 12, 6]


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss", "gpt2"])
def test_packed_equals_plain_in_every_layout(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slice of the pool, gathered columns, and groups of queries; each is made to happen."""
    made: set[tuple[int, bool]] = set()

    def make_layout(view: View, list_cost: float) -> Layout:
        made_here = layout.make_layout(view)  # no lists: test_lists.py
        assert isinstance(made_here, Layout)
        made.add((min(2, len(made_here.visible)), made_here.columns is None))
        return made_here

    monkeypatch.setattr(packed, "make_layout", make_layout)
    monkeypatch.setattr(layout, "GROUP_COST", 10.0)
    model = small(name)
    engine = packed_engine(model)
    walk = Walk(engine, model, longest=60)
    trunk = random_ids(walk.rng, 30)
    walk.check(contexts_of(trunk))
    tails = [trunk + random_ids(walk.rng, 12) for _ in range(13)]
    walk.check(contexts_of(*tails))
    walk.check(contexts_of(*(tail + [7] for tail in tails)))
    assert engine.last_layout[0] > 1
    walk.check(contexts_of(tails[0] + [8], tails[-1] + [8], trunk[:3]))
    walk.step(9)
    assert made == {(2, False), (1, False), (1, True)}
    assert walk.worst.nats <= TINY_NATS


def test_layouts_show_each_query_the_same_columns() -> None:
    """Whatever is cheapest, a query sees exactly the slots of its view; padding sees something."""
    rng = np.random.default_rng(0)
    kinds = set()
    for _ in range(200):
        n_queries, n_columns = int(rng.integers(1, 40)), int(rng.integers(1, 400))
        gap = int(rng.integers(1, 4))
        slots = np.sort(rng.choice(n_columns * gap, n_columns, replace=False))
        visible = np.zeros((n_queries, n_columns), np.bool_)
        for row in range(n_queries):
            at = int(rng.integers(0, n_columns))
            visible[row, at : at + int(rng.integers(1, 30))] = True
        view = View(slots, visible)
        made = layout.make_layout(view)
        assert isinstance(made, Layout)
        n_groups, size, width = made.visible.shape
        kinds.add((n_groups > 1, made.columns is None))
        seen = made.visible.reshape(n_groups * size, width)
        for row in range(n_queries):
            columns = np.arange(made.first, made.first + width) if made.columns is None else made.columns[row // size]
            assert sorted(columns[seen[row]].tolist()) == slots[visible[row]].tolist()
        assert seen.any(1).all()
    assert kinds == {(False, True), (False, False), (True, False)}


@pytest.mark.parametrize("name", ["gemma2", "vaultgemma"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_soft_capping_is_what_the_models_own_attention_makes_of_it(name: str, attention: str) -> None:
    """Up to 5.19 transformers' sdpa passes over it in silence; 5.23 gives eager attention to whoever asks for sdpa."""
    model = architectures.build(name, attention=attention, initializer_range=0.3, attn_logit_softcapping=2.0)
    assert model.config._attn_implementation in {attention, "eager"}
    walk = Walk(packed_engine(model), model)
    for _ in range(3):
        walk.step(5)
    assert walk.worst.nats <= 5 * TINY_NATS  # these weights are large: capping or not is a difference of whole nats


def test_particles_that_share_a_prompt_prefill_it_once_even_at_the_same_moment() -> None:
    engine = packed_engine(small("llama"))
    prompt = random_ids(random.Random(1), 20)
    engine.evaluate(contexts_of(*(prompt + [50 + i] for i in range(10))))
    assert engine.counts()[:3] == (1, 30, 30)


def test_prefixes_nested_in_one_another_cost_one_forward() -> None:
    engine = packed_engine(small("llama"))
    ids = random_ids(random.Random(1), 12)
    engine.evaluate(contexts_of(*(ids[:n] for n in (12, 1, 5, 3, 11))))
    assert engine.counts()[:3] == (1, 12, 12)


def test_a_split_plan_computes_shared_tokens_once_too() -> None:
    engine = packed_engine(small("llama"), step_tokens=3, plan_tokens=5)
    prompt = random_ids(random.Random(1), 20)
    batch = contexts_of(*(prompt + [50 + i] for i in range(10)), prompt[:4], prompt)
    walk = Walk(engine, small("llama"))
    walk.check(batch)
    # The last token of each context is computed for its row: twice where an earlier plan of the batch had it already.
    assert 30 <= engine.counts().tokens_computed <= 32
    assert engine.counts().kv_tokens == 30
    assert walk.worst.nats <= TINY_NATS


def test_tokens_computed_is_one_per_distinct_new_prefix_on_random_walks() -> None:
    """Contexts are asked once, so every prefix they have is computed once, and asked rows are not computed again."""
    engine = packed_engine(small("llama"))
    rng = random.Random(3)
    held: set[tuple[int, ...]] = set()
    known = [random_ids(rng, 20)]
    for _ in range(15):
        batch = []
        for _ in range(rng.choice([1, 4, 12])):
            start = rng.choice(known)
            known.append(start[: rng.randrange(1, len(start) + 1)] + random_ids(rng, rng.randrange(1, 4)))
            batch.append(Context(None, tuple(known[-1])))
        batch = list(dict.fromkeys(batch))
        prefixes = {context.token_ids[:n] for context in batch for n in range(1, len(context.token_ids) + 1)}
        again = {context.token_ids for context in batch} & held
        before = engine.counts().tokens_computed
        engine.evaluate(batch)
        assert engine.counts().tokens_computed - before == len(prefixes - held) + len(again)
        held |= prefixes
    assert engine.counts().kv_tokens == len(held)


def test_the_pool_grows_and_keeps_what_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genlm_backend.llm.hf.kv_pool.FIRST_CAPACITY", 4)
    model = small("llama")
    engine = packed_engine(model)
    walk = Walk(engine, model)
    for _ in range(6):
        walk.step(4)
        check_books(engine)
    assert engine.kv.pool._capacity > 16
    assert walk.worst.nats <= TINY_NATS


def test_the_pool_takes_no_more_memory_than_the_budget_and_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genlm_backend.llm.hf.kv_pool.FIRST_CAPACITY", 4)
    engine = packed_engine(small("llama"), kv_cache_bytes=70 * BYTES_PER_TOKEN)
    rng = random.Random(0)
    for _ in range(12):
        engine.evaluate(contexts_of(random_ids(rng, 30)))
        check_books(engine)
    assert engine.kv.pool.bytes_per_slot == BYTES_PER_TOKEN
    assert engine.counts().evictions > 0
    assert all(tensor.shape[1] <= 70 + 30 for held in engine.kv.pool._layers.values() for tensor in held)


def test_bounds_hold_between_batches_for_any_budget() -> None:
    for n_tokens in (0, 1, 5, 17):
        engine = packed_engine(small("llama"), kv_cache_bytes=n_tokens * BYTES_PER_TOKEN)
        walk = Walk(engine, small("llama"), seed=n_tokens)
        for n in (1, 8, 3):
            walk.step(n)
            check_books(engine)
        assert walk.worst.nats <= TINY_NATS
        assert engine.counts().evictions > 0


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_a_context_of_2000_tokens_needs_no_recursion(name: str, wrap: Any) -> None:
    """Walks over the tree that recurse fail at about 1,000 tokens."""
    changes = {"max_position_embeddings": 4096} if name == "llama" else {}
    model = architectures.build(name, initializer_range=0.05, **changes)
    ids = random_ids(random.Random(0), 2000)
    if name == "bloom":
        with pytest.warns(UserWarning, match="cached"):
            llm = wrap(model)
    else:
        llm = wrap(model)
    row = llm.next_token_logprobs_sync(ids)
    for n in (1999, 1500, 3):
        llm.next_token_logprobs_sync(ids[:n])
    assert (row - llm.next_token_logprobs_sync(ids)).abs().max() == 0
    want = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1].detach(), -1)
    assert (row - want).abs().max() <= TINY_NATS
    llm.clear_kv_cache()
    llm.clear_cache()
    assert llm.statistics().kv_tokens == 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", NAMES)
def test_packed_equals_plain_on_long_walks(name: str, seed: int) -> None:
    model = small(name)
    engine = packed_engine(model, kv_cache_bytes=200 * BYTES_PER_TOKEN, step_tokens=20, plan_tokens=50)
    walk = Walk(engine, model, seed=seed, longest=90)
    for _ in range(40):
        walk.step(walk.rng.choice([1, 5, 20]))
        check_books(engine)
    assert engine.counts().evictions > 0
    assert walk.worst.nats <= TINY_NATS
