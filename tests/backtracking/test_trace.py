"""Traces: pieces where they stood, safe in a terminal and on a page."""

from __future__ import annotations

import asyncio
import io
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from genlm_backend.backtracking import Replace, Trace, phrases, walk
from genlm_backend.backtracking.trace import pieces_of
from genlm_backend.backtracking.walk import Forced, Retract, Token
from tests.backtracking.speaker import chooser, speaker

VOCAB = [b"<p>", b"<script>", b" So", b" it", b".", b"\xc3", b"\xa9", b"\x1b[2J", b"So", b".So"]


def outcome_of(rules, **likely):
    llm = speaker(VOCAB, chooser(**likely))
    return llm, asyncio.run(_finished(walk(llm, [0], rules, max_new_tokens=4, eos=(), seed=0)))


async def _finished(walking):
    return await walking


def test_what_was_taken_back_is_struck_out_where_it_stood():
    events = [
        Token(1, b"a", -1.0, -1.0, 0),
        Token(2, b"b", -1.0, -1.0, 0),
        Retract(1, "why", 0, 1),
        Forced(3, b"c", 0, "rule", 0),
        Token(4, b"d", -1.0, -1.0, 0),
        Retract(2, "again", 0, 1),
    ]
    assert [(p.text, p.kind) for p in pieces_of(events)] == [
        (b"a", "kept"),
        (b"b", "retracted"),
        (b"c", "retracted"),
        (b"d", "retracted"),
    ]


def test_the_kept_pieces_are_the_text():
    _, outcome = outcome_of(phrases("so"), otherwise={" So": 0.9, " it": 0.1}, So={".": 1.0}, it={" So": 0.9, ".": 0.1})
    assert outcome.n_undos > 0
    pieces = pieces_of(outcome.events)
    assert b"".join(p.text for p in pieces if p.kind != "retracted").decode() == outcome.text
    assert any("'so'" in p.note for p in pieces if p.kind == "retracted")


@pytest.mark.parametrize("joins", [True, False])
def test_a_healed_seam_is_told_apart(joins):
    """Where the tokenizer joins "." and "So" into one token, the token before is written anew; else it stays."""
    llm = speaker(VOCAB, chooser(otherwise={".": 1.0}, **{".": {" it": 1.0}}))
    rules = [Replace(" it", "So"), lambda step: None]  # the second may take back all: the token before is not final
    encode = {b".So": [9] if joins else [4, 8]}.__getitem__
    walking = walk(llm, [0], rules, max_new_tokens=2, eos=(), seed=3, encode=encode)
    outcome = asyncio.run(_finished(walking))
    assert outcome.text == (".So." if joins else ".So"), "joined, there is room for another token"
    pieces = [(p.text, p.kind) for p in pieces_of(outcome.events)]
    if joins:
        assert pieces[:3] == [(b".", "retracted"), (b" it", "retracted"), (b".So", "healed")]
        assert '<span class="healed"' in Trace.of(llm, outcome).to_html()
    else:
        assert pieces == [(b".", "kept"), (b" it", "retracted"), (b"So", "forced")]
    assert ("healed" in {kind for _, kind in pieces}) == joins


def test_a_page_is_of_its_own_and_nothing_in_it_acts():
    llm, outcome = outcome_of((), otherwise={"<script>": 1.0})
    trace = Trace.of(llm, outcome, "a <b> prompt & more", "<title>")
    page = trace.to_html()

    class Tags(HTMLParser):
        names: set[str] = set()

        def handle_starttag(self, tag, attrs):
            self.names.add(tag)
            assert not any(name in ("src", "href") for name, _ in attrs)

    parser = Tags()
    parser.feed(page)
    assert "script" not in parser.names and "&lt;script&gt;" in page
    inline = trace._repr_html_()
    assert all(rule.startswith(".genlm-trace") for rule in re.findall(r"[^{}<>]+(?={)", inline))


def test_a_terminal_is_shown_text_only():
    llm, outcome = outcome_of((), otherwise={"\x1b[2J": 1.0})
    console = Console(record=True, width=80, file=io.StringIO())
    console.print(Trace.of(llm, outcome))
    assert "\\x1b[2J" in console.export_text()


def test_characters_in_two_tokens_are_whole():
    spans = Trace("", pieces_of([Token(5, b"\xc3", -1.0, -1.0, 0), Token(6, b"\xa9", -1.0, -1.0, 0)])).spans()
    assert [span.text for span in spans] == ["é"]
