"""Memory that rows borrow: it comes back when nobody can read them any more, never earlier."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch

from genlm_backend.cache.row_memory import RowMemory


def test_memory_comes_back_when_its_tensor_is_gone() -> None:
    memory = RowMemory()
    rows = memory.empty((3, 5))
    assert rows.shape == (3, 5) and rows.dtype == torch.float32 and memory.n_bytes == 0
    where = rows.data_ptr()
    del rows
    assert memory.n_bytes == 60
    assert memory.empty((5, 3)).data_ptr() == where


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
    memory = RowMemory()
    shared = share(memory.empty((3, 5)).fill_(7.0))
    gc.collect()
    memory.empty((3, 5)).fill_(1.0)
    if not isinstance(shared, torch.UntypedStorage):
        assert bool((shared == 7.0).all())  # type: ignore[attr-defined]
    before = memory.n_bytes
    del shared
    assert (before, memory.n_bytes) == (60, 120)


def test_memory_comes_back_from_another_thread() -> None:
    memory = RowMemory()
    held = [memory.empty((3, 5))]
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert memory.n_bytes == 60


def test_few_rows_do_not_take_the_memory_of_many() -> None:
    memory = RowMemory()
    memory.empty((4, 10))
    few = memory.empty((1, 10))
    assert memory.n_bytes == 160
    half = memory.empty((2, 10))
    assert memory.n_bytes == 0 and half.untyped_storage().nbytes() == 80
    del few, half
    assert memory.n_bytes == 200


def test_what_is_spare_is_bounded() -> None:
    memory = RowMemory()
    held = [memory.empty((n, 10)) for n in (1, 2, 3)]
    while held:
        held.pop(0)
    assert memory.n_bytes == 240
    memory.trim(200)
    assert memory.n_bytes == 200
    memory.trim(0)
    assert memory.n_bytes == 120, "one is kept: the next batch is as large, usually"
    memory.clear()
    assert memory.n_bytes == 0


def test_no_rows_need_no_memory() -> None:
    memory = RowMemory()
    assert memory.empty((0, 5)).shape == (0, 5) and memory.empty((2, 0)).shape == (2, 0)
    assert memory.n_bytes == 0


def test_a_random_life_never_mixes_rows_up() -> None:
    """Rows hold what was put there until they are dropped, in any order of borrowing and dropping."""
    generator = np.random.default_rng(0)
    memory = RowMemory()
    held: list[tuple[torch.Tensor, float]] = []
    borrowed = set()
    for number in range(500):
        rows = memory.empty((int(generator.integers(1, 6)), 7)).fill_(number)
        borrowed.add(rows.data_ptr())
        held.append((rows[-1] if number % 2 else rows, number))
        del rows
        while len(held) > 5 or (held and generator.random() < 0.4):
            kept, value = held.pop(int(generator.integers(len(held))))
            assert bool((kept == value).all())
            del kept
        memory.trim(500)
        assert memory.n_bytes <= 500
    assert len(borrowed) < 100, "memory was used again"
