"""`genlm-backend chat`: a conversation in the terminal, under an operator or a strategy that may take tokens back."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.text import Text

from genlm_backend.cli.loading import check_text, tell_error
from genlm_backend.cli.loading import load as load_model
from genlm_backend.errors import GenlmError

if TYPE_CHECKING:
    from genlm_backend.backtracking import ChatPipeline, Generator

HELP = """/help          this list
/reset         begin a new conversation
/save FILE     write the conversation as JSON
/quit          end (also: exit, quit, end of input)
Ctrl-C         stop an answer; what has been said so far stays in the conversation
               at the prompt: discard the line; twice in a row on an empty line: end"""

STRATEGIES = ("antislop", "replace", "creative", "adaptive_temperature", "human", "debug")
_ALIASES = {"anti_slop": "antislop", "creative_writing": "creative", "human_guidance": "human"}
# Control characters but for tab and line feed, and what reverses the direction of the text around it.
_ACTS_ON_TERMINALS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


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
Strategy = Annotated[
    str,
    typer.Option(
        help="antislop (with --ban), replace (with --replace), creative, adaptive_temperature, human, debug, or none; "
        "chain:A,B,... is several, of which the first in the list acts where several object to one token."
    ),
]
Bans = Annotated[
    list[str] | None, typer.Option("--ban", help="A phrase that must not come; repeatable.", callback=check_text)
]
Replacements = Annotated[
    list[str] | None,
    typer.Option(
        "--replace",
        help="Write TEXT where FIND comes; TEXT may be a JSON string; repeatable, the first goes first.",
        metavar="FIND=TEXT",
        callback=check_text,
    ),
]
Stops = Annotated[
    list[str] | None, typer.Option(help="A string before which a text ends; repeatable.", callback=check_text)
]
Verbosity = Annotated[
    int, typer.Option("-v", count=True, help="Tell each rollback; twice: also what each text came to.")
]


def command(
    model: Annotated[str, typer.Argument(help="smollm2, a .gguf file, a local folder or a Hugging Face id.")],
    operator: Operator = "none",
    operator_arg: OperatorArgs = None,
    strategy: Strategy = "none",
    ban: Bans = None,
    replace: Replacements = None,
    backtrack_every_n: Annotated[int, typer.Option(min=1, help="The operator looks at every n-th token.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the best token.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Draw among so many best tokens; 0: all.")] = 50,
    stop: Stops = None,
    system: Annotated[str | None, typer.Option(help="What the model is told first.", callback=check_text)] = None,
    seed: Annotated[int | None, typer.Option(help="Equal seeds and inputs give equal answers.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps.", show_default="the best one here")] = None,
    backend: Annotated[str | None, typer.Option(help="hf, vllm or mock.", show_default="the best one here")] = None,
    verbose: Verbosity = 0,
) -> None:
    """Talk with MODEL. Tokens that the operator or the strategy objects to are taken back before you see them.

    Lines from a pipe are answered one after the other; where one could not be, the exit code is 2.
    """
    log = tell_rollbacks(verbose)
    make = asked_by(operator, operator_arg or [], strategy, ban or [], replace or [])
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
    conversation = Conversation(pipeline, asked, system, seed, log)
    # What the model's template refuses is told now, not after the first question.
    pipeline.prompt_ids([*conversation.messages, {"role": "user", "content": "."}])
    conversation.run()
    if conversation.n_failed and not sys.stdin.isatty():
        raise typer.Exit(2)


class Conversation:
    """Turns until there are no more.

    Args:
        pipeline: Over the model.
        asked: How answers are generated.
        system: The first message.
        seed: Of the first answer; the next has the next one.
        log: Tells rollbacks between the pieces of answers.

    Attributes:
        messages: What was said; a question that was refused is not there.
        n_failed: How many questions have no answer, or only a part of one, because of an error.
    """

    def __init__(
        self, pipeline: ChatPipeline, asked: Asked, system: str | None, seed: int | None, log: OwnLine
    ) -> None:
        self._pipeline, self._asked, self._seed, self._log = pipeline, asked, seed, log
        self._first = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, str]] = list(self._first)
        self._console = Console()
        self._is_terminal = sys.stdin.isatty()
        self.n_failed = 0
        self._console.soft_wrap = True

    def run(self) -> None:
        """Read, answer, repeat.

        Raises:
            KeyboardInterrupt: Interrupted while it waits for a line that is not typed in a terminal.
        """
        if self._is_terminal:
            with suppress(ImportError):  # arrow keys edit the line and bring back earlier ones, where Python has it
                import readline  # noqa: F401
            self._console.print(Text("/help tells what you can type", style="dim"))
        is_warned = False
        while True:
            try:
                if not self._turn():
                    return
                is_warned = False
            except KeyboardInterrupt:  # at the prompt, or just after an answer: one alone must not lose what was said
                if not self._is_terminal:
                    raise
                self._console.print()
                is_empty = not _typed()
                if is_warned and is_empty:
                    return
                is_warned = is_empty
                if is_empty:
                    self._console.print(Text("Ctrl-C once more, or /quit, ends the conversation", style="dim"))

    def _turn(self) -> bool:
        """Read a line and do what it says; whether there may be another."""
        try:
            line = input("> " if self._is_terminal else "").strip()
        except EOFError:
            if self._is_terminal:
                self._console.print()
            return False
        if line in ("exit", "quit", "/quit", "/exit"):
            return False
        if line.startswith("/"):
            self._do(*line.split(maxsplit=1))
        elif line:
            try:
                self._answer(check_text(line))
            except typer.BadParameter as error:
                self._refuse(error.message)
                self.n_failed += 1
        return True

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
                    self._refuse(f"{argument} cannot be written: {error.strerror}")
            case "/save":
                self._refuse("name a file: /save FILE")
            case _:
                self._refuse(f"unknown command {name!r}; /help lists them")

    def _refuse(self, why: str) -> None:
        self._console.print(Text(why, style="red"))

    def _answer(self, question: str) -> None:
        self.messages.append({"role": "user", "content": question})
        said: list[str] = []
        failure: GenlmError | None = None
        try:
            try:
                asyncio.run(self._tell(said))
            except KeyboardInterrupt:
                self._console.print(Text(" (stopped)", style="dim"), end="")
            except GenlmError as error:
                failure = error
            if said or failure is None:
                write("\n")
        finally:
            self._log.is_mid_line = False
            if said or failure is None:
                self.messages.append({"role": "assistant", "content": "".join(said)})
            else:
                self.messages.pop()  # as if it had not been asked: a shorter one may do, and all else goes on
        if failure is not None:
            self.n_failed += 1
            tell_error(failure)

    async def _tell(self, said: list[str]) -> None:
        async for piece in self._pieces():
            said.append(piece)
            write(piece)
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


def write(text: str) -> None:
    """Write what a model wrote: as it is, but in a terminal with escapes in place of what would act on it."""
    if sys.stdout.isatty():
        text = _ACTS_ON_TERMINALS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    sys.stdout.write(text)
    sys.stdout.flush()


def asked_by(
    operator: str, operator_args: list[str], strategy: str, bans: list[str], replacements: list[str]
) -> Callable[[Any], Asked]:
    """What makes the operator and the rules for a model; wrong names end the command before a model is loaded."""
    made = operator_by_name(operator, operator_args)
    names = _strategy_names(strategy)
    pairs = [_replacement(text) for text in replacements]
    if "antislop" in names and not bans:
        raise typer.BadParameter("antislop needs phrases: --ban 'a rich tapestry'", param_hint="--strategy")
    if "replace" in names and not pairs:
        raise typer.BadParameter("replace needs what to write: --replace 'So=But'", param_hint="--strategy")

    def make(llm: Any) -> Asked:
        from genlm_backend.backtracking import strategies as ours

        kinds: dict[str, Callable[[], list[ours.BaseStrategy]]] = {
            "antislop": lambda: [ours.AntiSlopStrategy(llm, bans)],
            "replace": lambda: [ours.ReplaceStrategy(llm, find, text) for find, text in pairs],
            "creative": lambda: [ours.CreativeWritingStrategy(llm)],
            "adaptive_temperature": lambda: [ours.AdaptiveTemperatureStrategy()],
            "human": lambda: [ours.HumanGuidanceStrategy(llm)],
            "debug": lambda: [ours.DebugStrategy(llm)],
        }
        beside = [name for name, given in (("antislop", bans), ("replace", pairs)) if given and name not in names]
        rules = [ours.rule_of(member) for name in beside for member in kinds[name]()]
        members = [member for name in names for member in kinds[name]()]
        if members:
            rules.append(ours.rule_of(members[0] if len(members) == 1 else ours.ChainStrategy(members)))
        return Asked(made, rules, {})

    return make


def _strategy_names(text: str) -> list[str]:
    """Of `none`, of a strategy, of the members of `chain:A,B,...`."""
    if text == "none":
        return []
    kind, _, members = text.partition(":")
    if _strategy_name(kind) == "chain":
        names = [_strategy_name(member) for member in members.split(",") if member]
        if not names:
            raise typer.BadParameter("chain needs its members: chain:replace,antislop", param_hint="--strategy")
    else:
        names = [_strategy_name(text)]
    for name in names:
        if name not in STRATEGIES:
            expected = ", ".join(STRATEGIES)
            raise typer.BadParameter(f"{name!r}; expected none, {expected}, or chain:A,B,...", param_hint="--strategy")
    return names


def _strategy_name(text: str) -> str:
    name = _snake(text.strip().removesuffix("Strategy"))
    return _ALIASES.get(name, name)


def _replacement(text: str) -> tuple[str, str]:
    find, equals, written = text.partition("=")
    if not (equals and find):
        raise typer.BadParameter(f"{text!r}; expected FIND=TEXT", param_hint="--replace")
    try:
        known = json.loads(written)
    except json.JSONDecodeError:
        known = None
    return find, known if isinstance(known, str) else written


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


def _typed() -> str:
    """What stands on the line that was interrupted, where Python has readline; without it, nothing is known."""
    try:
        import readline
    except ImportError:
        return ""
    return readline.get_line_buffer()


def _snake(name: str) -> str:
    return "".join(f"_{c.lower()}" if c.isupper() and i else c.lower() for i, c in enumerate(name)).replace("__", "_")
