"""`genlm-backend chat`: a conversation in the terminal, under an operator or a strategy that may take tokens back."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.text import Text

from genlm_backend.cli.loading import load as load_model

if TYPE_CHECKING:
    from genlm_backend.backtracking import ChatPipeline, Generator

HELP = """/help          this list
/reset         begin a new conversation
/save FILE     write the conversation as JSON
/quit          end (also: exit, quit, end of input)
Ctrl-C         stop an answer; what has been said so far stays in the conversation"""

STRATEGIES = ("antislop", "creative", "adaptive_temperature", "human", "debug")


class Asked(NamedTuple):
    """How answers are generated."""

    operator: Any
    rules: list[Any]
    options: dict[str, Any]


Operator = Annotated[
    str, typer.Option(help="Takes tokens back: probability_threshold, ngram_overlap, ..., a class name, or none.")
]
OperatorArgs = Annotated[
    list[str] | None, typer.Option("--operator-arg", help="key=value for the operator; repeatable.", metavar="K=V")
]
Strategy = Annotated[str, typer.Option(help="antislop, creative, adaptive_temperature, human, debug, or none.")]
Bans = Annotated[list[str] | None, typer.Option("--ban", help="A phrase that must not come; repeatable.")]
Verbosity = Annotated[int, typer.Option("-v", count=True, help="Tell each rollback; twice: everything.")]


def command(
    model: Annotated[str, typer.Argument(help="smollm2, a .gguf file, a local folder or a Hugging Face id.")],
    operator: Operator = "none",
    operator_arg: OperatorArgs = None,
    strategy: Strategy = "none",
    ban: Bans = None,
    backtrack_every_n: Annotated[int, typer.Option(min=1, help="The operator looks at every n-th token.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the best token.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Draw among so many best tokens; 0: all.")] = 50,
    stop: Annotated[list[str] | None, typer.Option(help="A string before which an answer ends; repeatable.")] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    seed: Annotated[int | None, typer.Option(help="Equal seeds and inputs give equal answers.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps.", show_default="the best one here")] = None,
    backend: Annotated[str | None, typer.Option(help="hf or mock.", show_default="the best one here")] = None,
    verbose: Verbosity = 0,
) -> None:
    """Talk with MODEL. Tokens that the operator or the strategy objects to are taken back before you see them."""
    log = tell_rollbacks(verbose)
    make = asked_by(operator, operator_arg or [], strategy, ban or [])
    options = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "stop": stop or [],
        "backtrack_every_n": backtrack_every_n,
    }
    generator = load(model, backend, device)
    from genlm_backend.backtracking import ChatPipeline

    asked = make(generator.llm)
    asked.options.update(options)
    pipeline = ChatPipeline(generator)
    pipeline.prompt_ids([{"role": "user", "content": "."}])  # no template: told now, not after the first question
    Conversation(pipeline, asked, system, seed, log).run()


class Conversation:
    """Turns until there are no more.

    Args:
        pipeline: Over the model.
        asked: How answers are generated.
        system: The first message.
        seed: Of the first answer; the next has the next one.
        log: Tells rollbacks between the pieces of answers.
    """

    def __init__(
        self, pipeline: ChatPipeline, asked: Asked, system: str | None, seed: int | None, log: OwnLine
    ) -> None:
        self._pipeline, self._asked, self._seed, self._log = pipeline, asked, seed, log
        self._first = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, str]] = list(self._first)
        self._console = Console()
        self._is_terminal = sys.stdin.isatty()
        self._console.soft_wrap = True

    def run(self) -> None:
        """Read, answer, repeat."""
        if self._is_terminal:
            with suppress(ImportError):  # arrow keys edit the line and bring back earlier ones, where Python has it
                import readline  # noqa: F401
            self._console.print(Text("/help tells what you can type", style="dim"))
        while True:
            try:
                line = input("> " if self._is_terminal else "").strip()
            except (EOFError, KeyboardInterrupt):
                if self._is_terminal:
                    self._console.print()
                return
            if line in ("exit", "quit", "/quit", "/exit"):
                return
            if line.startswith("/"):
                self._do(*line.split(maxsplit=1))
            elif line:
                self._answer(line)

    def _do(self, name: str, argument: str = "") -> None:
        match name:
            case "/help":
                self._console.print(Text(HELP))
            case "/reset":
                self.messages = list(self._first)
                self._console.print(Text("a new conversation", style="dim"))
            case "/save" if argument:
                try:
                    Path(argument).write_text(json.dumps(self.messages, indent=1, ensure_ascii=False) + "\n", "utf-8")
                    self._console.print(Text(f"saved to {argument}", style="dim"))
                except OSError as error:
                    self._console.print(Text(f"{argument} cannot be written: {error.strerror}", style="red"))
            case _:
                self._console.print(Text(f"unknown command {name!r}; /help lists them", style="red"))

    def _answer(self, question: str) -> None:
        self.messages.append({"role": "user", "content": question})
        said: list[str] = []
        try:
            asyncio.run(self._tell(said))
        except KeyboardInterrupt:
            self._console.print(Text(" (stopped)", style="dim"), end="")
        self._console.print()
        self._log.is_mid_line = False
        self.messages.append({"role": "assistant", "content": "".join(said)})

    async def _tell(self, said: list[str]) -> None:
        async for piece in self._pieces():
            said.append(piece)
            self._console.print(Text(piece), end="", soft_wrap=True)
            self._console.file.flush()
            self._log.is_mid_line = self._is_terminal and not piece.endswith("\n")

    async def _pieces(self) -> AsyncIterator[str]:
        options = dict(self._asked.options)
        prompt = self._pipeline.prompt_ids(self.messages)
        if self._seed is not None:
            self._seed += 1
            options["seed"] = self._seed - 1
        generator = self._pipeline.generator
        async with generator.walking(prompt, self._asked.operator, rules=self._asked.rules, **options) as walking:
            async for piece in walking.text():
                yield piece


# ---- shared with `generate`


def load(model: str, backend: str | None, device: str | None) -> Generator:
    """A generator for a model by name, telling what is done meanwhile."""
    llm = load_model(model, backend, Console(stderr=True), device)
    from genlm_backend.backtracking import Generator

    return Generator(llm)


def asked_by(operator: str, operator_args: list[str], strategy: str, bans: list[str]) -> Callable[[Any], Asked]:
    """What makes the operator and the rules for a model; wrong names end the command before a model is loaded."""
    made = operator_by_name(operator, operator_args)
    name = _snake(strategy.removesuffix("Strategy"))
    aliases = {"anti_slop": "antislop", "creative_writing": "creative", "human_guidance": "human"}
    name = aliases.get(name, name)
    if name not in (*STRATEGIES, "none"):
        raise typer.BadParameter(f"{strategy!r}; expected none, {', '.join(STRATEGIES)}", param_hint="--strategy")
    if name == "antislop" and not bans:
        raise typer.BadParameter("antislop needs phrases: --ban 'a rich tapestry'", param_hint="--strategy")

    def make(llm: Any) -> Asked:
        from genlm_backend.backtracking import phrases
        from genlm_backend.backtracking import strategies as ours
        from genlm_backend.backtracking.strategies import rule_of

        rules: list[Any] = [phrases(bans)] if bans else []
        kinds: dict[str, Callable[[], Any]] = {
            "creative": lambda: ours.CreativeWritingStrategy(llm),
            "adaptive_temperature": lambda: ours.AdaptiveTemperatureStrategy(),
            "human": lambda: ours.HumanGuidanceStrategy(llm),
            "debug": lambda: ours.DebugStrategy(llm),
        }
        if name in kinds:
            rules.append(rule_of(kinds[name]()))
        return Asked(made, rules, {})

    return make


def operator_by_name(name: str, arguments: list[str]) -> Any:
    """The operator of a name in snake_case, or of its class; None for `none`."""
    from genlm_backend.backtracking.operators import OPERATORS

    kinds: dict[str, Any] = {**OPERATORS, **{kind.__name__: kind for kind in OPERATORS.values()}}
    if name == "none":
        if arguments:
            raise typer.BadParameter("there is no operator to give them to", param_hint="--operator-arg")
        return None
    if name not in kinds:
        raise typer.BadParameter(f"{name!r}; expected none, {', '.join(OPERATORS)}", param_hint="--operator")
    try:
        return kinds[name](**dict(_read(argument) for argument in arguments))
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--operator-arg") from error


class OwnLine(RichHandler):
    """Tells each record on a line of its own, also in the midst of an answer."""

    is_mid_line = False

    def emit(self, record: logging.LogRecord) -> None:
        """Begin a line where none is begun, and tell the record."""
        if self.is_mid_line:
            self.console.line()
            self.is_mid_line = False
        super().emit(record)


def tell_rollbacks(verbose: int) -> OwnLine:
    """Show this package's log: each rollback, or everything; nothing with 0."""
    handler = OwnLine(console=Console(stderr=True), show_path=False, show_time=False)
    if verbose:
        logger = logging.getLogger("genlm_backend")
        logger.addHandler(handler)
        logger.setLevel(logging.INFO if verbose == 1 else logging.DEBUG)
    return handler


def _read(argument: str) -> tuple[str, Any]:
    key, equals, value = argument.partition("=")
    if not equals:
        raise ValueError(f"{argument!r}; expected key=value")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def _snake(name: str) -> str:
    return "".join(f"_{c.lower()}" if c.isupper() and i else c.lower() for i, c in enumerate(name)).replace("__", "_")
