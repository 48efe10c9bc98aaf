"""Work in parts: the results of one thread, in order, whatever the number of threads; errors reach the caller."""

from __future__ import annotations

import threading

import pytest
import torch

from genlm_backend import sampling
from genlm_backend.parts import in_parts
from genlm_backend.sampling import Kept


@pytest.mark.parametrize("n_threads", [1, 2, 5])
@pytest.mark.parametrize("n", [0, 1, 7, 8, 15, 16, 17, 100])
def test_parts_cover_everything_once_and_in_order(monkeypatch, n_threads, n):
    monkeypatch.setattr(torch, "get_num_threads", lambda: n_threads)
    threads: set[int] = set()

    def work(start: int, stop: int) -> list[int]:
        threads.add(threading.get_ident())
        return list(range(start, stop))

    parts = in_parts(n, 8, work)
    assert [i for part in parts for i in part] == list(range(n))
    assert len(parts) == max(1, min(n_threads, n // 8)) and all(len(part) >= 8 for part in parts[1:])
    assert threading.get_ident() in threads and (len(threads) > 1) == (len(parts) > 1)


@pytest.mark.parametrize("at", [0, 9, 39])
def test_what_a_part_raises_reaches_the_caller_when_all_have_ended(monkeypatch, at):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    before = set(threading.enumerate())

    def work(start: int, stop: int) -> None:
        if start <= at < stop:
            raise ZeroDivisionError(f"at {at}")

    with pytest.raises(ZeroDivisionError, match=f"at {at}"):
        in_parts(40, 10, work)
    assert not set(threading.enumerate()) - before


def test_without_more_threads_everything_is_done_by_the_caller(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    start, n_started = threading.Thread.start, []

    def fails_from_the_second_on(thread: threading.Thread) -> None:
        n_started.append(thread)
        if len(n_started) > 1:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", fails_from_the_second_on)
    assert in_parts(40, 10, lambda start, stop: list(range(start, stop))) == [
        list(range(i, i + 10)) for i in (0, 10, 20, 30)
    ]


def test_draws_and_filters_do_not_depend_on_the_number_of_threads(monkeypatch):
    random = torch.Generator().manual_seed(0)
    rows = (torch.randn(60, 700, generator=random) * 3).log_softmax(1)
    masks = [None if i % 3 else torch.rand(700, generator=random) < 0.5 for i in range(90)]
    row_of_draw = [i * 7 % 60 for i in range(90)]
    temperatures, keys, kept = [(0.0, 0.7, 1.0)[i % 3] for i in range(90)], list(range(90)), [Kept(top_p=0.9)] * 90

    def everything() -> list[torch.Tensor]:
        return [
            sampling.draw(rows, keys[:60], temperatures[:60], masks[:60]),
            *sampling.draw_with_mass(rows, row_of_draw, keys, temperatures, masks),
            *sampling.draw_filtered(rows, row_of_draw, keys, kept, temperatures, masks),
            *sampling.top_k(rows, 20),
        ]

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    alone = everything()
    for n_threads in (2, 3, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=n_threads: n)
        assert all(torch.equal(one, other) for one, other in zip(alone, everything(), strict=True))
