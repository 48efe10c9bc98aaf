"""Parser: what of a text a Lark grammar reads, and what it expects where it stops.

llguidance decides what is valid, and how far a text is viable; lark supplies the names and patterns of the terminals
expected there, for which llguidance has no call. Grammars that llguidance does not take (with templates or priorities)
run on lark's Earley parser alone; `engine` says which.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from genlm_backend.errors import BackendUnavailable, InvalidGrammar, UnsupportedGrammar
from genlm_backend.llm.base import AsyncLM
from genlm_backend.potentials.grammar import Grammar, GrammarVocabulary
from genlm_backend.potentials.limits import Limits
from genlm_backend.tokenization import Token

if TYPE_CHECKING:
    import lark

SHIPPED = Path(__file__).with_name("grammars")
_KIND = "Lark grammar"
_SKIP_FIRST = '%llguidance {"allow_initial_skip": true}'


class Candidate(NamedTuple):
    """A terminal that may come next: its text, or its regular expression, as the grammar writes it."""

    text: str
    is_regex: bool


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
        self._lark = _loaded(source, folder)
        # lark skips what is ignored before the first terminal too
        self._for_llguidance = source if "%llguidance" in source else f"{_SKIP_FIRST}\n{source}"
        self._ignored = set(self._lark.ignore_tokens)
        self._terminals = {terminal.name: terminal.pattern for terminal in self._lark.terminals}
        self._bytes = GrammarVocabulary([Token(i, bytes([i])) for i in range(256)])
        self._grammar: Grammar | None = None
        try:
            self._grammar = Grammar.lark(self._bytes, self._for_llguidance, limits=self.limits)
        except InvalidGrammar as refusal:
            self.refusal = refusal

    @property
    def engine(self) -> str:
        """Which parser decides what is valid."""
        return "lark" if self._grammar is None else "llguidance"

    def constraint(self, llm: AsyncLM | GrammarVocabulary) -> Grammar:
        """The grammar over the tokens of a model, for masks, products and samplers.

        Raises:
            UnsupportedGrammar: llguidance does not take it; the message says why.
        """
        if self.refusal is not None:
            raise UnsupportedGrammar(_KIND, f"no masks, because {self.refusal.data[1]}", "check instead of masking")
        return Grammar.lark(llm, self._for_llguidance, limits=self.limits)

    def is_valid(self, text: str) -> bool:
        """Whether it is a whole text of the grammar."""
        if self._grammar is not None:
            return self._grammar.is_complete(self._grammar.state_of(text.encode()))
        return self._stop(text) is None

    def n_viable(self, text: str) -> int:
        """Characters of the longest beginning that some text of the grammar has; unfinished terminals count."""
        if self._grammar is None:
            return self._n_viable_by_lark(text)
        grammar, data = self._grammar, text.encode()
        whole = grammar.state_of(data)
        if grammar.is_alive(whole):
            return len(text)
        low, high = 0, len(data)  # alive after `low` bytes, dead after `high`
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if grammar.is_alive(grammar.state_of(data[:middle])) else (low, middle)
        return len(data[:low].decode("utf-8", "ignore"))

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
        """What all texts of a candidate begin with: the whole of a keyword; "" if they differ from the start."""
        if not candidate.is_regex:
            return candidate.text
        try:
            terminal = Grammar.regex(self._bytes, candidate.text, limits=self.limits)
        except InvalidGrammar:
            return ""
        return terminal.forced_bytes(terminal.start()).decode("utf-8", "ignore")

    def _candidate(self, name: str) -> Candidate:
        pattern = self._terminals[name]
        return Candidate(pattern.value, pattern.type == "re")

    def _stop(self, text: str) -> tuple[int, set[str]] | None:
        """Where lark stops reading, and the names of the terminals it expects there; None if the text is valid."""
        import lark

        try:
            self._lark.parse(text)
        except lark.UnexpectedCharacters as stop:
            return stop.pos_in_stream or 0, {str(getattr(name, "name", name)) for name in stop.allowed or ()}
        except lark.UnexpectedEOF as stop:
            return len(text), {str(getattr(name, "name", name)) for name in stop.expected}
        return None

    def _n_viable_by_lark(self, text: str) -> int:
        """The furthest that a terminal, begun where one may begin, goes on matching."""
        stop = self._stop(text)
        if stop is None or stop[0] == len(text):
            return len(text)
        furthest = 0
        for start in range(stop[0] + 1):
            at = self._stop(text[:start])
            names = self._first_after(text[:start]) if at is None else at[1] if at[0] == start else set()
            for name in names:
                furthest = max(furthest, start + self._n_begun(name, text[start:]))
        return furthest

    def _first_after(self, text: str) -> set[str]:
        """What may follow a valid text: lark says so when a character comes that no terminal has."""
        stop = self._stop(text + "\uffff")
        return stop[1] if stop is not None and stop[0] == len(text) else set()

    def _n_begun(self, name: str, text: str) -> int:
        if name not in self._terminals:
            return 0
        import re

        pattern = self._terminals[name]
        whole = re.escape(pattern.value) if pattern.type == "str" else pattern.value
        terminal = Grammar.regex(self._bytes, f"(?:{whole})", limits=self.limits)
        state, n_bytes, data = terminal.start(), 0, text.encode()
        for byte in data:
            state = terminal.extend(state, byte)
            if not terminal.is_alive(state):
                break
            n_bytes += 1
        return len(data[:n_bytes].decode("utf-8", "ignore"))


def load_parser(
    lark_grammar_str: str | None = None, lark_grammar_filepath: str | os.PathLike[str] | None = None
) -> Parser:
    """The parser of a Lark grammar.

    Args:
        lark_grammar_str: The grammar; or the path of a file that holds one; or the name of one that is shipped: "json",
            "sql" (SELECT statements of SQLite), "arithmetic", "robot".
        lark_grammar_filepath: The path, if it is not given first.

    Raises:
        InvalidGrammar: It is none, or neither argument or both are given.
        OSError: The file cannot be read.
        BackendUnavailable: lark or llguidance is not installed.
    """
    if (lark_grammar_str is None) == (lark_grammar_filepath is None):
        raise InvalidGrammar(_KIND, "got both a text and a path, or neither", "give one of them")
    if lark_grammar_filepath is not None:
        path = Path(lark_grammar_filepath)
        return Parser(path.read_text(encoding="utf-8"), str(path.parent))
    text = str(lark_grammar_str)
    if "\n" in text or ":" in text.strip("./\\"):
        return Parser(text)
    shipped = SHIPPED / f"{text}.lark"
    path = shipped if shipped.is_file() else Path(text)
    if not path.is_file():
        names = sorted(file.stem for file in SHIPPED.glob("*.lark"))
        raise InvalidGrammar(_KIND, f"{text!r} is no grammar, no file, and none of {names}", "give one of these")
    return Parser(path.read_text(encoding="utf-8"), str(path.parent))


def obtain_correction_pairs(prediction: str, parser: Parser) -> tuple[str, list[str]]:
    """The part of a text that the grammar reads, up to where a terminal begins, and what may come there.

    Candidates are as the grammar writes them: a keyword, or a terminal's regular expression.
    """
    expected = parser.expected(prediction)
    return expected.prefix, [candidate.text for candidate in expected.candidates]


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
