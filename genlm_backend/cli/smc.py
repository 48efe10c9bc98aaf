"""`genlm-backend smc`: sequential Monte Carlo under a grammar; every particle is a coroutine.

The law is that of the model's own continuations, given that they are texts of the grammar: each particle draws its next
token among those that the grammar allows, and its weight is multiplied by the mass that the model gives to them.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from genlm_backend.cli.loading import check_output, check_text, load, read_text
from genlm_backend.errors import InferenceFailed

if TYPE_CHECKING:
    from genlm_backend.llm.base import AsyncLM
    from genlm_backend.potentials import Potential
    from genlm_backend.smc import Result

_LONGEST_TABLE = 20
_PIPE_WIDTH = 250


def command(
    prompt: Annotated[str, typer.Argument(help="The text to continue.", show_default=False, callback=check_text)],
    schema: Annotated[
        Path | None, typer.Option(help="A file with a JSON Schema.", exists=True, dir_okay=False, show_default=False)
    ] = None,
    regex: Annotated[
        str | None, typer.Option(help="A regular expression.", show_default=False, callback=check_text)
    ] = None,
    lark: Annotated[
        Path | None, typer.Option(help="A file with a Lark grammar.", exists=True, dir_okay=False, show_default=False)
    ] = None,
    particles: Annotated[int, typer.Option(min=1, help="How many particles.")] = 20,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of each text; longer ones count as dead.")] = 40,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal results.")] = 0,
    ess_threshold: Annotated[
        float, typer.Option(min=0, max=1, help="Resample below this share of effective particles; 0 never, 1 always.")
    ] = 0.5,
    resampling: Annotated[
        str, typer.Option(help="systematic, stratified, residual, ssp or multinomial.", metavar="NAME")
    ] = "systematic",
    whitespace: Annotated[
        bool, typer.Option(help="White space between the parts of JSON; small models then write blanks for long.")
    ] = False,
    proposal: Annotated[
        str, typer.Option(help="direct: masks of the grammar; awrs: tokens checked one by one.", metavar="NAME")
    ] = "direct",
    model: Annotated[
        str, typer.Option(help="smollm2, a .gguf file, a local folder or a Hugging Face id.", metavar="NAME")
    ] = "smollm2",
    backend: Annotated[
        str | None,
        typer.Option(help="Engine: hf, vllm or mock (no model, only its tokenizer).", show_default="the best one here"),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a page that replays the run.", dir_okay=False, show_default=False)
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="Write the result as JSON.", dir_okay=False, show_default=False)
    ] = None,
) -> None:
    """Continue PROMPT with weighted particles that keep to a grammar, and estimate the probability of the grammar.

    The probabilities are those of the model's own texts, given that they match: not those of greedy masking.
    The exit code is 1 where the run failed, such as with all particles dead; what was found until then is told.
    """
    if sum(given is not None for given in (schema, regex, lark)) > 1:
        raise typer.BadParameter("give one of --schema, --regex and --lark")
    if proposal not in ("direct", "awrs"):
        raise typer.BadParameter("choose direct or awrs", param_hint="--proposal")
    if proposal == "awrs" and schema is None and regex is None and lark is None:
        raise typer.BadParameter("awrs needs one of --schema, --regex and --lark", param_hint="--proposal")
    check_output(html, "--html")
    check_output(save, "--save")
    progress = Console(stderr=True)
    llm = load(model, backend, progress)
    grammar = _grammar(llm, schema, regex, lark, whitespace)
    started = time.perf_counter()
    options = {"seed": seed, "ess_threshold": ess_threshold, "resampling": resampling}
    result = asyncio.run(_run(llm, prompt, grammar, proposal, max_tokens, particles, options, progress))
    seconds = time.perf_counter() - started
    if html is not None:
        html.write_text(result.html(f"{prompt} …"), encoding="utf-8")
        progress.print(f"wrote {html}", markup=False, highlight=False)
    if save is not None:
        result.save(save)
        progress.print(f"wrote {save}", markup=False, highlight=False)
    _report(result, prompt, model, seconds)
    if result.status == "failed":
        raise typer.Exit(1)


async def _run(
    llm: AsyncLM,
    prompt: str,
    grammar: Potential | None,
    proposal: str,
    max_tokens: int,
    n_particles: int,
    options: dict[str, Any],
    progress: Console,
) -> Result:
    from genlm_backend.potentials import LanguageModel, Product
    from genlm_backend.smc import AWRS, Direct, sequences, smc
    from genlm_backend.smc.live import live_progress

    async with llm:
        language_model = LanguageModel(llm, prompt)
        if grammar is None:
            drawn_by: Any = Direct(language_model)
        elif proposal == "awrs":
            drawn_by = AWRS(language_model, grammar)
        else:
            drawn_by = Direct(Product(language_model, grammar))
        writing = sequences(drawn_by, max_tokens=max_tokens, at_limit="end" if grammar is not None else "cut")
        with live_progress(progress) as on_step:
            try:
                return await smc(writing, n_particles, on_step=on_step, **options)
            except InferenceFailed as error:
                if error.result is None:
                    raise
                result: Result = error.result
                return result


def _grammar(
    llm: AsyncLM, schema: Path | None, regex: str | None, lark: Path | None, whitespace: bool
) -> Potential | None:
    from genlm_backend.potentials import Grammar

    if schema is not None:
        try:
            parsed = json.loads(read_text(schema, "--schema"))
        except ValueError as error:
            raise typer.BadParameter(f"{schema} is not JSON: {error}", param_hint="--schema") from error
        return Grammar.json_schema(llm, parsed, whitespace=whitespace)
    if regex is not None:
        return Grammar.regex(llm, regex)
    if lark is not None:
        return Grammar.lark(llm, read_text(lark, "--lark"))
    return None


def _report(result: Result, prompt: str, model: str, seconds: float) -> None:
    console = Console()
    if not console.is_terminal:
        console.width = _PIPE_WIDTH  # one text, one line, for whatever reads it
    posterior = result.posterior() if result.status == "complete" else {}
    if posterior:
        console.print(_table(result, posterior, prompt, model))
    n_tokens = sum(len(path.choices) for path in result.paths)
    error = result.log_evidence_error
    spread = "" if math.isnan(error) else f" ± {error:.3f}"
    n_alive = sum(weight > -math.inf for weight in result.log_weights)
    for line in (
        result.failure,
        f"log-evidence: {result.log_evidence:.3f}{spread} nats",
        f"effective sample size: {result.ess:.1f} of {result.settings.n_particles}; {n_alive} alive at the end",
        f"{sum(step.ancestors is not None for step in result.steps)} resamplings in {len(result.steps)} steps; "
        f"{n_tokens / seconds:,.0f} tokens/s of surviving texts ({n_tokens} tokens in {seconds:.2f} s)",
    ):
        if line is not None:
            console.print(Text(line), soft_wrap=not console.is_terminal)


def _table(result: Result, posterior: dict[str, float], prompt: str, model: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("probability", justify="right")
    table.add_column("particles", justify="right")
    table.add_column(f"continuation by {model}", overflow="fold")
    for text, probability in list(posterior.items())[:_LONGEST_TABLE]:
        shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
        line = Text(prompt, style="dim").append(shown, style="not dim")
        table.add_row(f"{probability:.3f}", str(result.values.count(text)), line)
    if len(posterior) > _LONGEST_TABLE:
        rest = list(posterior.values())[_LONGEST_TABLE:]
        table.add_row(f"{sum(rest):.3f}", "", f"... {len(rest)} others")
    return table
