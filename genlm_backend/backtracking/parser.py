"""Parser: what of a text a Lark grammar reads, and what it expects where it stops.

llguidance decides what is valid, and how far a text is viable; lark supplies the names and patterns of the terminals
expected there, for which llguidance has no call. Grammars that llguidance does not take (with templates or priorities)
run on lark's Earley parser alone; `engine` says which. There too llguidance matches the terminals, since lark
cannot tell whether a text has begun one: their expressions have no look-around.
"""

from __future__ import annotations

import os
import re
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from genlm_backend.backtracking.lark_constraint import LarkConstraint
from genlm_backend.errors import BackendUnavailable, GrammarTooComplex, InvalidGrammar
from genlm_backend.llm.base import AsyncLM
from genlm_backend.potentials.base import Constraint
from genlm_backend.potentials.grammar import Grammar, GrammarVocabulary
from genlm_backend.potentials.limits import Limits, check_nesting, check_terminals
from genlm_backend.tokenization import Token

if TYPE_CHECKING:
    import lark

SHIPPED = Path(__file__).with_name("grammars")
_KIND = "Lark grammar"
_STOPS_KEPT = 4096
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
        """An expression that matches its texts, flags included."""
        plain = self.text if self.is_regex else escaped(self.text)
        return f"(?{self.flags}:{plain})" if self.flags else plain


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
        check_nesting(_KIND, source, self.limits)
        check_terminals(_KIND, source, self.limits)
        self._lark = _loaded(source, folder)
        # lark skips what is ignored before the first terminal too
        self._for_llguidance = source if "%llguidance" in source else f"{_SKIP_FIRST}\n{source}"
        self._ignored = set(self._lark.ignore_tokens)
        self._terminals = {terminal.name: terminal.pattern for terminal in self._lark.terminals}
        self._bytes = GrammarVocabulary([Token(i, bytes([i])) for i in range(256)])
        self._stop = lru_cache(maxsize=_STOPS_KEPT)(self._stop_by_lark)  # the beginnings of a text are asked for often
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
        return self._stop(text) is None

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
            return bool(self._first_after(text))
        return bool(self._grammar.mask(self._grammar.state_of(text.encode()))[:-1].any())

    def expected(self, text: str) -> Expected:
        """What may come where the text stops being read, or at its end; nothing to add where a valid text must end."""
        stop = self._stop(text)
        if stop is None:
            return Expected(text, [])
        position, names = stop
        candidates = {self._candidate(name) for name in names if name not in self._ignored and name in self._terminals}
        return Expected(text[:position], sorted(candidates, key=lambda candidate: (candidate.is_regex, candidate.text)))

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
                matchers[name] = Grammar.regex(
                    self._bytes, _WITHOUT_LOOK_AROUND.get(pattern, pattern), limits=self.limits
                )
            except InvalidGrammar as error:
                raise type(error)(_KIND, f"terminal {name}: {error.data[1]}", str(error.data[2])) from error
        return matchers

    def _stop_by_lark(self, text: str) -> tuple[int, frozenset[str]] | None:
        """Where lark stops reading, and the names of the terminals it expects there; None if the text is valid."""
        import lark

        try:
            self._lark.parse(text)
        except lark.UnexpectedCharacters as stop:
            return stop.pos_in_stream or 0, frozenset(str(getattr(n, "name", n)) for n in stop.allowed or ())
        except lark.UnexpectedEOF as stop:
            return len(text), frozenset(str(getattr(name, "name", name)) for name in stop.expected)
        return None

    def _n_viable_by_lark(self, data: bytes) -> int:
        """The furthest that a terminal, begun where one may begin, goes on matching."""
        try:
            text = data.decode()
        except UnicodeDecodeError as error:  # only a terminal can tell whether the rest begins a character of it
            text = data[: error.start].decode()
        stop = self._stop(text)
        furthest = 0
        if stop is None or stop[0] == len(text):
            furthest = len(text.encode())
            if furthest == len(data):
                return furthest
        for start in range((len(text) if stop is None else stop[0]) + 1):
            at = self._stop(text[:start])
            names = self._first_after(text[:start]) if at is None else at[1] if at[0] == start else frozenset()
            rest = data[len(text[:start].encode()) :]
            for name in names:
                furthest = max(furthest, len(data) - len(rest) + self._n_begun(name, rest))
        return furthest

    def _first_after(self, text: str) -> frozenset[str]:
        """What may follow a valid text: lark says so when a character comes that no terminal has."""
        stop = self._stop(text + "\uffff")
        return stop[1] if stop is not None and stop[0] == len(text) else frozenset()

    def _n_begun(self, name: str, data: bytes) -> int:
        """How many bytes some text of a terminal begins with."""
        terminal = self._matchers.get(name)
        if terminal is None:
            return 0
        state = terminal.start()
        for n_bytes, byte in enumerate(data):
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
        limits: `Limits.untrusted()` for grammars from strangers; they bound loading, and what llguidance does with
            texts, not what lark does with them.

    Raises:
        InvalidGrammar: It is none, or neither argument or both are given.
        UnsupportedGrammar: Neither engine takes it: llguidance refuses it, and a terminal looks around.
        GrammarTooComplex: It needs more than `limits`.
        OSError: The file cannot be read.
        BackendUnavailable: lark or llguidance is not installed.
    """
    if (lark_grammar_str is None) == (lark_grammar_filepath is None):
        raise InvalidGrammar(_KIND, "got both a text and a path, or neither", "give one of them")
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
        raise InvalidGrammar(_KIND, f"{text!r} is no grammar, no file, and none of {names}", "give one of these")
    return Parser(path.read_text(encoding="utf-8"), str(path.parent), limits)


def obtain_correction_pairs(prediction: str, parser: Parser) -> tuple[str, list[str]]:
    """The part of a text that the grammar reads, up to where a terminal begins, and what may come there.

    Candidates are as the grammar writes them: a keyword, or a terminal's regular expression.
    """
    expected = parser.expected(prediction)
    return expected.prefix, [candidate.text for candidate in expected.candidates]


def escaped(text: str) -> str:
    """An expression that matches a text and nothing else."""
    return re.sub(r"([\\.+*?()|\[\]{}^$#&\-~/])", r"\\\1", text).replace("\n", r"\n").replace("\r", r"\r")


def _loaded(source: str, folder: str | None) -> lark.Lark:
    try:
        import lark
    except ImportError as error:
        raise BackendUnavailable("lark", 'pip install "genlm-backend[grammar]"') from error
    options: dict[str, Any] = {"import_paths": [folder]} if folder else {}
    try:
        return lark.Lark(source, parser="earley", lexer="dynamic", **options)
    except lark.exceptions.LarkError as error:
        raise InvalidGrammar(_KIND, str(error).strip(), "correct it") from error
    except RecursionError:
        raise GrammarTooComplex(_KIND, "it nests deeper than lark's loader can go", "flatten it") from None
