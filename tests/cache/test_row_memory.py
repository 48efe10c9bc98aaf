"""Memory that rows borrow: it comes back when nobody can read them any more, never earlier."""

from __future__ import annotations

import gc
import math
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from genlm_backend.cache import row_memory
from genlm_backend.cache.row_memory import RowMemory


@pytest.fixture(autouse=True)
def nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_memory, "SMALL_BYTES", 0)


def place(rows: torch.Tensor) -> int:
    return rows.untyped_storage().data_ptr()


def test_memory_is_used_again_when_its_tensor_is_gone() -> None:
    memory = RowMemory(4 * 20)
    rows = memory.empty((3, 5))
    assert rows.shape == (3, 5) and rows.dtype == torch.float32
    where = place(rows)
    del rows
    assert place(memory.empty((5, 3))) == where


@pytest.mark.parametrize(
    "share",
    [
        lambda rows: rows[1],
        lambda rows: rows[:, 2:3],
        lambda rows: rows.detach(),
        lambda rows: rows.numpy(),
        lambda rows: rows.untyped_storage(),
    ],
    ids=["row", "column", "detached", "numpy", "storage"],
)
def test_whatever_shares_the_memory_keeps_it(share: Callable[[torch.Tensor], object]) -> None:
    memory = RowMemory(4 * 20)
    rows = memory.empty((3, 5)).fill_(7.0)
    where = place(rows)
    shared = share(rows)
    del rows
    other = memory.empty((3, 5)).fill_(1.0)
    assert place(other) != where
    if not isinstance(shared, torch.UntypedStorage):
        assert bool((shared == 7.0).all())  # type: ignore[attr-defined]
    del shared
    assert place(memory.empty((3, 5))) == where


def test_memory_comes_back_from_another_thread() -> None:
    memory = RowMemory(4 * 20)
    held = [memory.empty((3, 5))]
    where = place(held[0])
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert place(memory.empty((3, 5))) == where


def test_pieces_follow_each_other_and_the_ring_closes() -> None:
    memory = RowMemory(4 * 10)
    first, second = memory.empty((4,)), memory.empty((4,))
    assert place(second) == place(first) + 16
    start = place(first)
    third = memory.empty((4,))  # two places are left
    assert not start <= place(third) < start + 40
    del first
    fourth = memory.empty((3,))
    assert place(fourth) == start, "from the beginning again"
    assert place(memory.empty((2,))) == start + 32, "what is lent is passed over"


def test_where_the_ring_is_too_small_rows_have_memory_of_their_own() -> None:
    memory = RowMemory(0)
    assert memory.empty((2, 5)).fill_(1.0).sum() == 10
    assert memory.empty((0, 5)).shape == (0, 5) and memory.empty((2, 0)).shape == (2, 0)


def test_small_rows_are_left_to_malloc(monkeypatch: pytest.MonkeyPatch) -> None:
    """A memo of small rows has thousands of pieces, and each new one is sought among them."""
    monkeypatch.setattr(row_memory, "SMALL_BYTES", 44)
    memory = RowMemory(4 * 20)
    small, large = memory.empty((10,)), memory.empty((11,))
    assert memory._lent == {0: 11}
    small.fill_(1.0)
    large.fill_(2.0)
    assert small.sum() == 10


def test_a_released_ring_lives_as_long_as_its_pieces() -> None:
    memory = RowMemory(4 * 20)
    old = memory.empty((2, 5)).fill_(7.0)
    memory.release()
    new = memory.empty((2, 5)).fill_(1.0)
    del new
    assert bool((old == 7.0).all())
    new = memory.empty((2, 5)).fill_(2.0)
    del old  # it comes back to the ring that it was of
    others = [memory.empty((1, 5)).fill_(3.0) for _ in range(4)]
    assert bool((new == 2.0).all()) and len(others) == 4


def test_a_released_ring_goes_when_its_pieces_are_gone() -> None:
    memory = RowMemory(4 * 20)
    piece = memory.empty((2, 5))
    assert memory._ring is not None
    ring = weakref.ref(memory._ring)
    memory.release()
    assert ring() is not None
    del piece
    assert ring() is None


@pytest.mark.parametrize("n_bytes", [10**17, sys.maxsize, math.inf, 1e17])
def test_a_bound_that_means_none_takes_no_ring(n_bytes: float) -> None:
    memory = RowMemory(n_bytes)
    for _ in range(2):
        assert memory.empty((2, 5)).fill_(1.0).sum() == 10


def test_pieces_that_end_while_a_place_is_sought_do_no_harm() -> None:
    """The collector may run, and end pieces that are held by cycles, wherever memory is asked for."""

    class Treacherous(dict[int, int]):
        def items(self) -> Any:
            for number, item in enumerate(super().items()):
                if not number:
                    cycles.clear()
                    gc.collect()
                yield item

        def copy(self) -> dict[int, int]:  # one call of the interpreter
            return dict.copy(self)

    memory = RowMemory(4 * 40)
    memory._lent = Treacherous()
    cycles: list[list[object]] = []
    for _ in range(2):
        cycle: list[object] = [memory.empty((2, 5))]
        cycle.append(cycle)
        cycles.append(cycle)
    del cycle
    held = memory.empty((2, 5)).fill_(1.0)
    rows = memory.empty((1, 5)).fill_(2.0)
    assert bool((held == 1.0).all()) and rows.sum() == 10


def test_a_random_life_never_mixes_rows_up() -> None:
    """Rows hold what was put there until they are dropped, in any order of borrowing and dropping."""
    generator = np.random.default_rng(0)
    memory = RowMemory(4 * 7 * 30)
    held: list[tuple[torch.Tensor, float]] = []
    first = place(memory.empty((1,)))
    n_inside = 0
    for number in range(2000):
        rows = memory.empty((int(generator.integers(1, 6)), 7)).fill_(number)
        n_inside += first <= place(rows) < first + 4 * 7 * 30
        held.append((rows[-1] if number % 2 else rows, number))
        del rows
        while len(held) > 3 or (held and generator.random() < 0.4):
            kept, value = held.pop(int(generator.integers(len(held))))
            assert bool((kept == value).all())
            del kept
    assert n_inside > 1900, "the ring was used again"
