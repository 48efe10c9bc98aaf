"""What keys and values may take: while a batch runs the budget and one plan, afterwards the budget, in the pool too."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from genlm_backend.llm.hf import kv_pool
from genlm_backend.llm.hf.cached import CachedEngine
from genlm_backend.llm.hf.kv_pool import KVCache
from genlm_backend.llm.hf.replica import replica
from tests.llm.hf.walks import TINY_NATS, Walk, check_books, contexts_of, packed_engine, random_ids, small

BUDGET_TOKENS = 20
PLAN_TOKENS = 16
BYTES_PER_TOKEN = {"llama": 4 * 2 * 2 * 16 * 4, "bloom": 4 * 2 * 64 * 4}


def engine_of(name: str, budget_tokens: int = BUDGET_TOKENS) -> Any:
    kv_cache_bytes = budget_tokens * BYTES_PER_TOKEN[name]
    if name == "llama":
        return packed_engine(small(name), kv_cache_bytes, step_tokens=5, plan_tokens=PLAN_TOKENS)
    return CachedEngine(replica(small(name)), kv_cache_bytes, rows=4, plan_tokens=PLAN_TOKENS)


def watch(engine: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets the number of slots in use after each allocation."""
    pool, n_used = engine.kv.pool, []
    allocate = pool.allocate

    def noted(positions: list[int]) -> Any:
        slots = allocate(positions)
        n_used.append(pool.n_used)
        return slots

    monkeypatch.setattr(pool, "allocate", noted)
    return n_used


def capacities(engine: Any) -> set[int]:
    return {tensor.shape[1] for held in engine.kv.pool._layers.values() for tensor in held}


@pytest.mark.thorough
@pytest.mark.parametrize("name", BYTES_PER_TOKEN)
def test_a_large_batch_holds_no_more_than_the_budget_and_one_plan(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_pool, "FIRST_CAPACITY", 8)
    engine = engine_of(name)
    n_used = watch(engine, monkeypatch)
    walk = Walk(engine, small(name))
    trunk = random_ids(walk.rng, 6)
    walk.check(contexts_of(trunk))
    for _ in range(2):
        batch = contexts_of(*(random_ids(walk.rng, 5) for _ in range(40)), *(trunk + [50 + i] for i in range(9)))
        walk.check(batch)
        check_books(engine)
        assert capacities(engine) == {BUDGET_TOKENS}
    assert max(n_used) <= BUDGET_TOKENS + PLAN_TOKENS
    assert walk.worst.nats <= TINY_NATS


@pytest.mark.thorough
@pytest.mark.parametrize("name", BYTES_PER_TOKEN)
def test_a_batch_that_does_not_fit_computes_again_little_more_than_what_does_not(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 contexts of 8 tokens and room for 100: each step needs 16 last tokens, and the 28 that do not fit."""
    monkeypatch.setattr(kv_pool, "FIRST_CAPACITY", 8)
    engine = engine_of(name, 100)
    walk = Walk(engine, small(name))
    batch = contexts_of(*([i, *random_ids(walk.rng, 7)] for i in range(1, 17)))
    computed = []
    for _ in range(5):
        before = engine.counts().tokens_computed
        walk.check(batch)
        computed.append(engine.counts().tokens_computed - before)
    assert computed[0] == 16 * 8
    assert max(computed[1:]) <= 16 + 28, computed


@pytest.mark.thorough
@pytest.mark.parametrize("name", BYTES_PER_TOKEN)
def test_rows_are_plain_where_every_plan_evicts_and_every_batch_shrinks_the_pool(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_pool, "FIRST_CAPACITY", 8)
    engine = engine_of(name)
    walk = Walk(engine, small(name))
    for n in (30, 1, 12, 30, 3):
        walk.step(n)
        check_books(engine)
        assert capacities(engine) <= {8, 16, BUDGET_TOKENS}
    assert engine.counts().evictions > 0
    assert walk.worst.nats <= TINY_NATS


def put(kv: KVCache, ids: list[int]) -> None:
    """Hold a sequence whose keys and values are its token ids, in two layers."""
    kv.tick += 1
    slots = kv.pool.allocate(list(range(len(ids))))
    held = torch.tensor(ids, dtype=torch.float32)[None, :, None]
    with torch.inference_mode():
        for layer in range(2):
            kv.pool.write(layer, slots, torch.from_numpy(slots), held, -held)
    kv.tree.insert(None, ids, 0, slots, kv.tick)


def assert_held(kv: KVCache, ids: list[int]) -> None:
    """Assert that a sequence is held, with its own keys, values and positions."""
    match = kv.tree.match(None, ids, len(ids), kv.tick)
    assert match.length == len(ids)
    slots = np.concatenate(match.parts)
    assert kv.pool.positions(slots).tolist() == list(range(len(ids)))
    for layer in range(2):
        keys, values = kv.pool.read(layer, torch.from_numpy(slots))
        assert keys.flatten().tolist() == ids and (-values).flatten().tolist() == ids


def test_a_pool_above_its_budget_shrinks_and_keeps_the_newest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest tokens lie in the last slots: they are moved before the end is cut off."""
    monkeypatch.setattr(kv_pool, "FIRST_CAPACITY", 2)
    kv = KVCache(6 * 2 * (4 + 4))
    old, new, newer = [1, 2, 3, 4, 5, 6], [7, 8, 9, 10], [11, 12]
    for ids in (old, new, newer):
        put(kv, ids)
    assert kv.pool.capacity == 12
    kv.make_room(0)
    for layer in kv.pool._layers.values():
        assert [tensor.shape for tensor in layer] == [(1, 6, 1)] * 2
    assert kv.tree.n_tokens == kv.pool.n_used == 6
    assert_held(kv, new)
    assert_held(kv, newer)
    kv.pool.free(kv.tree.evict(2, kv.tick + 1))
    put(kv, [20, 21])
    assert_held(kv, [20, 21])
    assert kv.pool.capacity == 6
    kv.tree.check_integrity()


def test_an_emptied_pool_keeps_small_memory_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_pool, "FIRST_CAPACITY", 4)

    def places(kv: KVCache) -> set[int]:
        return {tensor.data_ptr() for layer in kv.pool._layers.values() for tensor in layer}

    first = KVCache(100 * 2 * (4 + 4))
    put(first, [1, 2, 3])
    second = first.emptied()
    assert second.tree.n_tokens == second.pool.n_used == second.n_bytes == 0
    assert second.pool.layers == []
    put(second.emptied(), [1])  # cleared twice
    put(second, [7, 8])
    assert second.pool.layers == [0, 1] and places(second) == places(first)
    assert_held(second, [7, 8])
    put(second, [1, 2, 3, 4, 5])  # more than there is room for
    assert_held(second, [7, 8])
    assert_held(second, [1, 2, 3, 4, 5])
    third = second.emptied()
    assert second.pool.capacity == 8 and third.pool.capacity == 4
    put(third, [9])
    assert_held(third, [9])
    assert not places(third) & places(second), "what has grown is given back"
    monkeypatch.setattr(kv_pool, "MOST_SPARE_BYTES", 10)
    fourth = third.emptied()
    put(fourth, [9])
    assert not places(fourth) & places(third), "so is what is large"
    fourth.pool.release()
    assert fourth.pool.layers == []


def test_a_pool_grown_too_far_before_its_first_forward_shrinks(monkeypatch: pytest.MonkeyPatch) -> None:
    """How many bytes a token takes is known only afterwards; nothing has to be moved."""
    monkeypatch.setattr(kv_pool, "FIRST_CAPACITY", 4)
    kv = KVCache(6 * 2 * (4 + 4))
    put(kv, [1, 2, 3, 4, 5])
    assert kv.pool.capacity == 8
    kv.make_room(0)
    assert {tensor.shape[1] for layer in kv.pool._layers.values() for tensor in layer} == {6}
    put(kv, [6])
    assert_held(kv, [1, 2, 3, 4, 5])
    assert_held(kv, [6])
    assert kv.pool.capacity == 6


def test_a_pool_that_fails_while_it_shrinks_still_holds_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_pool, "FIRST_CAPACITY", 2)
    kv = KVCache(6 * 2 * (4 + 4))
    for ids in ([1, 2, 3, 4, 5, 6], [7, 8, 9, 10]):
        put(kv, ids)
    original, n_calls = kv_pool._resized, [0]

    def resized(tensor: torch.Tensor, capacity: int) -> torch.Tensor:
        n_calls[0] += 1
        if n_calls[0] == 2:
            raise torch.OutOfMemoryError("no memory")
        return original(tensor, capacity)

    monkeypatch.setattr(kv_pool, "_resized", resized)
    with pytest.raises(torch.OutOfMemoryError):
        kv.make_room(0)
    assert_held(kv, [7, 8, 9, 10])
    kv.make_room(0)
    assert {tensor.shape[1] for layer in kv.pool._layers.values() for tensor in layer} == {6}
    assert_held(kv, [7, 8, 9, 10])
    put(kv, [20, 21, 22, 23])
    assert_held(kv, [20, 21, 22, 23])
    assert_held(kv, [7, 8, 9, 10])
