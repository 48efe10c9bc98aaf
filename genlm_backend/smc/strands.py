"""A strand is one particle at work: its coroutine and its context, advanced from checkpoint to checkpoint."""

from __future__ import annotations

import asyncio
import inspect
import math
import types
from collections.abc import Coroutine, Generator, Iterable, Sequence
from typing import Any, Protocol

from genlm_backend.errors import NonFiniteWeight, ParticleFailed
from genlm_backend.smc.context import CHECKPOINT, BadWeight, Context, Died
from genlm_backend.smc.programs import Start
from genlm_backend.smc.recording import Recording
from genlm_backend.smc.trace import Entry, Path, end_of_step, text_of

_NEW = Path()


class Strand(Protocol):
    """What the engine moves."""

    status: str
    text: bytes
    log_increments: list[float]

    async def advance(self, particle: int, step: int, ranks: tuple[int, ...] | None = None) -> None:
        """Go on to the next checkpoint, or to the end; adds to `log_increments`."""

    def fork(self) -> Strand:
        """A copy at the same checkpoint."""

    def path(self) -> Path:
        """Where it is, as plain data."""

    @property
    def is_open(self) -> bool:
        """Whether it has a coroutine that has not ended."""

    async def close(self) -> None:
        """End its coroutine; it will not be advanced again."""


class Live:
    """A strand that runs a program.

    Args:
        start: Begins the program.
        context: New, or with the record of what is to be run again first.
        path: What it has behind it.
    """

    def __init__(self, start: Start, context: Context, path: Path = _NEW) -> None:
        self.context = context
        self.status = path.status
        self.value = path.value
        self.log_increments = list(path.log_increments)
        self.text = text_of(b"", path.entries)
        self._start = start
        self._coroutine: Coroutine[Any, Any, Any] | None = None

    @classmethod
    def of_path(
        cls, start: Start, seed: int, path: Path, recording: Recording | None = None, kept: Sequence[Entry] = ()
    ) -> Live:
        """A strand that will run its program to the end of a path first.

        Args:
            start: Begins the program.
            seed: Of the draws after the path.
            path: Whole steps.
            recording: As in `Context`.
            kept: Answers of the next step that are given again, and weigh again.
        """
        context = Context(seed, recording)
        context.entries = [*path.entries, *kept]
        context.n_replayed = len(path.entries)
        return cls(start, context, path)

    async def advance(self, particle: int, step: int, ranks: tuple[int, ...] | None = None) -> None:
        """Go on to the next checkpoint.

        Cancelled, it is as before its first checkpoint that is not recorded; only `close` makes sense then.

        Raises:
            ParticleFailed: The program raised.
            NonFiniteWeight: A weight became NaN or +inf.
        """
        context = self.context
        n_shown = max(context.position, context.n_replayed)
        context.begin_step(particle, step, ranks)
        try:
            if self._coroutine is None:
                self._coroutine = self._start(context)
            is_over, value = await drive(self._coroutine)
            if is_over:
                self._coroutine = None
                context.finish()
                self.status, self.value = "done", value
            else:
                context.end_step()
        except BaseException as raised:
            match _single(raised):
                case Died():
                    self.status = "dead"
                    context.log_increment = -math.inf
                    context.entries = [entry for entry in context.entries if entry is not None]
                    await self.close()
                case BadWeight() as bad:
                    raise NonFiniteWeight(step, particle, f"{bad.args[0]} (from {bad.args[1]})") from None
                case Exception() as error:
                    raise ParticleFailed(step, particle, f"{type(error).__name__}: {error}") from raised
                case _:
                    raise
        self.log_increments.append(context.log_increment)
        self.text = text_of(self.text, (entry for entry in context.entries[n_shown:] if entry is not None))

    def fork(self) -> Live:
        """A copy at the same checkpoint: a Particle's goes on from its state, a program's runs again to get there."""
        entries = self._entries()
        context = self.context.copy(len(entries), at_end=self.context.state is not None)
        other = Live(self._start, context)
        other.status, other.value, other.text = self.status, self.value, self.text
        other.log_increments = list(self.log_increments)
        return other

    def path(self) -> Path:
        """All whole steps."""
        return Path(tuple(self._entries()), tuple(self.log_increments), self.status, self.value)

    @property
    def is_open(self) -> bool:
        """Whether it has a coroutine that has not ended."""
        return self._coroutine is not None

    async def close(self) -> None:
        """End the coroutine; see `end_program`."""
        coroutine, self._coroutine = self._coroutine, None
        if coroutine is not None:
            self.context.runs_here()
            await end_program(coroutine)

    def _entries(self) -> list[Entry]:
        if self.status != "running":
            return [entry for entry in self.context.entries if entry is not None]
        end = end_of_step([e for e in self.context.entries if e is not None], len(self.log_increments))
        return [entry for entry in self.context.entries[:end] if entry is not None]


class Retained:
    """A strand that repeats a path: nothing is run or drawn; the retained particle of conditional SMC."""

    def __init__(self, start: Start, seed: int, path: Path, recording: Recording | None = None) -> None:
        self.status = "running"
        self.text = b""
        self.log_increments: list[float] = []
        self._start, self._seed, self._whole, self._recording = start, seed, path, recording

    async def advance(self, particle: int, step: int, ranks: tuple[int, ...] | None = None) -> None:
        """Repeat one step."""
        n = len(self.log_increments) + 1
        self.log_increments.append(self._whole.log_increments[n - 1])
        if n == len(self._whole.log_increments):
            self.status = self._whole.status
        self.text = text_of(b"", self.path().entries)

    def fork(self) -> Live:
        """A copy that goes its own way from here."""
        return Live.of_path(self._start, self._seed, self.path(), self._recording)

    def path(self) -> Path:
        """What was repeated so far."""
        return self._whole.first(len(self.log_increments))

    is_open = False

    async def close(self) -> None:
        """Nothing runs."""


async def end_program(coroutine: Coroutine[Any, Any, Any]) -> None:
    """End a coroutine: what the program has in `finally` and `async with` runs, and may await.

    What that raises goes to the event loop's exception handler, which logs it: the particle is no longer needed.
    """
    if inspect.getcoroutinestate(coroutine) != inspect.CORO_SUSPENDED:
        coroutine.close()  # not begun, or at its end
        return
    try:
        is_over, _ = await drive(coroutine, Died())
        if not is_over:  # it went on to a checkpoint
            coroutine.close()
    except BaseException as raised:
        match _single(raised):
            case Died():
                pass
            case Exception() as error:
                told = {"message": "a particle that was not needed any more raised as it ended", "exception": error}
                asyncio.get_running_loop().call_exception_handler(told)
            case _:
                raise


def _single(error: BaseException) -> BaseException:
    """The error itself; of a group from a task group, the first one that is not the end of the particle."""
    while isinstance(error, BaseExceptionGroup):
        _, others = error.split(Died)
        error = (others or error).exceptions[0]
    return error


async def close_all(strands: Iterable[Strand]) -> None:
    """Close strands, all at once; what interrupts one leaves when all have ended."""
    closings = [strand.close() for strand in strands if strand.is_open]
    for outcome in await asyncio.gather(*closings, return_exceptions=True):
        if outcome is not None:
            raise outcome


@types.coroutine
def drive(
    coroutine: Coroutine[Any, Any, Any], raising: BaseException | None = None
) -> Generator[Any, Any, tuple[bool, Any]]:
    """Run a coroutine within the awaiting task to its next checkpoint or its end: (is it over, what it returned).

    Between checkpoints no task holds it: a particle that waits costs nothing and can be dropped by closing it.

    Args:
        coroutine: New, or at a checkpoint.
        raising: Raised in it where it is, instead of going on.
    """
    try:
        yielded = coroutine.send(None) if raising is None else coroutine.throw(raising)
        while yielded is not CHECKPOINT:
            try:
                received = yield yielded
            except BaseException as error:
                yielded = coroutine.throw(error)
            else:
                yielded = coroutine.send(received)
    except StopIteration as stop:
        return True, stop.value
    return False, None
