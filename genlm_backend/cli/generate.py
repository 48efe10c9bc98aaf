"""`genlm-backend generate`: continues one prompt, or a file of them together, one line of JSON each."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from genlm_backend.cli.chat import (
    Asked,
    Bans,
    Operator,
    OperatorArgs,
    Replacements,
    Stops,
    Strategy,
    Verbosity,
    asked_by,
    load,
    tell_rollbacks,
    write,
)
from genlm_backend.cli.loading import check_output, check_text, read_text
from genlm_backend.errors import GenlmError

if TYPE_CHECKING:
    from genlm_backend.backtracking import Generator, Outcome


def command(
    model: Annotated[str, typer.Argument(help="smollm2, a .gguf file, a local folder or a Hugging Face id.")],
    prompt: Annotated[
        str | None, typer.Argument(help="The text to continue; - reads it from the input.", callback=check_text)
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(help="Prompts instead, a line each: text, or JSON with `prompt`.", exists=True, dir_okay=False),
    ] = None,
    operator: Operator = "none",
    operator_arg: OperatorArgs = None,
    strategy: Strategy = "none",
    ban: Bans = None,
    replace: Replacements = None,
    mode: Annotated[str, typer.Option(help="What is sampled: local, exact, first, mask or none.")] = "local",
    backtrack_every_n: Annotated[int, typer.Option(min=1, help="The operator looks at every n-th token.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=0, help="Most tokens of a text.")] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the best token.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Draw among so many best tokens; 0: all.")] = 50,
    stop: Stops = None,
    seed: Annotated[int | None, typer.Option(help="Equal seeds give equal texts.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps.", show_default="the best one here")] = None,
    backend: Annotated[str | None, typer.Option(help="hf, vllm or mock.", show_default="the best one here")] = None,
    trace: Annotated[Path | None, typer.Option(help="Write a page of what happened (one prompt).")] = None,
    verbose: Verbosity = 0,
) -> None:
    """Continue PROMPT, or every prompt of a file; all of a file run together, in as few forward passes as they need.

    One prompt gives its text. A file gives lines of JSON, in the order of its prompts: prompt, text, reason, tokens,
    drawn, rollbacks; or prompt and error, for each that has no text. Where there is one of these, the exit code is 2.
    """
    if (prompt is None) == (file is None):
        raise typer.BadParameter("give a prompt, or --file with prompts")
    if file is not None and trace is not None:
        raise typer.BadParameter("a page is of one prompt; leave this or --file out", param_hint="--trace")
    from genlm_backend.backtracking.walk import MODES

    if mode not in MODES:
        raise typer.BadParameter(f"{mode!r}; expected {', '.join(MODES)}", param_hint="--mode")
    check_output(trace, "--trace")
    tell_rollbacks(verbose)
    make = asked_by(operator, operator_arg or [], strategy, ban or [], replace or [])
    prompts = _prompts(file) if file is not None else [_input() if prompt == "-" else prompt or ""]
    generator = load(model, backend, device)
    asked = make(generator.llm)
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "stop_sequences": stop or [],
        "backtrack_every_n": backtrack_every_n,
        "mode": mode,
        "seed": seed,
    }
    with _progress(len(prompts), shows=file is not None) as advance:
        outcomes = asyncio.run(_all(generator, prompts, asked, options, advance))
    if file is not None:
        _tell_all(prompts, outcomes)
        return
    [outcome] = outcomes
    if isinstance(outcome, GenlmError):
        raise outcome
    _tell(outcome)
    if trace is not None:
        from genlm_backend.backtracking.trace import Trace

        Trace.of(generator.llm, outcome, prompts[0], prompts[0]).save(trace)


async def _all(
    generator: Generator, prompts: list[str], asked: Asked, options: dict[str, Any], advance: Callable[[], None]
) -> list[Outcome | GenlmError]:
    """What each prompt came to; the error of one ends no other."""

    async def one(i: int, prompt: str) -> Outcome | GenlmError:
        try:
            return await generator.arun(prompt, asked.operator, rules=asked.rules, lineage=(i,), **options)
        except GenlmError as error:
            return error
        finally:
            advance()

    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(one(i, prompt)) for i, prompt in enumerate(prompts)]
    return [task.result() for task in running]


def _input() -> str:
    try:
        text: str = check_text(sys.stdin.read())
    except typer.BadParameter as error:
        error.param_hint = "PROMPT"
        raise
    return text


def _prompts(file: Path) -> list[str]:
    prompts = []
    # Only a line feed ends a line: JSON may have U+2028, U+0085 and others that end one for `splitlines`.
    for number, line in enumerate(read_text(file, "--file").split("\n"), 1):
        if not line.strip():
            continue
        if not line.lstrip().startswith("{"):
            prompts.append(line)
            continue
        try:
            prompt = json.loads(line)["prompt"]
            prompt.encode()
        except (ValueError, KeyError, AttributeError) as error:
            raise typer.BadParameter(f"line {number} is no JSON with `prompt`, a text", param_hint="--file") from error
        prompts.append(prompt)
    if not prompts:
        raise typer.BadParameter(f"{file} has no prompt", param_hint="--file")
    return prompts


def _tell_all(prompts: Sequence[str], outcomes: Sequence[Outcome | GenlmError]) -> None:
    for prompt, outcome in zip(prompts, outcomes, strict=True):
        write(json.dumps(_line(prompt, outcome), ensure_ascii=False) + "\n")
    n_failed = sum(isinstance(outcome, GenlmError) for outcome in outcomes)
    if n_failed:
        told = f"error: {n_failed} of {len(prompts)} prompts have no text; their lines say why"
        Console(stderr=True).print(Text(told, style="red"), soft_wrap=True)
        raise typer.Exit(2)


def _line(prompt: str, outcome: Outcome | GenlmError) -> dict[str, Any]:
    if isinstance(outcome, GenlmError):
        return {"prompt": prompt, "error": str(outcome)}
    return {
        "prompt": prompt,
        "text": outcome.text,
        "reason": outcome.reason,
        "tokens": len(outcome.token_ids),
        "drawn": outcome.n_draws,
        "rollbacks": outcome.n_undos,
    }


def _tell(outcome: Outcome) -> None:
    write(outcome.text + "\n")
    Console(stderr=True).print(
        Text(
            f"{len(outcome.token_ids)} tokens, {outcome.n_draws} drawn, {outcome.n_undos} rollbacks, "
            f"{outcome.forwards_per_token:.2f} prefixes computed per token; ended by {outcome.reason}",
            style="dim",
        ),
        soft_wrap=True,
    )


@contextmanager
def _progress(n: int, *, shows: bool) -> Iterator[Callable[[], None]]:
    console = Console(stderr=True)
    columns = (TextColumn("texts"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not (shows and console.is_terminal)) as progress:
        task = progress.add_task("texts", total=n)
        yield lambda: progress.advance(task)
