"""`genlm-backend sis`: sequential importance sampling; each particle is a coroutine, the backend batches them.

The target is the model kept to a set A of tokens (printable text, or the end). A particle draws its next token from
the model restricted to A, q(x) = p(x)^(1/T) 1[x in A] / Z, and multiplies its weight by p(x) / q(x); at T = 1 that is
p(A), the mass the model gives to A. The mean weight is an unbiased estimate of the probability that the model itself
would have stayed in A at every step: its logarithm is the log-evidence told at the end.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from genlm_backend.cli.loading import check_text, load
from genlm_backend.errors import NoTokenAllowed

if TYPE_CHECKING:  # torch takes seconds to import, and --help needs none of it
    import torch

    from genlm_backend.llm.base import AsyncLM

_REFRESH_S = 0.1
_LONGEST_TABLE = 20
_PIPE_WIDTH = 250


class Settings(NamedTuple):
    """What to sample."""

    prompt: str
    n_particles: int
    max_tokens: int
    seed: int
    temperature: float


@dataclass
class Particle:
    """One continuation and its weight.

    Attributes:
        index: Which one; with the seed it fixes every draw, whatever else runs.
        token_ids: What it has drawn, an end token included.
        log_weight: log of p / q of all it has drawn, nats; -inf when no token was left to draw.
        is_done: It has drawn an end token, or all it may, or has died.
    """

    index: int
    token_ids: list[int] = field(default_factory=list)
    log_weight: float = 0.0
    is_done: bool = False


class Continuation(NamedTuple):
    """One distinct text, with the share of the total weight and the number of particles that wrote it."""

    text: str
    probability: float
    n_particles: int


class Estimate(NamedTuple):
    """What weighted particles say.

    Attributes:
        log_evidence: log of the mean weight, nats.
        standard_error: Of `log_evidence`, from the spread of the weights (delta method).
        ess: Effective sample size, (sum w)^2 / sum w^2.
    """

    log_evidence: float
    standard_error: float
    ess: float


def command(
    prompt: Annotated[str, typer.Argument(help="The text to continue.", show_default=False, callback=check_text)],
    particles: Annotated[int, typer.Option(min=1, help="How many particles.")] = 10,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of each continuation.")] = 10,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal continuations.")] = 0,
    model: Annotated[
        str, typer.Option(help="smollm2, a .gguf file, a local folder or a Hugging Face id.", metavar="NAME")
    ] = "smollm2",
    backend: Annotated[
        str | None,
        typer.Option(help="Engine: hf, vllm or mock (no model, only its tokenizer).", show_default="the best one here"),
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="Of the proposal. The estimates stay those of the model; only their spread changes.")
    ] = 1.0,
) -> None:
    """Continue PROMPT with weighted particles, and estimate how likely the model keeps to printable text.

    Every particle is a coroutine that only awaits its next token. Whatever waits at the same time becomes one forward
    pass, and a prefix that several particles share is computed once.
    """
    if not (0 < temperature < math.inf):
        raise typer.BadParameter("a proposal needs a temperature above 0", param_hint="--temperature")
    settings = Settings(prompt, particles, max_tokens, seed, temperature)
    progress = Console(stderr=True)
    llm = load(model, backend, progress)
    asyncio.run(_run_and_report(llm, settings, model, progress))


async def sample(
    llm: AsyncLM, settings: Settings, on_step: Callable[[list[Particle]], None] = lambda _: None
) -> list[Particle]:
    """Weighted particles, all extended at once.

    Args:
        llm: The model to continue with.
        settings: What to sample.
        on_step: Called whenever a particle has drawn a token, with all of them.

    Raises:
        GenlmError: What the model raises for the prompt.
    """
    prompt_ids = llm.tokenizer.encode(settings.prompt)
    ends = end_tokens(llm)
    allowed = allowed_tokens(llm, ends)
    particles = [Particle(i) for i in range(settings.n_particles)]

    async def run(particle: Particle) -> None:
        while not particle.is_done:
            await extend(llm, particle, prompt_ids, allowed, ends, settings)
            on_step(particles)

    try:
        async with asyncio.TaskGroup() as tasks:
            for particle in particles:
                tasks.create_task(run(particle))
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None  # one prompt, one cause
    return particles


async def extend(
    llm: AsyncLM,
    particle: Particle,
    prompt_ids: Sequence[int],
    allowed: torch.Tensor,
    ends: frozenset[int],
    settings: Settings,
) -> None:
    """Draw one token for a particle and weigh it; the only place that awaits the model."""
    from genlm_backend.llm.queries import Draw, Drawn
    from genlm_backend.sampling import draw_key

    key = draw_key(settings.seed, (particle.index,), len(particle.token_ids))
    try:
        drawn: Drawn = await llm.query([*prompt_ids, *particle.token_ids], Draw(key, settings.temperature, allowed))
    except NoTokenAllowed:
        particle.log_weight, particle.is_done = -math.inf, True
        return
    particle.token_ids.append(drawn.token_id)
    particle.log_weight += drawn.logprob - drawn.log_q
    particle.is_done = drawn.token_id in ends or len(particle.token_ids) == settings.max_tokens


def end_tokens(llm: AsyncLM) -> frozenset[int]:
    """The tokens that end a continuation."""
    eos = llm.tokenizer.eos_token_id
    return frozenset() if eos is None else frozenset([eos])


def allowed_tokens(llm: AsyncLM, ends: frozenset[int]) -> torch.Tensor:
    """(vocab,) bool: tokens of printable text (no line break or other control character), and those that end it."""
    import torch

    allowed = [
        i in ends or (not token.is_special and len(token) > 0 and min(token) >= 0x20 and 0x7F not in token)
        for i, token in enumerate(llm.byte_vocab)
    ]
    return torch.tensor(allowed)


def estimate(log_weights: Sequence[float]) -> Estimate:
    """Log-evidence, its standard error and the effective sample size of unnormalised log-weights."""
    n, top = len(log_weights), max(log_weights)
    if top == -math.inf:
        return Estimate(-math.inf, math.nan, 0.0)
    weights = [math.exp(w - top) for w in log_weights]
    total = sum(weights)
    ess = total**2 / sum(w * w for w in weights)
    return Estimate(top + math.log(total / n), math.sqrt(max(1 / ess - 1 / n, 0.0)), ess)


def continuations(llm: AsyncLM, particles: Sequence[Particle], ends: frozenset[int]) -> list[Continuation]:
    """Distinct continuations, most probable first; particles without weight are left out."""
    top = max(particle.log_weight for particle in particles)
    weights: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for particle in particles:
        if particle.log_weight > -math.inf:
            text = written(llm, particle.token_ids, ends)
            weights[text] += math.exp(particle.log_weight - top)
            counts[text] += 1
    total = sum(weights.values())
    found = [Continuation(text, weight / total, counts[text]) for text, weight in weights.items()]
    return sorted(found, key=lambda c: -c.probability)


def written(llm: AsyncLM, token_ids: Sequence[int], ends: frozenset[int]) -> str:
    """The text of drawn tokens, safe to show in a terminal; an end is shown as such."""
    text = b"".join(bytes(llm.byte_vocab[i]) for i in token_ids if i not in ends).decode("utf-8", "replace")
    # U+0085 or a bidirectional override would act on the terminal, although its bytes are not ASCII control characters.
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return shown + (" <end>" if token_ids and token_ids[-1] in ends else "")


async def _run_and_report(llm: AsyncLM, settings: Settings, model: str, progress: Console) -> None:
    async with llm:
        ends = end_tokens(llm)
        before, started = llm.statistics(), time.perf_counter()
        with _live(llm, settings, progress, ends) as on_step:
            particles = await sample(llm, settings, on_step)
        seconds = time.perf_counter() - started
        after = llm.statistics()
    n_tokens = sum(len(particle.token_ids) for particle in particles)
    lines = [
        *_evidence_lines(estimate([p.log_weight for p in particles]), settings),
        f"speed: {n_tokens / seconds:,.0f} tokens/s ({n_tokens} tokens in {seconds:.2f} s), "
        f"{after.forwards - before.forwards} forwards, "
        f"{after.tokens_computed - before.tokens_computed} tokens computed",
    ]
    found = continuations(llm, particles, ends)
    _report(found, lines, settings, model)


def _evidence_lines(result: Estimate, settings: Settings) -> list[str]:
    if result.ess == 0:
        return ["log-evidence: -inf; no particle found a token it may draw"]
    return [
        f"log-evidence: {result.log_evidence:.3f} ± {result.standard_error:.3f} nats: with probability "
        f"{math.exp(result.log_evidence):.3f} the model's own next {settings.max_tokens} tokens "
        "(or fewer, if it ends) are printable text without a line break",
        f"effective sample size: {result.ess:.1f} of {settings.n_particles}",
    ]


def _report(found: list[Continuation], lines: list[str], settings: Settings, model: str) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("probability", justify="right")
    table.add_column("particles", justify="right")
    table.add_column(f"continuation by {model}", overflow="fold")
    for row in found[:_LONGEST_TABLE]:
        text = Text(settings.prompt, style="dim").append(row.text, style="not dim")
        table.add_row(f"{row.probability:.3f}", str(row.n_particles), text)
    if len(found) > _LONGEST_TABLE:
        rest = found[_LONGEST_TABLE:]
        share = sum(row.probability for row in rest)
        table.add_row(f"{share:.3f}", str(sum(row.n_particles for row in rest)), f"... {len(rest)} others")
    console = Console()
    if not console.is_terminal:
        console.width = _PIPE_WIDTH  # one continuation, one line, for whatever reads it
    if found:
        console.print(table)
    for line in lines:
        console.print(Text(line), soft_wrap=not console.is_terminal)


@contextmanager
def _live(
    llm: AsyncLM, settings: Settings, console: Console, ends: frozenset[int]
) -> Iterator[Callable[[list[Particle]], None]]:
    """Shows the particles as they grow, in a terminal only; it leaves nothing behind."""
    if not console.is_terminal:
        yield lambda _: None
        return
    with Live(console=console, auto_refresh=False, transient=True) as live:
        next_s = 0.0  # drawing takes milliseconds, and the particles wait meanwhile

        def draw(particles: list[Particle]) -> None:
            if live.is_started:
                live.update(_picture(llm, settings, particles, console, ends), refresh=True)

        def show(particles: list[Particle]) -> None:
            nonlocal next_s
            if time.perf_counter() >= next_s:
                next_s = time.perf_counter() + _REFRESH_S
                asyncio.get_running_loop().call_soon(draw, particles)  # after all that were answered together

        draw([Particle(i) for i in range(settings.n_particles)])
        yield show


def _picture(
    llm: AsyncLM, settings: Settings, particles: list[Particle], console: Console, ends: frozenset[int]
) -> Group:
    n_shown = max(1, min(len(particles), console.height - 4))
    rows = []
    for particle in particles[:n_shown]:
        text = Text(settings.prompt, style="dim").append(written(llm, particle.token_ids, ends), style="not dim")
        if text.cell_len > console.width - 12:
            text = Text("...").append(text[-(console.width - 15) :])
        rows.append(Text(f"{particle.log_weight:9.3f}  ", style="cyan").append(text))
    n_drawn = sum(len(particle.token_ids) for particle in particles)
    n_done = sum(particle.is_done for particle in particles)
    more = f", {len(particles) - n_shown} more not shown" if n_shown < len(particles) else ""
    head = f"log-weight   {n_drawn} tokens drawn, {n_done} of {len(particles)} particles done{more}"
    return Group(Text(head, style="bold"), *rows)
