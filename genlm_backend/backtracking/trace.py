"""Trace: what happened in a walk, as spans of text; coloured in a terminal, a page of HTML, inline in a notebook.

    outcome = await walk(...)
    rich.print(Trace.of(llm, outcome))            # kept, retracted, written by a rule, healed
    Trace.of(llm, outcome).save("walk.html")      # one file, nothing else needed

Colours: kept text is plain; what was taken back is red and struck out, where it stood; what a rule wrote is blue, the
part of it that rewrites what was there before is orange.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from genlm_backend.backtracking.events import End, Event, Forced, Outcome, Retract, Token
from genlm_backend.llm.base import AsyncLM

KINDS = ("kept", "retracted", "forced", "healed")
_STYLES = {"kept": "", "retracted": "red strike", "forced": "blue", "healed": "dark_orange"}


class Piece(NamedTuple):
    """The text of one token, or part of it.

    Attributes:
        text: Bytes of it.
        kind: One of `KINDS`.
        note: More, for a reader who asks: its probability, why it went.
    """

    text: bytes
    kind: str
    note: str


class Span(NamedTuple):
    """Pieces of one kind together, as text."""

    text: str
    kind: str
    note: str


class Trace:
    """What happened in a walk.

    Args:
        prompt: The text before.
        pieces: In the order in which they were written.
        title: What to call it.
        summary: One line below.
    """

    def __init__(self, prompt: str, pieces: Sequence[Piece], title: str = "walk", summary: str = "") -> None:
        self.prompt, self.pieces, self.title, self.summary = prompt, list(pieces), title, summary

    @classmethod
    def of(cls, llm: AsyncLM, outcome: Outcome, prompt: str = "", title: str = "walk") -> Trace:
        """The trace of an outcome.

        Args:
            llm: The model of the walk.
            outcome: Of the walk.
            prompt: Shown before it.
            title: What to call it.
        """
        n = len(outcome.token_ids)
        summary = (
            f"{n} tokens, {outcome.n_draws} drawn, taken back {outcome.n_undos} times; "
            f"{outcome.forwards_per_token:.2f} prefixes computed per token; ended by {outcome.reason}"
        )
        return cls(prompt, pieces_of(outcome.events), title, summary)

    def spans(self) -> list[Span]:
        """Neighbours of one kind and note together; bytes become text where characters are whole."""
        spans: list[Span] = []
        group: list[Piece] = []
        for piece in [*self.pieces, Piece(b"", "", "")]:
            if group and piece.kind != group[-1].kind:
                spans += _spans(group)
                group = []
            group.append(piece)
        return spans

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        text = Text(_shown(self.prompt), style="dim")
        for span in self.spans():
            text.append(_shown(span.text), style=_STYLES[span.kind] or "not dim")
        yield text
        if self.summary:
            yield Text(self.summary, style="dim italic")

    def to_html(self) -> str:
        """A page of its own: no script, and nothing from elsewhere."""
        legend = "".join(f'<span class="{kind}">{kind}</span> ' for kind in KINDS)
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{html.escape(self.title)}</title><style>{_SPANS}{_PAGE}</style></head>"
            f"<body><h1>{html.escape(self.title)}</h1>{self._body()}"
            f'<div class="genlm-trace"><p class=legend>{legend}</p></div></body></html>\n'
        )

    def save(self, path: str | Path) -> Path:
        """Write the page."""
        path = Path(path)
        path.write_text(self.to_html(), encoding="utf-8")
        return path

    def _repr_html_(self) -> str:
        return f"<style>{_SPANS}</style>{self._body()}"

    def _body(self) -> str:
        spans = "".join(
            f'<span class="{span.kind}" title="{html.escape(span.note)}">{html.escape(_shown(span.text))}</span>'
            for span in self.spans()
        )
        prompt = f'<span class="prompt">{html.escape(_shown(self.prompt))}</span>' if self.prompt else ""
        summary = f"<p class=summary>{html.escape(self.summary)}</p>" if self.summary else ""
        return f'<div class="genlm-trace"><p>{prompt}{spans}</p>{summary}</div>'


def pieces_of(events: Iterable[Event]) -> list[Piece]:
    """The pieces of a walk: everything that was written, in that order, what was taken back where it stood."""
    pieces: list[Piece] = []
    standing: list[int] = []  # places in `pieces` of the tokens that are still there
    for event in events:
        match event:
            case Token(_, piece, logprob):
                standing.append(len(pieces))
                pieces.append(Piece(piece, "kept", f"log-probability {logprob:.2f}"))
            case Forced(_, piece, n_healed, why):
                standing.append(len(pieces))
                kind = "healed" if n_healed else "forced"
                pieces.append(Piece(piece, kind, f"written: {why}"))
            case Retract(n, why):
                for place in standing[len(standing) - n :]:
                    pieces[place] = pieces[place]._replace(kind="retracted", note=f"taken back: {why}")
                del standing[len(standing) - n :]
            case End():
                pass
    return pieces


def _spans(group: Sequence[Piece]) -> list[Span]:
    """One span a token, where tokens hold whole characters; else together."""
    spans: list[Span] = []
    held, note = b"", ""
    for piece in group:
        held, note = held + piece.text, piece.note
        try:
            spans.append(Span(held.decode(), piece.kind, note))
        except UnicodeDecodeError:
            continue
        held = b""
    if held:
        spans.append(Span(held.decode("utf-8", "replace"), group[-1].kind, note))
    return [span for span in spans if span.text]


def _shown(text: str) -> str:
    """Text that does nothing to a terminal or a page but be read."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


_SPANS = (  # nothing here reaches beyond the trace: it is also shown within other pages
    ".genlm-trace{font:16px/1.6 ui-monospace,Menlo,Consolas,monospace;white-space:pre-wrap;overflow-wrap:anywhere}"
    ".genlm-trace .prompt{opacity:.55}"
    ".genlm-trace .retracted{color:#b3261e;text-decoration:line-through}"
    ".genlm-trace .forced{color:#1a56c4}.genlm-trace .healed{color:#b45f06}"
    ".genlm-trace .summary,.genlm-trace .legend{font:13px system-ui,sans-serif;opacity:.7}"
)
_PAGE = (
    "body{max-width:60em;margin:2em auto;padding:0 1em;color-scheme:light dark;background:Canvas;color:CanvasText}"
    "h1{font:600 20px system-ui,sans-serif}"
    "@media (prefers-color-scheme:dark){.genlm-trace .retracted{color:#ff8a80}.genlm-trace .forced{color:#8ab4ff}"
    ".genlm-trace .healed{color:#ffb870}}"
)
