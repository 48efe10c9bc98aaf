"""`run_sync`: a coroutine's result for synchronous code, with and without a running loop around it."""

from __future__ import annotations

import asyncio
import contextvars
import threading

import pytest

from genlm_backend.batching import run_apart, run_sync

name = contextvars.ContextVar("name", default="none")


async def give(value: int) -> int:
    await asyncio.sleep(0)
    return value


async def fail(error: BaseException) -> None:
    await asyncio.sleep(0)
    raise error


def test_without_a_loop() -> None:
    assert run_sync(give(3)) == 3


async def test_inside_a_running_loop() -> None:
    assert run_sync(give(3)) == 3
    assert await give(4) == 4, "the loop around goes on"


async def test_nested() -> None:
    async def outer(depth: int) -> int:
        return run_sync(outer(depth - 1)) + 1 if depth else 0

    assert await outer(5) == 5


def test_in_a_thread_of_a_program_whose_main_thread_has_a_loop() -> None:
    async def main() -> int:
        return await asyncio.to_thread(lambda: run_sync(give(5)))

    assert asyncio.run(main()) == 5


@pytest.mark.parametrize("error", [ValueError("x"), asyncio.CancelledError(), SystemExit(2)])
async def test_what_the_coroutine_raises_comes_out(error: BaseException) -> None:
    with pytest.raises(type(error)):
        run_sync(fail(error))
    assert await give(1) == 1


def test_an_error_comes_without_another_one_above_it() -> None:
    with pytest.raises(ValueError) as caught:
        run_sync(fail(ValueError("x")))
    assert caught.value.__context__ is None


async def test_context_variables_are_those_of_the_caller() -> None:
    async def look() -> str:
        return name.get()

    token = name.set("caller")
    assert run_sync(look()) == "caller"
    name.reset(token)


async def test_an_interrupt_of_the_caller_cancels_the_coroutine(monkeypatch: pytest.MonkeyPatch) -> None:
    started, cancelled = threading.Event(), threading.Event()

    async def forever() -> None:
        started.set()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            cancelled.set()

    def interrupted(self: threading.Thread, timeout: float | None = None) -> None:
        if self.name == "genlm-run-sync":
            assert started.wait(30)
            raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_sync(forever())
    assert cancelled.wait(30)


def test_run_apart_gives_the_result_from_a_thread_that_has_ended() -> None:
    apart = run_apart(threading.current_thread)
    assert apart is not threading.current_thread() and not apart.is_alive()


def test_run_apart_hands_on_what_the_function_raises() -> None:
    def fail() -> None:
        raise KeyError("here")

    with pytest.raises(KeyError, match="here"):
        run_apart(fail)
