"""Run as a program by `test_process`: each scenario in a process of its own, forked after the imports to save time.

The arguments are an empty folder and names of scenarios. For each, the folder gets NAME.err, what the process wrote to
its standard error, and NAME.code, its exit status and the seconds until then.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
import warnings
from pathlib import Path

import torch

from genlm_backend.errors import ForkedEngine
from genlm_backend.llm import AsyncLM
from genlm_backend.testing import FakeEngine, fake_language_model

kept: list[object] = []  # what a program still holds when it ends


def model(is_open: bool = True) -> tuple[FakeEngine, AsyncLM]:
    engine = FakeEngine(is_open=is_open)
    llm = fake_language_model(engine)
    kept.append(llm)
    return engine, llm


def exit_after_import() -> None:
    pass


def exit_after_load() -> None:
    model()


def exit_after_use() -> None:
    _, llm = model()
    llm.next_token_logprobs_sync([1])


async def _leave_while_computed(engine: FakeEngine, llm: AsyncLM) -> None:
    asked = asyncio.create_task(llm.next_token_logprobs([1]))
    await engine.entered()
    asked.cancel()


def exit_mid_batch() -> None:
    """The batch ends while the interpreter does."""
    engine, llm = model(is_open=False)
    asyncio.run(_leave_while_computed(engine, llm))
    signal.signal(signal.SIGALRM, lambda *_: engine.open())
    signal.setitimer(signal.ITIMER_REAL, 0.2)


def exit_with_a_stuck_batch() -> None:
    """The batch never ends."""
    engine, llm = model(is_open=False)
    asyncio.run(_leave_while_computed(engine, llm))


def interrupted_mid_batch() -> None:
    """Ctrl-C while a batch is computed."""
    engine, llm = model(is_open=False)

    async def main() -> None:
        asked = asyncio.create_task(llm.next_token_logprobs([1]))
        await engine.entered()
        os.kill(os.getpid(), signal.SIGINT)
        await asked

    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        engine.open()
        sys.exit(130)


def interrupted_in_a_synchronous_call() -> None:
    """Ctrl-C in `next_token_logprobs_sync` while a batch that never ends is computed."""
    _, llm = model(is_open=False)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        llm.next_token_logprobs_sync([1])
    except KeyboardInterrupt:
        sys.exit(130)


def forked() -> None:
    """A fork of the process hears that it cannot ask, in every way of asking; its parent goes on."""
    engine, llm = model()
    llm.next_token_logprobs_sync([1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks beside threads
        child = os.fork()
    if child == 0:
        for ids in ([1], [2]):  # remembered, and new
            try:
                llm.next_token_logprobs_sync(ids)
            except ForkedEngine as error:
                assert str(os.getpid()) in str(error)
            else:
                raise AssertionError("a fork was answered")
        with contextlib.suppress(ForkedEngine):
            llm.reset_async_queries()
        llm.close()
        sys.exit(7)  # as every program ends, with what is registered for the end
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 7
    assert torch.equal(llm.next_token_logprobs_sync([3]), engine.row([3]))


SCENARIOS = {
    function.__name__: function
    for function in (
        exit_after_import,
        exit_after_load,
        exit_after_use,
        exit_mid_batch,
        exit_with_a_stuck_batch,
        interrupted_mid_batch,
        interrupted_in_a_synchronous_call,
        forked,
    )
}


def start(name: str, folder: Path) -> int:
    """The id of the new process; zero in that process, with its standard error in a file."""
    child = os.fork()
    if child == 0:
        error = os.open(folder / f"{name}.err", os.O_WRONLY | os.O_CREAT)
        os.dup2(error, 2)
        os.dup2(error, 1)
    return child


if __name__ == "__main__":
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    started_s = time.monotonic()
    running = {}
    for name in names:
        child = start(name, folder)
        if child == 0:
            SCENARIOS[name]()
            break  # to the end of the program
        running[child] = name
    else:
        while running:
            child, status = os.wait()
            code = os.waitstatus_to_exitcode(status)
            (folder / f"{running.pop(child)}.code").write_text(f"{code} {time.monotonic() - started_s}")
