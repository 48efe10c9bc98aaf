"""AsyncTokenCharacterTrie: what waits together is computed together, and nobody suffers for another."""

from __future__ import annotations

import asyncio
import gc
import math
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from genlm_backend.errors import ModelClosed, NoSuchNode, UnknownBackend, WeightsMismatch
from genlm_backend.tokenization import Token
from genlm_backend.trie import AsyncTokenCharacterTrie, ParallelTokenCharacterTrie, TokenCharacterTrie
from genlm_backend.trie.sums import DeviceSums, NodeSums
from tests.trie.oracle import FOUR_WORDS

WEIGHTS = [0.5, -1.0, -math.inf, 2.0]


class Gated:
    """Node sums that wait for a gate, note what they compute together, and fail for a row that starts with 13."""

    def __init__(self, inner: NodeSums) -> None:
        self.inner = inner
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.batches: list[tuple[str, int]] = []
        self.device = inner.device

    def rows(self, weights: Any, n_dimensions: int, copy: bool = False) -> Any:
        return self.inner.rows(weights, n_dimensions, copy)

    def reduce(self, rows: Any, reduction: Any) -> Any:
        return self.inner.reduce(rows, reduction)

    def reduce_segments(self, rows: Any, segments: Any, reduction: Any) -> Any:
        return self.inner.reduce_segments(rows, segments, reduction)

    def reduce_apart(self, blocks: Sequence[Any], reduction: Any) -> list[Any]:
        self.pass_gate(reduction, blocks)
        return self.inner.reduce_apart(blocks, reduction)

    def reduce_segments_apart(self, blocks: Sequence[Any], segments: Any, reduction: Any) -> list[Any]:
        self.pass_gate(f"some {reduction}", blocks)
        return self.inner.reduce_segments_apart(blocks, segments, reduction)

    def pass_gate(self, name: str, blocks: Sequence[Any]) -> None:
        self.entered.set()
        assert self.gate.wait(10)
        self.batches.append((name, len(blocks)))
        if any(rows[0, 0] == 13 for rows in blocks):
            raise ZeroDivisionError("thirteen")


@pytest.fixture(params=["sequential", "parallel", "tensors"])
async def trie(request: pytest.FixtureRequest) -> AsyncIterator[AsyncTokenCharacterTrie]:
    """Each implementation behind the batcher, over the four words."""
    inner: TokenCharacterTrie = ParallelTokenCharacterTrie(FOUR_WORDS, "cpu")
    if request.param == "sequential":
        inner = TokenCharacterTrie(FOUR_WORDS)
    if request.param == "tensors":
        inner._sums = DeviceSums(inner.layout, torch.device("cpu"))
    async with AsyncTokenCharacterTrie(inner) as shared:
        yield shared


@pytest.fixture
async def gated() -> AsyncIterator[tuple[AsyncTokenCharacterTrie, Gated]]:
    inner = TokenCharacterTrie(FOUR_WORDS)
    inner._sums = gate = Gated(inner._sums)  # type: ignore[assignment]
    async with AsyncTokenCharacterTrie(inner) as shared:
        yield shared, gate
        gate.gate.set()


NAMES = ("weight_sum", "weight_max", "weight_logsumexp", "mass_sum")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.thorough
async def test_awaited_methods_give_what_the_trie_gives(trie: AsyncTokenCharacterTrie, name: str) -> None:
    for weights in (WEIGHTS, np.array(WEIGHTS), torch.tensor(WEIGHTS), torch.tensor(WEIGHTS, dtype=torch.bfloat16)):
        expected = getattr(trie.trie, name)(weights)
        found = await getattr(trie, name)(weights)
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == expected.dtype
        rows = await getattr(trie, f"batch_{name}")([weights, weights])
        np.testing.assert_array_equal(rows, [expected, expected])


async def test_what_waits_together_is_computed_together(gated: tuple[AsyncTokenCharacterTrie, Gated]) -> None:
    trie, gate = gated
    asked = [*(trie.weight_sum([i, 0, 0, 0]) for i in range(10)), *(trie.weight_max([i, 0, 0, 0]) for i in range(5))]
    found = await asyncio.gather(*asked)
    assert [row[trie.trie.root] for row in found] == [*range(10), *range(5)]
    assert sorted(gate.batches) == [("max", 5), ("sum", 10)]
    assert trie.statistics() == (15, 1)


@pytest.mark.parametrize("reduction", ["sum", "max", "logsumexp"])
async def test_awaited_queries_of_a_few_nodes_give_what_the_trie_gives(
    trie: AsyncTokenCharacterTrie, reduction: Any
) -> None:
    prefixes = [b"", b"do", b"cats", b"cow", b"do"]
    asked, expected = [], []
    for weights in (WEIGHTS, np.array(WEIGHTS), torch.tensor(WEIGHTS), [WEIGHTS, WEIGHTS[::-1]], np.empty((0, 4))):
        for node in (trie.trie.root, trie.trie.find(b"cat"), 0):
            asked.append(trie.children_weights(weights, node, reduction))
            expected.append(trie.trie.children_weights(weights, node, reduction))
        for some in (prefixes, prefixes[1:2], []):
            asked.append(trie.prefix_weights(weights, some, reduction))
            expected.append(trie.trie.prefix_weights(weights, some, reduction))
    for found, right in zip(await asyncio.gather(*asked), expected, strict=True):
        np.testing.assert_array_equal(found, right)
        assert (found.dtype, found.shape) == (right.dtype, right.shape)
    assert trie.statistics() == (30, 1)
    assert (await trie.prefix_weights(WEIGHTS, [b"d"]))[0] == -math.inf
    assert (await trie.prefix_weights([1, 2, 3, 4], prefixes)).tolist() == [10, 7, 2, 0, 7]


async def test_queries_of_a_few_nodes_wait_together_with_those_of_all(
    gated: tuple[AsyncTokenCharacterTrie, Gated],
) -> None:
    trie, gate = gated
    asked = [
        *(trie.prefix_weights([i, 1, 2, 3], [b"cat", b"d"]) for i in range(6)),
        *(trie.children_weights([i, 1, 2, 3], trie.trie.root) for i in range(4)),
        *(trie.prefix_weights([i, 1, 2, 3], [b"cat"], "max") for i in range(3)),
        *(trie.weight_sum([i, 1, 2, 3]) for i in range(2)),
    ]
    found = await asyncio.gather(*asked)
    assert [row.tolist() for row in found[:10]] == [[i + 1, 5] for i in (*range(6), *range(4))]
    assert [row.tolist() for row in found[10:13]] == [[1], [1], [2]]
    assert [row[trie.trie.root] for row in found[13:]] == [6, 7]
    assert sorted(gate.batches) == [("some max", 3), ("some sum", 10), ("sum", 2)]
    assert trie.statistics() == (15, 1)


async def test_a_cancelled_query_of_a_few_nodes_changes_no_other(gated: tuple[AsyncTokenCharacterTrie, Gated]) -> None:
    trie, gate = gated
    gate.gate.clear()
    weights = np.array([1.0, 2.0, 3.0, 4.0])
    running = [asyncio.ensure_future(trie.prefix_weights(weights, [b"cat"])) for _ in range(3)]
    await asyncio.to_thread(gate.entered.wait)
    queued = [asyncio.ensure_future(trie.children_weights(weights, trie.trie.root)) for _ in range(3)]
    await asyncio.sleep(0)
    weights[:] = 100  # changes nothing that was asked before
    running[1].cancel()
    queued[0].cancel()
    gate.gate.set()
    found = await asyncio.gather(*running, *queued, return_exceptions=True)
    assert [isinstance(row, asyncio.CancelledError) for row in found] == [False, True, False, True, False, False]
    assert [found[i].tolist() for i in (0, 2, 4, 5)] == [[3], [3], [3, 7], [3, 7]]
    assert gate.batches == [("some sum", 3), ("some sum", 2)]


async def test_wrong_queries_of_a_few_nodes_fail_alone(gated: tuple[AsyncTokenCharacterTrie, Gated]) -> None:
    trie, _ = gated
    asked = [
        trie.prefix_weights([1, 2, 3, 4], [b"d"]),
        trie.prefix_weights([1, 2, 3], [b"d"]),
        trie.children_weights([1, 2, 3, 4], 13),
        trie.children_weights([1, 2, 3, 4], 12, "mean"),  # type: ignore[arg-type]
        trie.prefix_weights([13, 2, 3, 4], [b"d"]),
        trie.children_weights([1, 2, 3, 4], 12),
    ]
    found = await asyncio.gather(*asked, return_exceptions=True)
    kinds = [type(error) for error in found[1:5]]
    assert kinds == [WeightsMismatch, NoSuchNode, ValueError, ZeroDivisionError]
    assert "Unknown reduction" in str(found[3])
    assert [found[0].tolist(), found[5].tolist()] == [[7], [3, 7]]


async def test_results_share_no_memory(trie: AsyncTokenCharacterTrie) -> None:
    first, second = await asyncio.gather(trie.weight_sum([1, 2, 3, 4]), trie.weight_sum([1, 2, 3, 4]))
    first[:] = 0
    assert second[trie.trie.root] == 10 and not np.shares_memory(first, second)


async def test_weights_are_those_of_the_moment_of_the_call(gated: tuple[AsyncTokenCharacterTrie, Gated]) -> None:
    trie, gate = gated
    gate.gate.clear()
    array, tensor = np.ones(4), torch.ones(4)
    tasks = [asyncio.ensure_future(trie.weight_sum(weights)) for weights in (array, tensor)]
    await asyncio.to_thread(gate.entered.wait)
    array[:] = 100
    tensor.fill_(100)
    gate.gate.set()
    assert [row[trie.trie.root] for row in await asyncio.gather(*tasks)] == [4, 4]


ROWS = [[1.0, 0, 0, 0], [0, 2.0, 0, 0], [0, 0, 3.0, 0]]
CALLS: dict[str, Callable[[AsyncTokenCharacterTrie, Any], Any]] = {
    "weight_sum": lambda trie, ws: trie.weight_sum(ws),
    "weight_max": lambda trie, ws: trie.weight_max(ws),
    "weight_logsumexp": lambda trie, ws: trie.weight_logsumexp(ws),
    "mass_sum": lambda trie, ws: trie.mass_sum(ws),
    "batch_weight_sum": lambda trie, ws: trie.batch_weight_sum(ws[None]),
    "batch_weight_max": lambda trie, ws: trie.batch_weight_max(ws[None]),
    "batch_weight_logsumexp": lambda trie, ws: trie.batch_weight_logsumexp(ws[None]),
    "batch_mass_sum": lambda trie, ws: trie.batch_mass_sum(ws[None]),
    "children_weights": lambda trie, ws: trie.children_weights(ws, trie.trie.root),
    "prefix_weights": lambda trie, ws: trie.prefix_weights(ws, [b"cat", b"d"]),
}


@pytest.mark.parametrize("n_passes", [0, 1])
@pytest.mark.parametrize("name", CALLS)
async def test_one_buffer_serves_many_calls(trie: AsyncTokenCharacterTrie, name: str, n_passes: int) -> None:
    """What is asked is fixed by the call, before its task has run at all."""
    call = CALLS[name]
    for buffer in (np.empty(4), torch.empty(4, dtype=torch.float64)):
        tasks = []
        for row in ROWS:
            for i, weight in enumerate(row):
                buffer[i] = weight
            tasks.append(asyncio.create_task(call(trie, buffer)))
            for _ in range(n_passes):
                await asyncio.sleep(0)
        buffer[:] = 100
        for row, task in zip(ROWS, tasks, strict=True):
            np.testing.assert_array_equal(await task, await call(trie, np.array(row)))


async def test_prefixes_are_those_of_the_moment_of_the_call(trie: AsyncTokenCharacterTrie) -> None:
    prefixes = [b"cat"]
    asked = trie.prefix_weights([1, 2, 3, 4], prefixes)
    prefixes[0] = b"d"
    np.testing.assert_array_equal(await asked, trie.trie.prefix_weights([1, 2, 3, 4], [b"cat"]))


async def test_a_wrong_call_raises_where_it_is_awaited(trie: AsyncTokenCharacterTrie) -> None:
    asked = [trie.weight_sum([1, 2]), trie.children_weights([1, 2, 3, 4], 99)]
    for call, kind in zip(asked, (WeightsMismatch, NoSuchNode), strict=True):
        with pytest.raises(kind):
            await call
    assert trie.statistics() == (0, 0)


async def test_a_cancelled_request_changes_no_other(gated: tuple[AsyncTokenCharacterTrie, Gated]) -> None:
    trie, gate = gated
    gate.gate.clear()
    running = [asyncio.ensure_future(trie.weight_sum([i, 1, 1, 1])) for i in range(3)]
    await asyncio.to_thread(gate.entered.wait)
    queued = [asyncio.ensure_future(trie.weight_max([i, 1, 1, 1])) for i in range(3)]
    await asyncio.sleep(0)
    running[1].cancel()
    queued[0].cancel()
    gate.gate.set()
    found = await asyncio.gather(*running, *queued, return_exceptions=True)
    assert [isinstance(row, asyncio.CancelledError) for row in found] == [False, True, False, True, False, False]
    assert found[0][trie.trie.root] == 3 and found[2][trie.trie.root] == 5
    assert found[4][trie.trie.root] == 1 and found[5][trie.trie.root] == 2
    assert gate.batches == [("sum", 3), ("max", 2)]


async def test_a_request_that_fails_changes_no_other(gated: tuple[AsyncTokenCharacterTrie, Gated]) -> None:
    trie, _ = gated
    asked = [trie.weight_sum([float(i), 0, 0, 0]) for i in range(10, 16)] + [trie.weight_max([2.0, 0, 0, 0])]
    found = await asyncio.gather(*asked, return_exceptions=True)
    assert isinstance(found[3], ZeroDivisionError)
    assert [row[trie.trie.root] for i, row in enumerate(found) if i != 3] == [10, 11, 12, 14, 15, 2]


async def test_wrong_weights_fail_their_own_call_only(trie: AsyncTokenCharacterTrie) -> None:
    asked = [
        trie.weight_sum([1, 2, 3, 4]),
        trie.weight_sum([1, 2, 3]),
        trie.weight_max([[1] * 4]),
        trie.weight_max([1, 2, 3, 4]),
    ]
    found = await asyncio.gather(*asked, return_exceptions=True)
    assert [isinstance(row, WeightsMismatch) for row in found] == [False, True, True, False]
    assert found[0][trie.trie.root] == 10 and found[3][trie.trie.root] == 4


def test_a_second_event_loop_is_served() -> None:
    trie = AsyncTokenCharacterTrie.from_vocab(FOUR_WORDS)

    async def ask() -> float:
        async with asyncio.timeout(20):
            return float((await trie.weight_sum([1, 2, 3, 4]))[trie.trie.root])

    assert [asyncio.run(ask()) for _ in range(3)] == [10, 10, 10]
    trie.shutdown()


def test_loops_in_two_threads_are_served_at_once() -> None:
    trie = AsyncTokenCharacterTrie.from_vocab(FOUR_WORDS)
    found: list[float] = []

    async def ask() -> None:
        rows = await asyncio.gather(*(trie.weight_sum([i, 0, 0, 0]) for i in range(20)))
        found.append(sum(float(row[trie.trie.root]) for row in rows))

    threads = [threading.Thread(target=asyncio.run, args=(ask(),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found == [190, 190]
    trie.shutdown()


async def test_cleanup_ends_the_thread_and_asking_again_starts_another() -> None:
    trie = AsyncTokenCharacterTrie(TokenCharacterTrie(FOUR_WORDS))
    before = set(threading.enumerate())

    def threads() -> list[threading.Thread]:
        return [new for new in threading.enumerate() if new not in before and new.name == "genlm-engine"]

    trie.start()
    await trie.cleanup()
    assert threads() == []
    assert (await trie.weight_sum([1, 2, 3, 4]))[trie.trie.root] == 10
    assert len(threads()) == 1
    await trie.cleanup()
    assert threads() == []
    assert trie.statistics().batches == 0
    assert (await trie.weight_max([1, 2, 3, 4]))[trie.trie.root] == 4
    trie.shutdown()
    trie.shutdown()


async def test_what_waits_at_shutdown_is_refused(gated: tuple[AsyncTokenCharacterTrie, Gated]) -> None:
    trie, gate = gated
    gate.gate.clear()
    running = asyncio.ensure_future(trie.weight_sum([1, 2, 3, 4]))
    await asyncio.to_thread(gate.entered.wait)
    queued = asyncio.ensure_future(trie.weight_sum([1, 2, 3, 4]))
    await asyncio.sleep(0)
    closing = asyncio.ensure_future(trie.aclose())
    with pytest.raises(ModelClosed):
        await queued
    gate.gate.set()
    assert (await running)[trie.trie.root] == 10
    await closing


@pytest.mark.thorough
async def test_a_forgotten_trie_is_collected_with_its_thread() -> None:
    before = set(threading.enumerate())  # engines that other tests share have threads of the same name
    trie = AsyncTokenCharacterTrie(TokenCharacterTrie(FOUR_WORDS))
    await trie.weight_sum([1, 2, 3, 4])
    (thread,) = (new for new in set(threading.enumerate()) - before if new.name == "genlm-engine")
    inner = weakref.ref(trie.trie)
    del trie
    for _ in range(100):  # the thread may hold it a moment longer than the answer takes
        gc.collect()
        await asyncio.to_thread(thread.join, 0.1)
        if not thread.is_alive():
            break
    assert not thread.is_alive() and inner() is None


@pytest.mark.parametrize(
    ("backend", "kind"), [("sequential", TokenCharacterTrie), ("parallel", ParallelTokenCharacterTrie)]
)
def test_from_vocab_makes_the_trie_that_is_named(backend: str, kind: type) -> None:
    assert type(AsyncTokenCharacterTrie.from_vocab([Token(0, b"a")], backend=backend).trie) is kind
    assert type(AsyncTokenCharacterTrie.from_vocab([b"a"], device="cpu").trie) is ParallelTokenCharacterTrie


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(UnknownBackend, match="Unknown backend") as caught:
        AsyncTokenCharacterTrie.from_vocab(FOUR_WORDS, backend="quantum")
    assert isinstance(caught.value, ValueError)
