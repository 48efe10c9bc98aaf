"""Limits: how much time and memory a grammar may take that somebody else wrote."""

from __future__ import annotations

import re
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from genlm_backend.errors import GrammarTooComplex


@dataclass(frozen=True)
class Limits:
    """Bounds of compiling a grammar and of each step; beyond them, `GrammarTooComplex`.

    Counts and not seconds, so that a grammar is accepted or refused alike on every machine; but seconds for lark, whose
    work has no one unit.

    Attributes:
        source_bytes: Of the grammar's text; of a Lark grammar for lark, also with the terminals that terminals name
            written out, and of what its templates are given, written out.
        nesting: Brackets within brackets in the text; parsers of grammars recurse, and a stack that overflows ends the
            process.
        compile_fuel: Work on regular expressions before the first token; 1,000,000 take about 20 ms.
        step_fuel: The same in each mask; 200,000 take about 15 ms.
        step_items: Earley items in each mask; 50,000 take about 3 ms.
        row_items: Earley items for one byte: the branching of an ambiguous grammar.
        lexer_states: In all; 1 to 2 kB each.
        grammar_symbols: In all productions, after repetitions are written out.
        repetitions: The most that `minItems`, `maxItems`, `minProperties` or `maxProperties` of a schema may say.
        properties: The most of one object of a schema; several objects count by the sum of squares, which is what
            their time grows with.
        lark_s: Seconds of the processor that lark may take to load a grammar, and for each question about a text.
    """

    source_bytes: int = 1_000_000
    nesting: int = 100
    compile_fuel: int = 1_000_000
    step_fuel: int = 200_000
    step_items: int = 50_000
    row_items: int = 2_000
    lexer_states: int = 50_000
    grammar_symbols: int = 60_000
    repetitions: int = 10_000
    properties: int = 2_000
    lark_s: float = 10.0

    @classmethod
    def untrusted(cls) -> Limits:
        """For grammars that strangers send: within 2 s and 200 MiB for a text of 60 tokens, most within 50 ms."""
        return cls(
            source_bytes=100_000,
            step_items=20_000,
            row_items=300,
            lexer_states=20_000,
            grammar_symbols=20_000,
            repetitions=1_000,
            properties=500,
            lark_s=0.5,
        )

    def of_engine(self) -> dict[str, int | bool]:
        """As llguidance names them."""
        return {
            "initial_lexer_fuel": self.compile_fuel,
            "step_lexer_fuel": self.step_fuel,
            "step_max_items": self.step_items,
            "max_items_in_row": self.row_items,
            "max_lexer_states": self.lexer_states,
            "max_grammar_size": self.grammar_symbols,
            "verbose_errors": False,
        }


def check_nesting(kind: str, text: str, limits: Limits) -> None:
    """Refuse a text that is too long, or whose brackets nest too deeply; those in strings and classes count too.

    Raises:
        GrammarTooComplex: It is.
    """
    n_bytes = len(text.encode("utf-8", "surrogatepass"))
    if n_bytes > limits.source_bytes:
        raise GrammarTooComplex(
            kind, f"it has {n_bytes:,} bytes, more than {limits.source_bytes:,}", "shorten it, or raise `limits`"
        )
    depth = deepest = 0
    for character in text:
        if character in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in ")]}":
            depth = max(depth - 1, 0)
    if deepest > limits.nesting:
        raise GrammarTooComplex(
            kind, f"its brackets nest {deepest:,} deep, more than {limits.nesting}", "flatten it, or raise `limits`"
        )


# None of them goes back over what it has matched, so that their time grows with the text; a literal may lack its end.
_LITERAL = re.compile(r'"(?:\\.|[^"\\\n])*+"?|/(?!/)(?:\\.|[^/\\])++/?|//[^\n]*+|#[^\n]*+', re.DOTALL)
_HEAD = re.compile(r"^[ \t]*+(?:%\w++[ \t]++)?([?!]*+)(\w++)([^\n:|]*+):", re.MULTILINE)
_BRACE = re.compile(r"(?<!\w)(\w++)\{|\}")
_BLANK_LINES = re.compile(r"(?<!\n)(?:\r?\n){501}")
_NAME = re.compile(r"_?[A-Z][A-Z_0-9]*")


def check_for_lark(kind: str, text: str, limits: Limits) -> None:
    """Refuse a Lark grammar that is too long once lark has written it out, or has blank lines without end.

    Raises:
        GrammarTooComplex: Its terminals are, with those that they name in their places; or its templates give ever
            longer arguments to templates, and lark names rules by them; or it has 500 blank lines one after another,
            over which lark goes back and forth.
    """
    if _BLANK_LINES.search(text):
        raise GrammarTooComplex(kind, "it has 500 blank lines in one place", "leave them out")
    definitions = _definitions(text)
    _check_terminals(kind, definitions, limits)
    _check_templates(kind, definitions, limits)


def _check_terminals(kind: str, definitions: list[_Definition], limits: Limits) -> None:
    bodies = {definition.name: definition.body for definition in definitions}
    named = {name: _NAME.findall(body) for name, body in bodies.items() if _NAME.fullmatch(name)}
    lengths: dict[str, int] = {}
    pending = [(name, False) for name in named]
    while pending:
        name, is_ready = pending.pop()
        parts = [part for part in named[name] if part in named]
        if is_ready:
            lengths[name] = len(bodies[name]) + sum(lengths[part] for part in parts)
        elif name not in lengths:
            lengths[name] = 0  # what it comes to within itself; lark tells that it may not
            pending.append((name, True))
            pending += [(part, False) for part in parts if part not in lengths]
    in_all = sum(lengths.values())
    if in_all > limits.source_bytes:
        what = f"its terminals, written out, have {in_all:,} characters, more than {limits.source_bytes:,}"
        raise GrammarTooComplex(kind, what, "let rules name terminals instead, or raise `limits`")


def _check_templates(kind: str, definitions: list[_Definition], limits: Limits) -> None:
    used_in: dict[str, list[_Usage]] = defaultdict(list)
    lengths: dict[str, int] = {}  # of the longest argument of a template
    for definition in definitions:
        for usage in _usages(definition.body):
            if definition.is_template:
                used_in[definition.name].append(usage)
            else:
                lengths[usage.name] = max(lengths.get(usage.name, 0), usage.length)
    pending, n_looked_at = deque(lengths), 0
    while pending:
        name = pending.popleft()
        for usage in used_in[name]:
            n_looked_at += 1
            length = usage.length * lengths[name] if usage.is_nested else max(usage.length, lengths[name])
            if length > limits.source_bytes or n_looked_at > limits.source_bytes:
                what = f"what its templates are given, written out, has more than {limits.source_bytes:,} characters"
                raise GrammarTooComplex(kind, what, "give templates names of rules, or raise `limits`")
            if length > lengths.get(usage.name, 0):
                lengths[usage.name] = length
                pending.append(usage.name)


class _Definition(NamedTuple):
    """Of a rule or terminal."""

    name: str
    is_template: bool
    body: str


class _Usage(NamedTuple):
    """A template with arguments: how many characters, and whether another template is among them."""

    name: str
    length: int
    is_nested: bool


def _definitions(text: str) -> list[_Definition]:
    """Rules and terminals of a Lark grammar, with what they are; literals and comments are blotted out."""
    plain = _LITERAL.sub(lambda found: "'" * len(found[0]), text)
    starts = [*_HEAD.finditer(plain)]
    ends = [*(found.start() for found in starts[1:]), len(plain)]
    return [
        _Definition(found[2], "{" in found[3], plain[found.end() : end])
        for found, end in zip(starts, ends, strict=False)  # no end without a start
    ]


def _usages(body: str) -> Iterator[_Usage]:
    opened: list[tuple[str, int]] = []
    n_closed: list[int] = []  # of those within each that is open
    for brace in _BRACE.finditer(body):
        if brace[1]:
            opened.append((brace[1], brace.end()))
            n_closed.append(0)
        elif opened:
            name, start = opened.pop()
            yield _Usage(name, brace.start() - start + 1, n_closed.pop() > 0)
            if n_closed:
                n_closed[-1] += 1
