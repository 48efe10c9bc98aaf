"""Attention by lists: what plain forwards compute, each query from its own slots only; taken where it is cheaper."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import pytest
import torch

from genlm_backend import team
from genlm_backend.llm.hf import layout, list_kernel, lists, self_test
from genlm_backend.llm.hf.layout import Layout, Lists, make_layout
from genlm_backend.llm.hf.lists import ListStep
from genlm_backend.llm.hf.plan import View
from genlm_backend.llm.hf.replica import replica
from genlm_backend.llm.hf.self_test import Failed, check_packed, own_attention
from tests import architectures
from tests.llm.hf.walks import CHANGES, TINY_NATS, Walk, contexts_of, packed_engine, random_ids, small

NAMES = [*architectures.PACKABLE, *CHANGES]
SOFT_CAPPED = ["gemma2"]  # where its attention is not sdpa, which passes over it


def pool_of(dtype: torch.dtype, shape: tuple[int, int, int, int], rng: np.random.Generator) -> Any:
    kv_heads, capacity, key_dim, value_dim = shape
    keys = torch.from_numpy(rng.normal(size=(kv_heads, capacity, key_dim))).to(dtype)
    return keys, torch.from_numpy(rng.normal(size=(kv_heads, capacity, value_dim))).to(dtype)


def some_lists(n: int, capacity: int, rng: np.random.Generator) -> Lists:
    seen = [rng.permutation(capacity)[: rng.integers(1, capacity + 1)] for _ in range(n)]
    return Lists(np.cumsum([0, *map(len, seen)]), np.concatenate(seen))


def attended(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: Lists, scaling: Any) -> torch.Tensor:
    n = query.shape[2]
    step = ListStep(None, None, None, seen, np.zeros(n, np.int64))  # type: ignore[arg-type]
    mask = step.mask(lambda *_: True, True, query.dtype)
    return step.attend(query, keys, values, mask, scaling, None, None)


def exactly(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: Lists, scaling: float) -> torch.Tensor:
    """In float64, query by query."""
    repeats = query.shape[1] // len(keys)
    keys, values = keys.double().repeat_interleave(repeats, 0), values.double().repeat_interleave(repeats, 0)
    rows = []
    for i in range(query.shape[2]):
        at = torch.from_numpy(seen.slots[seen.starts[i] : seen.starts[i + 1]])
        scores = (keys[:, at] @ query[0, :, i].double()[:, :, None])[:, :, 0] * scaling
        rows.append((scores.softmax(1)[:, None] @ values[:, at])[:, 0])
    return torch.stack(rows)[None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("n", "heads", "shape"),
    [
        (5, 9, (3, 70, 64, 64)),
        (1, 4, (4, 1, 16, 16)),
        (3, 6, (2, 40, 20, 33)),
        (2, 8, (1, 90, 128, 96)),
        (2, 2, (2, 5, 1, 1)),
    ],
)
def test_attention_is_that_of_float64(n: int, heads: int, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    rng = np.random.default_rng(n)
    keys, values = pool_of(dtype, shape, rng)
    query = torch.from_numpy(rng.normal(size=(1, heads, n, shape[2])) * 3).to(dtype)
    seen = some_lists(n, shape[1], rng)
    for scaling in (None, 0.3):
        got = attended(query, keys, values, seen, scaling)
        want = exactly(query, keys, values, seen, shape[2] ** -0.5 if scaling is None else scaling)
        assert got.dtype == dtype and got.shape == want.shape
        bound = 2e-6 if dtype == torch.float32 else 2e-6 + 2**-8 * want.abs()  # what comes out is rounded once
        assert ((got.double() - want).abs() <= bound).all()


def test_a_query_depends_on_nothing_but_its_own_list() -> None:
    """Bit by bit: alone, among others, and beside slots with NaN."""
    rng = np.random.default_rng(1)
    keys, values = pool_of(torch.bfloat16, (3, 50, 64, 64), rng)
    query = torch.from_numpy(rng.normal(size=(1, 9, 6, 64))).bfloat16()
    seen = some_lists(6, 40, rng)
    together = attended(query, keys, values, seen, None)
    keys[:, 40:], values[:, 40:] = torch.nan, torch.inf
    for i in range(6):
        alone = Lists(
            np.array([0, seen.starts[i + 1] - seen.starts[i]]), seen.slots[seen.starts[i] : seen.starts[i + 1]]
        )
        assert torch.equal(attended(query[:, :, i : i + 1], keys, values, alone, None), together[:, i : i + 1])


@pytest.mark.parametrize("wrong", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_what_is_not_finite_is_not_lost(wrong: float, which: int) -> None:
    """A request with NaN fails by name only if NaN comes out."""
    rng = np.random.default_rng(2)
    held = pool_of(torch.float32, (1, 30, 16, 16), rng)
    held[which][0, 7, 3] = wrong
    query = torch.from_numpy(rng.normal(size=(1, 2, 2, 16))).float()
    seen = Lists(np.array([0, 20, 30]), np.array([*range(20), *range(20, 30)]))
    out = attended(query, *held, seen, None)
    assert not out[0, 0].isfinite().all()
    assert out[0, 1].isfinite().all()


@pytest.mark.thorough
@pytest.mark.parametrize("name", NAMES)
def test_rows_by_lists_are_those_of_plain_forwards(name: str) -> None:
    """On every architecture; windows and chunks are shorter than the contexts."""
    model = small(name)
    engine = packed_engine(model, list_cost=0.0)
    walk = Walk(engine, model)
    n_by_lists = 0
    for n in (1, 6, 1, 9, 2, 6):
        walk.step(n)
        n_by_lists += engine.last_layout[0] == 0
    assert walk.worst.nats <= TINY_NATS
    has_sinks, is_capped = name == "gpt_oss", name in SOFT_CAPPED and own_attention(model) != "sdpa"
    assert n_by_lists == (0 if has_sinks or is_capped else 5)  # the first forward shows what the model asks for


@pytest.mark.thorough
def test_soft_capped_scores_are_left_to_groups() -> None:
    model = architectures.build("gemma2", attention="eager", initializer_range=0.3, attn_logit_softcapping=2.0)
    engine = packed_engine(model, list_cost=0.0)
    walk = Walk(engine, model)
    for _ in range(3):
        walk.step(6)
        assert engine.last_layout[0] > 0
    assert walk.worst.nats <= TINY_NATS


@pytest.mark.thorough
def test_lists_are_read_where_each_query_has_a_tail_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small("llama")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    engine = packed_engine(model)
    walk = Walk(engine, model, longest=80)
    trunk = random_ids(walk.rng, 40)
    walk.check(contexts_of(trunk))
    tails = [trunk + [7 + i] for i in range(12)]
    walk.check(contexts_of(*tails))
    assert engine.last_layout[0] == (0 if team.has_team() else 1)  # they share what they read
    apart = [random_ids(walk.rng, 60) for _ in range(12)]
    walk.check(contexts_of(*apart))
    walk.check(contexts_of(*(tail + [7] for tail in apart)))
    assert engine.last_layout == (0, 12, 12 * 61)
    assert walk.worst.nats <= TINY_NATS


def test_lists_cost_more_where_one_thread_reads_them_and_are_for_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert lists.list_cost(torch.device("cuda")) == lists.list_cost(torch.device("mps")) == np.inf
    for has_team, factor in ((True, 1), (False, 3)):
        monkeypatch.setattr(team, "has_team", lambda has_team=has_team: has_team)
        assert lists.list_cost(torch.device("cpu")) == pytest.approx(factor * lists.LIST_COST)


def test_without_a_compiler_there_are_no_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    assert lists.list_cost(torch.device("cpu")) == np.inf


def test_the_type_that_torch_gives_new_tensors_does_not_matter() -> None:
    rng = np.random.default_rng(3)
    keys, values = pool_of(torch.float32, (1, 9, 8, 8), rng)
    query, seen = torch.from_numpy(rng.normal(size=(1, 2, 3, 8))).float(), some_lists(3, 9, rng)
    usual = attended(query, keys, values, seen, None)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        assert torch.equal(attended(query, keys, values, seen, None), usual)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(("n", "kind"), [(layout.MOST_LISTED, Lists), (layout.MOST_LISTED + 1, Layout)])
def test_prompts_are_no_lists(n: int, kind: type) -> None:
    """A list costs less than a column, until products are wide."""
    view = View(np.arange(n), np.tri(n, dtype=np.bool_))
    assert type(make_layout(view, lists.LIST_COST)) is kind


def test_lists_show_each_query_the_same_slots() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        n_queries, n_columns = int(rng.integers(1, 40)), int(rng.integers(1, 400))
        slots = np.sort(rng.choice(n_columns * 2, n_columns, replace=False))
        visible = rng.random((n_queries, n_columns)) < rng.random()
        made = make_layout(View(slots, visible), list_cost=0.0)
        assert isinstance(made, Lists)
        for i in range(n_queries):
            assert made.slots[made.starts[i] : made.starts[i + 1]].tolist() == slots[visible[i]].tolist()
        assert made.query_of_slot().tolist() == np.repeat(np.arange(n_queries), visible.sum(1)).tolist()
        is_kept = rng.random(len(made.slots)) < 0.5
        kept = made.only(is_kept)
        assert kept.slots.tolist() == made.slots[is_kept].tolist()
        assert kept.query_of_slot().tolist() == made.query_of_slot()[is_kept].tolist()
        assert isinstance(make_layout(View(slots, visible)), Layout)


def test_the_choice_is_by_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    visible = np.ones((4, 100), np.bool_)
    cheapest = 4 * 100.0 + layout.GROUP_COST  # a slice of the pool
    for cost, kind in ((cheapest / 400 - 0.01, Lists), (cheapest / 400 + 0.01, Layout)):
        assert type(layout.make_layout(View(np.arange(100), visible), cost)) is kind


# ---- mutants of what lists do: the self-test at load must see each


def numbers(address: int, n: int, kind: Any = ctypes.c_int64) -> npt.NDArray[Any]:
    return np.ctypeslib.as_array((kind * n).from_address(address))


def forget_the_last_slot(original: Callable[..., None]) -> Callable[..., None]:
    def attend(arguments: Sequence[int], n_threads: int) -> None:
        queries, keys, values, at_starts, at_slots, *others = arguments
        starts = numbers(at_starts, others[2] + 1)
        slots = numbers(at_slots, starts[-1])
        fewer = np.concatenate([slots[a : max(a + 1, b - 1)] for a, b in pairwise(starts)])
        its_starts = np.concatenate(([0], np.cumsum(np.maximum(np.diff(starts) - 1, 1))))
        original((queries, keys, values, its_starts.ctypes.data, fewer.ctypes.data, *others), n_threads)

    return attend


def use_another_head(original: Callable[..., None]) -> Callable[..., None]:
    def attend(arguments: Sequence[int], n_threads: int) -> None:
        queries, at_keys, *others = arguments
        n_kv_heads, capacity, key_dim = others[7:10]
        keys = numbers(at_keys, n_kv_heads * capacity * key_dim, ctypes.c_float).reshape(n_kv_heads, -1)
        rolled = np.roll(keys, 1, 0)
        original((queries, rolled.ctypes.data, *others), n_threads)

    return attend


def forget_the_scaling(original: Callable[..., None]) -> Callable[..., None]:
    def attend(arguments: Sequence[int], n_threads: int) -> None:
        original((*arguments[:-1], int(np.float32(1.0).view(np.uint32))), n_threads)

    return attend


@pytest.mark.thorough
@pytest.mark.parametrize("mutant", [forget_the_last_slot, use_another_head, forget_the_scaling])
def test_the_self_test_sees_wrong_lists(mutant: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = architectures.build("mistral", sliding_window=64, initializer_range=0.1)
    check_packed(packed_engine(model), replica(model), None)
    monkeypatch.setattr(list_kernel, "attend", mutant(list_kernel.attend))
    with pytest.raises(Failed, match="log-probabilities differ from plain forwards"):
        check_packed(packed_engine(model), replica(model), None)


@pytest.mark.thorough
def test_a_window_that_lists_pass_over_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = architectures.build("mistral", sliding_window=64)
    original = ListStep.mask
    monkeypatch.setattr(ListStep, "mask", lambda step, rule, is_causal, dtype: original(step, rule, True, dtype))
    with pytest.raises(Failed, match="log-probabilities differ from plain forwards"):
        check_packed(packed_engine(model), replica(model), None)


@pytest.mark.thorough
def test_a_twin_is_tried_with_lists_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = []
    original = self_test.PackedEngine

    def engine(*arguments: Any, **options: Any) -> Any:
        costs.append(options["list_cost"])
        return original(*arguments, **options)

    monkeypatch.setattr(self_test, "PackedEngine", engine)
    model = small("llama")
    check_packed(packed_engine(model), replica(model), None)
    assert costs == [np.inf, 0.0]
