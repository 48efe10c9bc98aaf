"""What does waiting cost? A lone query, the event loop beside a forward, and a forward beside a busy Python thread.

python -m benchmark.responsiveness [--model smollm2]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import statistics
import threading
import time
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table

from genlm_backend.batching import Job, scheduling
from genlm_backend.llm import AsyncLM, LogNormalizer, load_model_by_name

PARTICLES, PROMPT, REPEATS = 10, 3, 30
rng = random.Random(0)


def contexts() -> list[list[int]]:
    return [[rng.randrange(3, 1000) for _ in range(PROMPT)] for _ in range(PARTICLES)]


async def step_times(llm: AsyncLM, repeats: int) -> list[float]:
    """Seconds of each step of ten particles, one new token each."""
    particles, times = contexts(), []
    for _ in range(repeats):
        for token_ids in particles:
            token_ids.append(rng.randrange(3, 1000))
        start = time.perf_counter()
        await asyncio.gather(*(llm.query(token_ids, LogNormalizer()) for token_ids in particles))
        times.append(time.perf_counter() - start)
    return times


async def lone_times(llm: AsyncLM, repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of a lone query, and how many of them the engine worked on it (forward, normalisation, answer)."""
    service, inside = llm._service, []
    evaluate = service.batcher._evaluate

    def timed(jobs: Sequence[Job]) -> object:
        start = time.perf_counter()
        outcomes = evaluate()(jobs)
        inside.append(time.perf_counter() - start)
        return outcomes

    service.batcher._evaluate = lambda: timed
    token_ids, through = contexts()[0], []
    for _ in range(repeats):
        token_ids.append(rng.randrange(3, 1000))
        start = time.perf_counter()
        await llm.query(token_ids, LogNormalizer())
        through.append(time.perf_counter() - start)
    service.batcher._evaluate = evaluate
    return through, inside


@contextlib.contextmanager
def busy_thread() -> Iterator[None]:
    """A thread that computes in pure Python."""
    stop = threading.Event()

    def spin() -> None:
        while not stop.is_set():
            sum(range(1000))

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


async def stalls(llm: AsyncLM, repeats: int) -> list[float]:
    """Seconds by which a 5 ms timer of the event loop came late while steps ran."""
    late: list[float] = []

    async def probe() -> None:
        while True:
            start = time.perf_counter()
            await asyncio.sleep(0.005)
            late.append(time.perf_counter() - start - 0.005)

    task = asyncio.ensure_future(probe())
    await step_times(llm, repeats)
    task.cancel()
    return sorted(late)


async def main(model: str) -> None:
    console = Console()
    async with load_model_by_name(model, "hf") as llm:
        await step_times(llm, 5)
        through, inside = await lone_times(llm, REPEATS)
        around = statistics.median(a - b for a, b in zip(through, inside, strict=True))
        console.print(
            f"lone query {statistics.median(through) * 1e3:.1f} ms, of which around the engine {around * 1e3:.2f} ms"
        )
        table = Table("switch interval", "step alone", "step beside a busy thread", "loop late p99", "loop late max")
        chosen = scheduling.SWITCH_INTERVAL_S
        for interval in (5e-3, 5e-4, chosen):
            scheduling.SWITCH_INTERVAL_S = interval
            free = statistics.median(await step_times(llm, REPEATS))
            with busy_thread():
                beside = statistics.median(await step_times(llm, 5))
            late = await stalls(llm, REPEATS)
            row = [free, beside, late[int(0.99 * len(late))], late[-1]]
            table.add_row(f"{interval * 1e3:g} ms", *(f"{value * 1e3:.1f} ms" for value in row))
        scheduling.SWITCH_INTERVAL_S = chosen
        console.print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    asyncio.run(main(parser.parse_args().model))
