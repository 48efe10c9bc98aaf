"""Parser: what of a text a Lark grammar reads, and what it expects where it stops.

llguidance decides what is valid, and how far a text is viable; lark supplies the names and patterns of the terminals
expected there, for which llguidance has no call. Grammars that llguidance does not take (with templates or priorities)
run on lark's Earley parser alone; `engine` says which. There too llguidance matches the terminals, since lark
cannot tell whether a text has begun one: their expressions have no look-around.
"""

from __future__ import annotations

import os
import re
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from genlm_backend.backtracking.earley import KIND, Earley
from genlm_backend.backtracking.lark_constraint import LarkConstraint
from genlm_backend.errors import GrammarTooComplex, InvalidGrammar
from genlm_backend.llm.base import AsyncLM
from genlm_backend.potentials.base import Constraint
from genlm_backend.potentials.grammar import Grammar, GrammarVocabulary
from genlm_backend.potentials.limits import Limits, check_for_lark, check_nesting
from genlm_backend.tokenization import Token

SHIPPED = Path(__file__).with_name("grammars")
_SKIP_FIRST = '%llguidance {"allow_initial_skip": true}'
# Terminals of lark's own library that look behind, and what they match without.
_WITHOUT_LOOK_AROUND = {r'".*?(?<!\\)(\\\\)*?"': r'"(?:[^"\\\n]|\\[^\n])*"'}


class Candidate(NamedTuple):
    """A terminal that may come next: its text, or its regular expression, as the grammar writes it.

    Attributes:
        text: Without quotes, slashes and flags.
        is_regex: Whether it is an expression.
        flags: Of those that the grammar writes after it, such as "i" for either case.
    """

    text: str
    is_regex: bool
    flags: str = ""

    @property
    def pattern(self) -> str:
        """An expression that matches its texts, flags included; without the look-around of lark's own terminals."""
        plain = _WITHOUT_LOOK_AROUND.get(self.text, self.text) if self.is_regex else escaped(self.text)
        return f"(?{self.flags}:{plain})" if self.flags else plain


class CandidateText(str):
    """What a grammar writes of a candidate, a string, with what tells how to read it: `is_regex` and `flags`."""

    is_regex: bool
    flags: str

    def __new__(cls, text: str, is_regex: bool = False, flags: str = "") -> CandidateText:
        self = super().__new__(cls, text)
        self.is_regex, self.flags = is_regex, flags
        return self


class Expected(NamedTuple):
    """Where a text stops being read: the part before, and what may come there.

    Attributes:
        prefix: Ends where a terminal begins; its white space is kept.
        candidates: Texts first; without what the grammar ignores.
    """

    prefix: str
    candidates: list[Candidate]


class Parser:
    """A grammar on texts; made by `load_parser`.

    Attributes:
        source: The grammar.
        engine: "llguidance", or "lark" where llguidance refuses the grammar.
        refusal: Why llguidance refuses it; None if it does not.
    """

    def __init__(self, source: str, folder: str | None = None, limits: Limits | None = None) -> None:
        self.source = source
        self.limits = limits or Limits()
        self.refusal: InvalidGrammar | None = None
        check_nesting(KIND, source, self.limits)
        check_for_lark(KIND, source, self.limits)
        self._earley = Earley(source, folder, self.limits.lark_s)
        # lark skips what is ignored before the first terminal too
        self._for_llguidance = source if "%llguidance" in source else f"{_SKIP_FIRST}\n{source}"
        self._terminals = self._earley.terminals
        self._bytes = GrammarVocabulary([Token(i, bytes([i])) for i in range(256)])
        self._grammar: Grammar | None = None
        try:
            self._grammar = Grammar.lark(self._bytes, self._for_llguidance, limits=self.limits)
        except GrammarTooComplex:
            raise
        except InvalidGrammar as refusal:
            self.refusal = refusal
            _ = self._matchers  # a terminal that cannot be matched is told now

    @property
    def engine(self) -> str:
        """Which parser decides what is valid."""
        return "lark" if self._grammar is None else "llguidance"

    def constraint(self, llm: AsyncLM | GrammarVocabulary) -> Constraint:
        """The grammar over the tokens of a model: a `Grammar`, or on lark's engine a `LarkConstraint` without masks."""
        if self._grammar is None:
            return LarkConstraint(llm, self)
        return Grammar.lark(llm, self._for_llguidance, limits=self.limits)

    def is_valid(self, text: str) -> bool:
        """Whether it is a whole text of the grammar."""
        if self._grammar is not None:
            return self._grammar.is_complete(self._grammar.state_of(text.encode()))
        return self._earley.read(text).is_whole

    def n_viable(self, text: str) -> int:
        """Characters of the longest beginning that some text of the grammar has; unfinished terminals count."""
        data = text.encode()
        return len(data[: self.n_viable_bytes(data)].decode("utf-8", "ignore"))

    def n_viable_bytes(self, data: bytes) -> int:
        """`n_viable` in bytes, of bytes that may end within a character."""
        if self._grammar is None:
            return self._n_viable_by_lark(data)
        grammar = self._grammar
        if grammar.is_alive(grammar.state_of(data)):
            return len(data)
        low, high = 0, len(data)  # alive after `low` bytes, dead after `high`
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if grammar.is_alive(grammar.state_of(data[:middle])) else (low, middle)
        return low

    def is_viable(self, text: str) -> bool:
        """Whether some text of the grammar begins with it."""
        return self.n_viable(text) == len(text)

    def may_go_on(self, text: str) -> bool:
        """Whether anything may follow a valid text, white space included."""
        if self._grammar is None:
            return self._may_go_on_by_lark(text)
        return bool(self._grammar.mask(self._grammar.state_of(text.encode()))[:-1].any())

    def expected(self, text: str) -> Expected:
        """What may come where the text stops being read, or at its end; nothing to add where a valid text must end."""
        reading = self._earley.read(text)
        names = reading.expected - self._earley.ignored
        candidates = {self._candidate(name) for name in names if name in self._terminals}
        return Expected(
            text[: reading.end], sorted(candidates, key=lambda candidate: (candidate.is_regex, candidate.text))
        )

    def opening(self, candidate: Candidate) -> str:
        """What all texts of an expression begin with, "" if they differ from the start; the whole of a keyword."""
        if not candidate.is_regex:
            return candidate.text
        try:
            terminal = Grammar.regex(self._bytes, candidate.pattern, limits=self.limits)
        except InvalidGrammar:
            return ""
        return terminal.forced_bytes(terminal.start()).decode("utf-8", "ignore")

    def _candidate(self, name: str) -> Candidate:
        pattern = self._terminals[name]
        return Candidate(pattern.value, pattern.type == "re", "".join(sorted(pattern.flags)))

    @cached_property
    def _matchers(self) -> dict[str, Grammar]:
        """Terminals by name, as grammars of bytes.

        Raises:
            UnsupportedGrammar: One looks around, or is otherwise beyond llguidance; the message names it.
        """
        matchers = {}
        for name in self._terminals:
            pattern = self._candidate(name).pattern
            try:
                matchers[name] = Grammar.regex(self._bytes, pattern, limits=self.limits)
            except InvalidGrammar as error:
                raise type(error)(KIND, f"terminal {name}: {error.data[1]}", str(error.data[2])) from error
        return matchers

    def _n_viable_by_lark(self, data: bytes) -> int:
        """The furthest that a terminal, begun where one may begin, goes on matching."""
        try:
            text = data.decode()
        except UnicodeDecodeError as error:  # only a terminal can tell whether the rest begins a character of it
            text = data[: error.start].decode()
        with self._earley.clock.running(f"lark takes too long for a text of {len(text):,} characters"):
            return self._furthest(text, data)

    def _furthest(self, text: str, data: bytes) -> int:
        reading = self._earley.read(text)
        furthest = len(text.encode()) if reading.end == len(text) else 0
        for start, names in reversed([*enumerate(reading.begun)]):
            if furthest == len(data):
                break
            n_before = len(text[:start].encode())
            for name in {*names, *self._earley.ignored}:
                reach = n_before + self._n_begun(name, data[n_before:])
                # what is ignored may come where a terminal may, and at the end
                if reach > furthest and (names or self._earley.read(text[:start]).is_whole):
                    furthest = reach
        return furthest

    def _may_go_on_by_lark(self, text: str) -> bool:
        """Whether a terminal may begin at the end, or goes on there: after any valid text, what is ignored does."""
        if self._earley.ignored:
            return True
        data = text.encode()
        with self._earley.clock.running(f"lark takes too long for a text of {len(text):,} characters"):
            for start, names in reversed([*enumerate(self._earley.read(text).begun)]):
                rest = data[len(text[:start].encode()) :]
                for name in names:
                    if self._n_begun(name, rest) == len(rest):
                        terminal = self._matchers[name]
                        if terminal.mask(terminal.state_of(rest))[:-1].any():
                            return True
        return False

    def _n_begun(self, name: str, data: bytes) -> int:
        """How many bytes some text of a terminal begins with."""
        terminal = self._matchers.get(name)
        if terminal is None:
            return 0
        state = terminal.start()
        for n_bytes, byte in enumerate(data):
            self._earley.clock.tick()
            state = terminal.extend(state, byte)
            if not terminal.is_alive(state):
                return n_bytes
        return len(data)


def load_parser(
    lark_grammar_str: str | None = None,
    lark_grammar_filepath: str | os.PathLike[str] | None = None,
    *,
    limits: Limits | None = None,
) -> Parser:
    """The parser of a Lark grammar.

    Args:
        lark_grammar_str: The grammar; or the path of a file that holds one; or the name of one that is shipped: "json",
            "sql" (SELECT statements of SQLite), "arithmetic", "robot".
        lark_grammar_filepath: The path, if it is not given first.
        limits: `Limits.untrusted()` for grammars from strangers.

    Raises:
        InvalidGrammar: It is none, or neither argument or both are given.
        UnsupportedGrammar: Neither engine takes it: llguidance refuses it, and a terminal looks around.
        GrammarTooComplex: It needs more than `limits`.
        OSError: The file cannot be read.
        BackendUnavailable: lark or llguidance is not installed.
    """
    if (lark_grammar_str is None) == (lark_grammar_filepath is None):
        raise InvalidGrammar(KIND, "got both a text and a path, or neither", "give one of them")
    if lark_grammar_filepath is not None:
        path = Path(lark_grammar_filepath)
        return Parser(path.read_text(encoding="utf-8"), str(path.parent), limits)
    text = str(lark_grammar_str)
    if "\n" in text or ":" in text.strip("./\\"):
        return Parser(text, None, limits)
    shipped = SHIPPED / f"{text}.lark"
    path = shipped if shipped.is_file() else Path(text)
    if not path.is_file():
        names = sorted(file.stem for file in SHIPPED.glob("*.lark"))
        raise InvalidGrammar(KIND, f"{text!r} is no grammar, no file, and none of {names}", "give one of these")
    return Parser(path.read_text(encoding="utf-8"), str(path.parent), limits)


def obtain_correction_pairs(prediction: str, parser: Parser) -> tuple[str, list[str]]:
    """The part of a text that the grammar reads, up to where a terminal begins, and what may come there.

    Candidates are as the grammar writes them: a keyword, or a terminal's regular expression. They are strings that also
    have `is_regex` and `flags`, by which `choose_candidate` knows expressions.
    """
    expected = parser.expected(prediction)
    return expected.prefix, [CandidateText(*candidate) for candidate in expected.candidates]


def escaped(text: str) -> str:
    """An expression that matches a text and nothing else."""
    return re.sub(r"([\\.+*?()|\[\]{}^$#&\-~/])", r"\\\1", text).replace("\n", r"\n").replace("\r", r"\r")
