"""Earley: what lark reads of a text, and what it expects where it stops, within a bounded time.

lark's Earley parser takes cubic time on ambiguous grammars, its loader exponential time on options and endless time on
templates that name themselves, and expressions of terminals backtrack. None of them can be told to stop, so time is
looked at from inside: in the sets of items that the parser makes, in each match of a terminal, which `regex` can give
up, and at calls within the loader, which takes twice as long so. It is the processor's time of the thread, which a busy
machine does not lengthen.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

import regex

from genlm_backend.errors import BackendUnavailable, GrammarTooComplex, InvalidGrammar, UnsupportedGrammar

if TYPE_CHECKING:
    import lark

KIND = "Lark grammar"
_READINGS_KEPT = 64  # of texts that are asked about again: is it valid, how far, what is expected
_TICKS = 64  # between looks at the clock
_GIVEN_UP = ("regex timed out",)  # what `regex` says in its TimeoutError


class Reading(NamedTuple):
    """What lark made of a text.

    Attributes:
        is_whole: It is a text of the grammar.
        end: Characters up to where reading stopped.
        expected: Names of the terminals expected there, without those that are ignored; none where `is_whole`.
        begun: Names of the terminals that rules let begin, by position, up to the end where reading got there.
    """

    is_whole: bool
    end: int
    expected: frozenset[str]
    begun: tuple[tuple[str, ...], ...]


class Earley:
    """A grammar loaded by lark.

    Attributes:
        terminals: Their patterns by name.
        ignored: Names of those that are skipped.
        clock: What bounds its time.

    Args:
        source: The grammar.
        folder: Where its imports are, besides lark's own.
        seconds: Of the processor, for loading and for each text.

    Raises:
        InvalidGrammar: It is none.
        UnsupportedGrammar: It declares terminals without a pattern.
        GrammarTooComplex: lark takes longer than that, or it nests too deeply for lark.
        BackendUnavailable: lark is not installed.
    """

    def __init__(self, source: str, folder: str | None, seconds: float) -> None:
        self.clock = Clock(seconds)
        self._lark = _loaded(source, folder, self.clock)
        self.terminals = {terminal.name: terminal.pattern for terminal in self._lark.terminals}
        self.ignored = frozenset(self._lark.ignore_tokens)
        used = {part.name for rule in self._lark.rules for part in rule.expansion if part.is_term}
        if declared := sorted(used - self.terminals.keys()):
            hint = "define them: no text can be read by a terminal without a pattern"
            raise UnsupportedGrammar(KIND, f"%declare of {', '.join(declared)}", hint)
        earley: Any = self._lark.parser.parser
        self._expressions = earley.term_matcher.__self__.regexps
        earley.Set = _ticking(earley.Set, self.clock)
        earley.term_matcher = self._match
        self._predict, earley.predict_and_complete = earley.predict_and_complete, self._note
        self._now = threading.local()
        self.read = lru_cache(maxsize=_READINGS_KEPT)(self._read)

    def _read(self, text: str) -> Reading:
        """What lark makes of a text.

        Raises:
            GrammarTooComplex: It takes longer than it may.
        """
        import lark

        begun: list[tuple[str, ...]] = []
        self._now.begun, self._now.known = begun, {}
        is_whole, end, names = False, len(text), frozenset[str]()
        with self.clock.running(f"lark takes too long for a text of {len(text):,} characters"):
            try:
                self._lark.parse(text)
                is_whole = True
            except lark.UnexpectedCharacters as stop:
                end, names = stop.pos_in_stream or 0, frozenset(str(getattr(n, "name", n)) for n in stop.allowed or ())
            except lark.UnexpectedEOF as stop:
                names = frozenset(str(getattr(name, "name", name)) for name in stop.expected)
        return Reading(is_whole, end, names, tuple(begun))

    def _note(self, at: int, to_scan: Any, *others: Any) -> None:  # lark 1.3 has one more than 1.2
        """The step of lark at each position, after which `to_scan` has the items whose terminals may begin there."""
        self._predict(at, to_scan, *others)
        names = tuple(dict.fromkeys(item.expect.name for item in to_scan))
        self._now.begun.append(self._now.known.setdefault(names, names))  # few differ: 8 bytes for a character

    def _match(self, terminal: Any, text: str, index: int = 0) -> Any:
        while True:
            try:
                return self._expressions[terminal.name].match(text, index, timeout=self.clock.left_s())
            except TimeoutError as error:
                if error.args != _GIVEN_UP:  # from a handler of signals
                    raise
                self.clock.look()  # `regex` counts the time of all threads


class Clock(threading.local):
    """Processor time that may be used, by each thread for itself."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._end = 0.0
        self._n_ticks = 0
        self._is_running = False

    @contextmanager
    def running(self, what: str) -> Iterator[None]:
        """Raise GrammarTooComplex, which says what took so long, where time runs out; within another, it shares its."""
        if self._is_running:
            yield
            return
        self._is_running, self._end = True, time.thread_time() + self._seconds
        try:
            yield
        except _TimeIsUp:
            hint = "write it without ambiguity, options and templates in each other, or raise `limits`"
            raise GrammarTooComplex(KIND, f"{what}, more than {self._seconds:g} s", hint) from None
        finally:
            self._is_running = False

    def tick(self) -> None:
        """Look at the clock, once in a while."""
        self._n_ticks += 1
        if self._n_ticks % _TICKS == 0:
            self.look()

    def look(self) -> None:
        """Raise where time is up."""
        if time.thread_time() > self._end:
            raise _TimeIsUp

    def left_s(self) -> float:
        """Seconds that are left, more than 0."""
        self.tick()
        return max(self._end - time.thread_time(), 0.001)


class _TimeIsUp(BaseException):
    """Passes through what lark catches."""


def _ticking(set_class: Any, clock: Clock) -> Any:
    """The set of items of lark, which looks at the clock for each item that is added, looked up or gone through."""

    class Ticking(set_class):  # type: ignore[misc]
        def add(self, item: Any) -> None:
            clock.tick()
            super().add(item)

        def __contains__(self, item: Any) -> bool:
            clock.tick()
            return bool(super().__contains__(item))

        def __iter__(self) -> Iterator[Any]:
            for item in super().__iter__():
                clock.tick()
                yield item

    return Ticking


def _loaded(source: str, folder: str | None, clock: Clock) -> lark.Lark:
    try:
        import lark
    except ImportError as error:
        raise BackendUnavailable("lark", 'pip install "genlm-backend[grammar]"') from error
    options: dict[str, Any] = {"parser": "earley", "lexer": "dynamic", "ambiguity": "forest", "regex": True}
    # a forest and no tree: nobody looks at it, and a tree of empty parts can be exponential
    if folder:
        options["import_paths"] = [folder]
    lark.Lark('start: "a"', **options)  # the first one loads what lark keeps, and takes longer
    n_calls = 0

    def look(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal n_calls
        n_calls += 1
        if n_calls % _TICKS == 0:
            clock.look()

    with clock.running("lark takes too long to load it"):
        before = sys.gettrace()
        sys.settrace(look)  # at calls of Python functions; none lies between the loader's and the end of this
        try:
            return lark.Lark(source, **options)
        except (lark.exceptions.LarkError, regex.error, re.error, OverflowError) as error:
            raise InvalidGrammar(KIND, str(error).strip(), "correct it") from error
        except RecursionError:
            raise GrammarTooComplex(KIND, "it nests deeper than lark's loader can go", "flatten it") from None
        finally:
            sys.settrace(before)
