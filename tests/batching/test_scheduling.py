"""The interpreter's switch interval is short while a batch runs, and what it was afterwards."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from genlm_backend.batching import Batcher, Job
from genlm_backend.batching.scheduling import SWITCH_INTERVAL_S, responsive_threads


@pytest.fixture(autouse=True)
def interval_kept() -> Iterator[None]:
    before = sys.getswitchinterval()
    yield
    after = sys.getswitchinterval()
    sys.setswitchinterval(before)
    assert after == before


def test_it_is_short_inside_and_restored_after_an_error() -> None:
    with pytest.raises(ValueError), responsive_threads():
        assert sys.getswitchinterval() == pytest.approx(SWITCH_INTERVAL_S)
        raise ValueError


def test_a_shorter_one_stays() -> None:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    with responsive_threads():
        assert sys.getswitchinterval() == pytest.approx(1e-6)
    assert sys.getswitchinterval() == pytest.approx(1e-6)
    sys.setswitchinterval(before)


def test_the_last_one_out_restores_it() -> None:
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with responsive_threads():
            inside.set()
            assert leave.wait(30)

    thread = threading.Thread(target=other)
    with responsive_threads():
        thread.start()
        assert inside.wait(30)
    assert sys.getswitchinterval() == pytest.approx(SWITCH_INTERVAL_S), "one is inside"
    leave.set()
    thread.join()


@pytest.mark.parametrize("error", [None, RuntimeError(), KeyboardInterrupt()])
async def test_a_batch_restores_it_whatever_happens(error: BaseException | None) -> None:
    seen: list[float] = []

    def evaluate(jobs: Sequence[Job]) -> list[list[Any]]:
        seen.append(sys.getswitchinterval())
        if error is not None:
            raise error
        return [[None for _ in job.questions] for job in jobs]

    batcher = Batcher(evaluate, batch_size=4, explain=lambda _, cause: RuntimeError(repr(cause)))
    (outcome,) = await asyncio.gather(batcher.ask("a", None), return_exceptions=True)
    assert isinstance(outcome, RuntimeError) if error is not None else outcome is None
    assert seen == [pytest.approx(SWITCH_INTERVAL_S)]
    batcher.close()
