"""Programs: what people write. A `Particle` is immutable state with a step; a `program` is one straight coroutine.

    @dataclass(frozen=True)
    class Walk(Particle):                               @program
        token_ids: tuple[int, ...]                      async def walk(ctx, token_ids, n):
                                                            for _ in range(n):
        async def step(self, ctx):                              row = await ctx.logprobs(llm, token_ids)
            row = await ctx.logprobs(llm, self.token_ids)       token_ids = (*token_ids, await ctx.sample(row))
            token_ids = (*self.token_ids,                       await ctx.checkpoint()
                         await ctx.sample(row))             return token_ids
            if len(token_ids) == 5:
                return Done(token_ids)
            return Walk(token_ids)

Both are the same to the engine. A copy of a `Particle` shares its state. A copy of a program is the program run again
to its checkpoint, with the context answering from its record: it draws nothing, weighs nothing and asks no model, but
what it does besides (printing, appending to a global list) it does again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine
from functools import wraps
from typing import Any, Concatenate, NamedTuple, ParamSpec

from genlm_backend.errors import InvalidProgram
from genlm_backend.smc.context import Context

P = ParamSpec("P")


class Done(NamedTuple):
    """The end of a particle, with what it found: `result.posterior()` is over these values."""

    value: Any


class Particle(ABC):
    """Immutable state, and how it goes on; copies share it, so a step returns a new one and changes nothing."""

    @abstractmethod
    async def step(self, ctx: Context) -> Particle | Done:
        """The next state, or `Done(value)`; between two steps particles may be resampled."""


class Program(NamedTuple):
    """A program with its arguments, not begun."""

    function: Callable[..., Awaitable[Any]]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def begin(self, ctx: Context) -> Coroutine[Any, Any, Any]:
        """Its coroutine in a context."""
        return _run_program(ctx, self)


def program(function: Callable[Concatenate[Context, P], Awaitable[Any]]) -> Callable[P, Program]:
    """Decorator: `function(ctx, *args)` becomes `function(*args)`, a program to be given to `smc`."""

    @wraps(function)
    def with_arguments(*args: P.args, **kwargs: P.kwargs) -> Program:
        return Program(function, args, kwargs)

    return with_arguments


Start = Callable[[Context], Coroutine[Any, Any, Any]]
"""From a context at its beginning, or at a checkpoint of a Particle, to the coroutine that goes on from there."""


def start_of(model: object) -> Start:
    """How copies of a model begin.

    Raises:
        InvalidProgram: It is neither a Particle, nor a program, nor an async function of a context.
    """
    if isinstance(model, Program):
        return model.begin
    if isinstance(model, Particle):
        return lambda ctx: _run_particle(ctx, model)
    if callable(model) and not isinstance(model, type):
        return Program(model, (), {}).begin
    raise InvalidProgram(
        f"smc was given {model!r}", "give it a Particle, what a @program function returned, or an async function of ctx"
    )


async def _run_program(ctx: Context, begun: Program) -> Any:
    outcome: object = begun.function(ctx, *begun.args, **begun.kwargs)
    if not isinstance(outcome, Awaitable):
        name = getattr(begun.function, "__name__", repr(begun.function))
        raise InvalidProgram(f"{name} is no coroutine function: it returned {outcome!r}", "write it with `async def`")
    return await outcome


async def _run_particle(ctx: Context, first: Particle) -> Any:
    particle: Any = first if ctx.state is None else ctx.state
    kind = type(first)
    while type(particle) is kind or isinstance(particle, Particle):
        ctx.is_stepping = True
        particle = await particle.step(ctx)
        ctx.is_stepping = False
        if isinstance(particle, Done):
            return particle.value
        ctx.state = particle
        await ctx.checkpoint()
    raise InvalidProgram(f"a step returned {particle!r}", "return the next Particle, or Done(value)")
