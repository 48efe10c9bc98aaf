"""Limits: how much time and memory a grammar may take that somebody else wrote."""

from __future__ import annotations

from dataclasses import dataclass

from genlm_backend.errors import GrammarTooComplex


@dataclass(frozen=True)
class Limits:
    """Bounds of compiling a grammar and of each step; beyond them, `GrammarTooComplex`.

    Counts and not seconds, so that a grammar is accepted or refused alike on every machine.

    Attributes:
        source_bytes: Of the grammar's text.
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
