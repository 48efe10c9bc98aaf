"""`genlm-backend trie`: what byte the model writes next, in the terminal and as a picture of the trie."""

from __future__ import annotations

import asyncio
import math
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from genlm_backend.cli.loading import check_output, check_text, load

if TYPE_CHECKING:  # torch takes seconds to import, and --help needs none of it
    from collections.abc import Sequence

    import torch

    from genlm_backend.tokenization import Token
    from genlm_backend.trie import TokenCharacterTrie

_BAR_WIDTH = 24
_PIPE_WIDTH = 160
_NO_BYTE = 256
_N_TOKENS = 4  # examples in a row of the table
_TEXT_SUFFIXES = (".gv", ".dot")  # pictures as text, which need no Graphviz


class NextByte(NamedTuple):
    """One row of the table.

    Attributes:
        byte: What comes next; None for tokens that end before one, or are no text.
        probability: Of all tokens that go on so.
        token_ids: The most probable of them, most probable first.
    """

    byte: int | None
    probability: float
    token_ids: list[int]


def command(
    prompt: Annotated[str, typer.Argument(help="The text to continue.", show_default=False, callback=check_text)],
    model: Annotated[
        str, typer.Option(help="smollm2, a .gguf file, a local folder or a Hugging Face id.", metavar="NAME")
    ] = "smollm2",
    backend: Annotated[
        str | None,
        typer.Option(help="Engine: hf, vllm or mock (no model, only its tokenizer).", show_default="the best one here"),
    ] = None,
    begun: Annotated[
        str,
        typer.Option(
            help="What of the next token is already written: only tokens that start so count.",
            metavar="TEXT",
            callback=check_text,
        ),
    ] = "",
    top: Annotated[int, typer.Option(min=1, help="How many next bytes to show.")] = 12,
    picture: Annotated[
        Path | None,
        typer.Option(help="Draw the trie of continuations: .svg, .png, .pdf, or .gv for its source.", metavar="FILE"),
    ] = None,
    depth: Annotated[int, typer.Option(min=1, help="Bytes from left to right in the picture.")] = 4,
    children: Annotated[int, typer.Option(min=1, help="Most branches of each node in the picture.")] = 3,
) -> None:
    """Show the probability of each next byte after PROMPT.

    Each is the sum over all tokens that go on so, given the tokens of the prompt as its tokenizer splits it.
    """
    check_output(picture, "--picture")
    _check_format(picture)
    progress = Console(stderr=True)
    llm = load(model, backend, progress)

    async def ask() -> torch.Tensor:
        async with llm:
            return await llm.next_token_logprobs(llm.tokenizer.encode(prompt))

    row = asyncio.run(ask())
    from genlm_backend.trie import TokenCharacterTrie

    trie = TokenCharacterTrie(llm.byte_vocab)
    prefix = begun.encode()
    rows = next_bytes(trie, llm.byte_vocab, row, prefix)
    if not rows:
        raise typer.BadParameter("no token of this model starts so", param_hint="--begun")
    _report(prompt + begun, model, rows, top, llm.byte_vocab)
    if picture is not None:
        _draw(trie, llm.byte_vocab, row, prefix, picture, depth, children)
        progress.print(Text(f"wrote {picture}"))


def _check_format(picture: Path | None) -> None:
    """Refuse a picture whose name ends in nothing that Graphviz draws here: a graph of one node shows it.

    Raises:
        typer.BadParameter: It does.
        BackendUnavailable: No Graphviz is installed.
    """
    if picture is None or picture.suffix in _TEXT_SUFFIXES:
        return
    from genlm_backend.trie.drawing import TrieGraph

    graph = TrieGraph()
    graph.node("a")
    try:
        graph.pipe(format=_format(picture))
    except (ValueError, subprocess.CalledProcessError) as error:
        what = f"Graphviz draws no {_format(picture)!r} here; name a file that ends in .svg, .png, .pdf or .gv"
        raise typer.BadParameter(what, param_hint="--picture") from error


def _format(picture: Path) -> str:
    return picture.suffix[1:] or "svg"


def next_bytes(
    trie: TokenCharacterTrie, byte_vocab: Sequence[Token], row: torch.Tensor, prefix: bytes = b""
) -> list[NextByte]:
    """Every possible next byte, most probable first; their probabilities, given the prefix, sum to 1.

    Args:
        trie: Of the vocabulary.
        byte_vocab: The vocabulary.
        row: (vocab,) log-probabilities of the next token.
        prefix: Bytes of that token which are already there.
    """
    import torch

    from genlm_backend.trie import NextByteTokens

    masses = NextByteTokens(trie, prefix).log_masses(row.double())
    no_byte = torch.logaddexp(masses.log_ends, masses.log_no_text)
    probabilities = torch.cat([masses.log_masses, no_byte[None]]).softmax(0).tolist()
    examples: dict[int, list[int]] = {}
    for token_id in row.argsort(descending=True, stable=True).tolist():
        token = byte_vocab[token_id]
        if (prefix and token.is_special) or not token.startswith(prefix):
            continue
        byte = _NO_BYTE if token.is_special or len(token) == len(prefix) else token[len(prefix)]
        of_byte = examples.setdefault(byte, [])
        if len(of_byte) < _N_TOKENS:
            of_byte.append(token_id)
    rows = [
        NextByte(None if byte == _NO_BYTE else byte, probability, examples[byte])
        for byte, probability in enumerate(probabilities)
        if probability > 0
    ]
    return sorted(rows, key=lambda row: -row.probability)


def _report(prompt: str, model: str, rows: list[NextByte], top: int, byte_vocab: Sequence[Token]) -> None:
    from genlm_backend.trie.drawing import readable

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("probability", justify="right")
    table.add_column("")
    table.add_column(f"next byte by {model}")
    table.add_column("most probable tokens", overflow="fold")
    for row in rows[:top]:
        bar = "█" * max(1, round(_BAR_WIDTH * row.probability)) if row.probability >= 0.5 / _BAR_WIDTH else "▏"
        byte = "none" if row.byte is None else readable([row.byte])
        tokens = "  ".join(readable(byte_vocab[i]) or "(empty)" for i in row.token_ids)
        table.add_row(f"{row.probability:.4f}", Text(bar, style="cyan"), Text(byte, style="bold"), Text(tokens))
    if len(rows) > top:
        rest = sum(row.probability for row in rows[top:])
        table.add_row(f"{rest:.4f}", "", Text(f"{len(rows) - top} others", style="dim"), "")
    entropy = -sum(row.probability * math.log2(row.probability) for row in rows)
    console = Console()
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    console.print(table)
    line = f"after {prompt!r}: {len(rows)} possible next bytes, entropy {entropy:.2f} bits"
    console.print(Text(line), soft_wrap=not console.is_terminal)


def _draw(
    trie: TokenCharacterTrie,
    byte_vocab: Sequence[Token],
    row: torch.Tensor,
    prefix: bytes,
    path: Path,
    depth: int,
    n_children: int,
) -> None:
    import torch

    probabilities = row.double().exp()
    probabilities[torch.tensor([token.is_special for token in byte_vocab])] = 0.0  # a name, not a text
    graph = trie.visualize(trie.mass_sum(probabilities), prefix=prefix, depth=depth, n_children=n_children)
    if path.suffix in _TEXT_SUFFIXES:
        path.write_text(graph.source, encoding="utf-8")
    else:
        picture = graph.pipe(format=_format(path))
        assert isinstance(picture, bytes)
        path.write_bytes(picture)
