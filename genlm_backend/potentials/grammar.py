"""Grammar: texts that match a JSON Schema, a regular expression or a Lark grammar, decided by llguidance.

What is the support? All token sequences whose bytes are a text of the grammar, in every segmentation, not only the one
that the tokenizer would choose: forced text narrows llguidance's masks to its canonical tokens, so forcing is off here
and `forced` counts alternatives itself. The language is the *lexed* one: llguidance splits text into terminals by
longest match before it parses, so that `start: STEM SUFFIX`, `STEM: "list" | "listen"`, `SUFFIX: "ed"` does not accept
"listed". A grammar whose terminals are single characters, joined by rules, has its exact context-free language.

States share what they can: a state is a link to the one it extends, and its parser is made when it is first asked, from
the nearest older state that still has one. Parsers are kept in the order of their last use, up to a bound of memory.
"""

from __future__ import annotations

import json
import os
import re
import threading
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from genlm_backend.errors import BackendUnavailable, GrammarTooComplex, InvalidGrammar, UnsupportedGrammar
from genlm_backend.llm.base import AsyncLM
from genlm_backend.packed_mask import WORD_BITS, Words, n_words, unpack
from genlm_backend.potentials.base import BoolRow, Constraint, State
from genlm_backend.potentials.json_schema import checked_schema, spells_keys_plainly, text_of
from genlm_backend.potentials.limits import Limits, check_nesting
from genlm_backend.tokenization import Token

if TYPE_CHECKING:
    import llguidance

_SEVERAL = 4  # masks from which threads are worth waking up
_KEPT_TOKENS = 1 << 19  # total length of the sequences whose parsers are kept; about 160 bytes each, 80 MiB


class GrammarVocabulary:
    """A vocabulary as llguidance reads it; make it once for several grammars. Takes 0.15 s for 49,152 tokens.

    Args:
        byte_vocab: As from `decode_vocab`, or `llm.byte_vocab`.

    Raises:
        BackendUnavailable: llguidance is not installed.
    """

    _of_model: ClassVar[weakref.WeakKeyDictionary[AsyncLM, GrammarVocabulary]] = weakref.WeakKeyDictionary()

    def __init__(self, byte_vocab: Sequence[Token]) -> None:
        self.n_tokens = len(byte_vocab)
        self.byte_vocab = byte_vocab
        self.engine = _llguidance()
        self._words = _Words(byte_vocab)
        self.tokenizer = self.engine.LLTokenizer(self.engine.TokenizerWrapper(self._words))

    def words(self, text: bytes) -> list[int]:
        """Tokens that make up a text, the longest first; stops before bytes that no token has."""
        return self._words(text)

    @classmethod
    def of(cls, llm: AsyncLM | GrammarVocabulary) -> GrammarVocabulary:
        """That of a model, made at the first call."""
        if isinstance(llm, GrammarVocabulary):
            return llm
        if llm not in cls._of_model:
            cls._of_model[llm] = cls(llm.byte_vocab)
        return cls._of_model[llm]


class Grammar(Constraint):
    """The texts of a grammar. Made by `json_schema`, `regex` or `lark`.

    A state is alive while the grammar can go on from it. Masks of several states are made by several threads; questions
    from several threads are answered one after the other. A process that is forked while another thread asks needs a
    grammar of its own.

    Attributes:
        source: The schema, expression or grammar as it was given.
    """

    is_thread_safe = True

    def __init__(self, vocabulary: GrammarVocabulary, kind: str, source: str, compiled: str, limits: Limits) -> None:
        self.n_tokens = vocabulary.n_tokens
        self.vocabulary = vocabulary
        self.kind = kind
        self.source = source
        self.limits = limits
        self._lock = threading.RLock()  # a parser answers one thread at a time
        self._parsers: OrderedDict[_Path, None] = OrderedDict()
        self._kept_tokens = 0
        self._start = _Path(None, -1, 0)
        self._start.parser = _compiled(vocabulary, kind, compiled, limits)

    @classmethod
    def json_schema(
        cls,
        llm: AsyncLM | GrammarVocabulary,
        schema: Mapping[str, Any] | bool | str,
        *,
        whitespace: bool = True,
        limits: Limits | None = None,
    ) -> Self:
        """JSON texts that a schema validates; keys without escapes that they do not need.

        llguidance takes the key "\\u0061" for another one than "a": a text with it is a beginning, never a whole text.

        Args:
            llm: The model, or its `GrammarVocabulary`.
            schema: A JSON Schema as a mapping or as JSON text.
            whitespace: Whether there may be white space between the parts of a value: any amount of blanks, tabs and
                line ends, as in JSON. Small models like to go on with it for ever.
            limits: For schemas that are not trusted.

        Raises:
            InvalidGrammar: No JSON, or no schema, or one that nothing satisfies.
            UnsupportedGrammar: It uses a keyword or format that is not enforced, or asks for more properties than the
                required ones and one; the message names it.
            GrammarTooComplex: It needs more than `limits`.
            BackendUnavailable: llguidance is not installed.
        """
        limits = limits or Limits()
        text = text_of(schema)
        plain = checked_schema(text, limits)
        options = {"lenient": False, "coerce_one_of": False, "whitespace_flexible": whitespace}
        compiled = f"{_EXACT}\nstart: %json {json.dumps({**plain, 'x-guidance': options})}\n"
        return cls(GrammarVocabulary.of(llm), "JSON Schema", text, compiled, limits)

    @classmethod
    def regex(cls, llm: AsyncLM | GrammarVocabulary, pattern: str, *, limits: Limits | None = None) -> Self:
        r"""Texts that a regular expression matches as a whole, in the syntax of Rust's `regex`.

        No look-around and no back-references; `.` matches no line end, `(?s:.)` does.

        Raises:
            InvalidGrammar, UnsupportedGrammar, GrammarTooComplex, BackendUnavailable: As `json_schema`.
        """
        limits = limits or Limits()
        check_nesting("regular expression", pattern, limits)
        compiled = f"{_EXACT}\nstart: WHOLE\nWHOLE: /{_in_slashes(pattern)}/\n"
        return cls(GrammarVocabulary.of(llm), "regular expression", pattern, compiled, limits)

    @classmethod
    def lark(cls, llm: AsyncLM | GrammarVocabulary, grammar: str, *, limits: Limits | None = None) -> Self:
        """Texts of a Lark grammar with the rule `start`, in llguidance's dialect.

        It lacks templates and priorities, and its terminals take the longest match wherever they may stand.

        Raises:
            InvalidGrammar, UnsupportedGrammar, GrammarTooComplex, BackendUnavailable: As `json_schema`.
        """
        limits = limits or Limits()
        check_nesting("Lark grammar", grammar, limits)
        return cls(GrammarVocabulary.of(llm), "Lark grammar", grammar, _without_forcing(grammar), limits)

    def start(self) -> State:
        return self._start

    def extend(self, state: State, token_id: int) -> State:
        longer = _Path(state, token_id, state.length + 1)
        longer.is_dead = state.is_dead or not 0 <= token_id < self.n_tokens
        return longer

    def is_alive(self, state: State) -> bool:
        with self._lock:
            return self._parser(state) is not None

    def is_complete(self, state: State) -> bool:
        with self._lock:
            parser = self._parser(state)
            return parser is not None and parser.is_accepting() and self._may_end(state)

    def allows(self, state: State, symbol: int) -> bool:
        if symbol == self.end:
            return self.is_complete(state)
        with self._lock:
            parser = self._parser(state)
            if parser is None:
                return False
            n_valid = parser.validate_tokens([symbol])
            self._check(parser)
            return n_valid == 1

    def mask(self, state: State) -> BoolRow:
        row: BoolRow = self.masks([state])[0]
        return row

    def masks(self, states: Sequence[State]) -> npt.NDArray[np.bool_]:
        """`(len(states), n_tokens + 1)` bool: `mask` of each; in parallel threads, without the interpreter lock."""
        return unpack(self.packed_masks(states), self.n_tokens + 1)

    def packed_masks(self, states: Sequence[State]) -> Words:
        """`(len(states), ceil((n_tokens + 1) / 32))` uint32: `masks`, packed."""
        different = list({id(state): state for state in states}.values())
        words = np.zeros((len(different), n_words(self.n_tokens + 1)), np.uint32)
        with self._lock:
            self._fill(words, different)
        word, bit = self.end // WORD_BITS, np.uint32(1 << self.end % WORD_BITS)
        words[:, word] &= bit | (bit - np.uint32(1))  # beyond the end
        for i in (words[:, word] & bit).nonzero()[0]:
            if not self._may_end(different[i]):
                words[i, word] &= ~bit
        if len(different) == len(states):
            return words
        place = {id(state): i for i, state in enumerate(different)}
        return words[[place[id(state)] for state in states]]

    def _fill(self, words: Words, states: Sequence[State]) -> None:
        """Make the masks of different states, a row each."""
        parsers = [self._parser(state) for state in states]
        live = [(parser, i) for i, parser in enumerate(parsers) if parser is not None]
        if len(live) >= _SEVERAL:
            _executor().unsafe_compute_mask_ptr(live, words.ctypes.data, words.strides[0], len(states))
        else:
            for parser, i in live:
                parser.unsafe_compute_mask_ptr(words[i].ctypes.data, words.strides[0])
        for parser, i in live:
            self._check(parser)
            if parser.is_error():
                words[i] = 0

    def forced(self, state: State) -> tuple[int, ...]:
        return super().forced(state) if self.forced_bytes(state) else ()

    def foreseen(self, state: State) -> list[int]:
        return self.vocabulary.words(self.forced_bytes(state))

    def forced_bytes(self, state: State) -> bytes:
        """What every text goes on with; its segmentation into tokens is free unless `forced` says so. b"" if dead."""
        with self._lock:
            parser = self._parser(state)
            return b"" if parser is None else parser.compute_ff_bytes()

    def token_ids(self, state: State) -> list[int]:
        """The sequence that a state stands for."""
        ids = []
        while state.parent is not None:
            ids.append(state.token_id)
            state = state.parent
        return ids[::-1]

    def _may_end(self, state: _Path) -> bool:
        """Whether a text that the parser has read to its end is one."""
        if self.kind != "JSON Schema":
            return True
        return spells_keys_plainly(b"".join(self.vocabulary.byte_vocab[i].byte_string for i in self.token_ids(state)))

    def _parser(self, state: _Path) -> llguidance.LLMatcher | None:
        """The parser that has read this sequence; None if the grammar cannot."""
        if state.is_dead:
            return None
        if state.parser is None:
            self._read(state)
        elif state in self._parsers:
            self._parsers.move_to_end(state)
        return state.parser

    def _read(self, state: _Path) -> None:
        """Give a state its parser, from the nearest older state that has one, or mark it dead."""
        token_ids, older = [state.token_id], state.parent
        while older is not None and older.parser is None and not older.is_dead:
            token_ids.append(older.token_id)
            older = older.parent
        if older is None or older.is_dead:
            state.is_dead = True
            return
        assert older.parser is not None
        token_ids.reverse()
        parser = older.parser.deep_copy()
        if not parser.consume_tokens(token_ids):
            # The only harmless reason is that the grammar does not go on like this; asking changes nothing.
            n_valid = older.parser.validate_tokens(token_ids)
            self._check(older.parser)
            if n_valid == len(token_ids):
                raise _explained(self.kind, parser.get_error())
            state.is_dead = True
            return
        state.parser = parser
        self._keep(state)

    def _keep(self, state: _Path) -> None:
        self._parsers[state] = None
        self._kept_tokens += state.length
        while self._kept_tokens > _KEPT_TOKENS and len(self._parsers) > 1:
            oldest, _ = self._parsers.popitem(last=False)
            oldest.parser = None
            self._kept_tokens -= oldest.length

    def _check(self, parser: llguidance.LLMatcher) -> None:
        """A parser that failed for another reason than the text says nothing about the text."""
        if parser.is_error() and not parser.get_error().startswith(_DEAD_END):
            raise _explained(self.kind, parser.get_error())


class _Path:
    """One token after an older path. What it stands for never changes; its parser is made, and forgotten, as needed."""

    __slots__ = ("is_dead", "length", "parent", "parser", "token_id")

    def __init__(self, parent: _Path | None, token_id: int, length: int) -> None:
        self.parent = parent
        self.token_id = token_id
        self.length = length
        self.parser: llguidance.LLMatcher | None = None
        self.is_dead = False


class _Words:
    """The vocabulary in the form that llguidance asks for; one more token, the last, stands for the end."""

    bos_token_id = None

    def __init__(self, byte_vocab: Sequence[Token]) -> None:
        self.eos_token_id = len(byte_vocab)
        no_text = [token.token_id for token in byte_vocab if token.is_special or token.is_hole]
        self.tokens = [*(bytes(token.byte_string) for token in byte_vocab), b"<end>"]
        self.special_token_ids = [*no_text, self.eos_token_id]
        self._id_of = {text: i for i, text in enumerate(self.tokens) if text and i not in set(self.special_token_ids)}
        self._longest = max(map(len, self._id_of), default=0)

    def __call__(self, text: bytes) -> list[int]:
        """The longest tokens first. It decides nothing, as forcing is off; llguidance wants one."""
        token_ids: list[int] = []
        at = 0
        while at < len(text):
            ends = range(min(at + self._longest, len(text)), at, -1)
            found = next((end for end in ends if text[at:end] in self._id_of), None)
            if found is None:
                return token_ids
            token_ids.append(self._id_of[text[at:found]])
            at = found
        return token_ids


_EXACT = '%llguidance {"no_forcing": true}'
_MARK = "%llguidance"


def _without_forcing(grammar: str) -> str:
    """The grammar with the option that keeps every segmentation of forced text; other options of its own stay."""
    lines = grammar.splitlines(keepends=True)
    at = next((i for i, line in enumerate(lines) if line.lstrip().startswith(_MARK)), None)
    if at is None:
        return f"{_EXACT}\n{grammar}"
    rest = "".join(lines[at:]).lstrip()[len(_MARK) :].lstrip()
    try:
        options, length = json.JSONDecoder().raw_decode(rest)
    except ValueError as error:
        raise InvalidGrammar(
            "Lark grammar", f"the options after {_MARK} are no JSON: {error}", "correct them"
        ) from None
    return f"{_MARK} {json.dumps({**options, 'no_forcing': True})}\n" + "".join(lines[:at]) + rest[length:]


def _in_slashes(pattern: str) -> str:
    """The pattern as it stands between the slashes of a Lark terminal."""
    plain = pattern.replace("\n", "\\n")
    return re.sub(r"(\\.)|/", lambda found: found[1] or "\\/", plain, flags=re.DOTALL)


def _compiled(vocabulary: GrammarVocabulary, kind: str, compiled: str, limits: Limits) -> llguidance.LLMatcher:
    engine = vocabulary.engine
    bounds = engine.LLParserLimits(**limits.of_engine())
    parser: llguidance.LLMatcher = engine.LLMatcher(vocabulary.tokenizer, compiled, log_level=0, limits=bounds)
    if not parser.is_error():
        trial = parser.deep_copy()
        words = np.zeros(n_words(vocabulary.n_tokens + 1), np.uint32)
        trial.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if trial.is_error() and trial.get_error().startswith(_DEAD_END):
            raise InvalidGrammar(kind, "no text matches it", "correct it")
        parser = trial if trial.is_error() else parser
    if parser.is_error():
        raise _explained(kind, parser.get_error())
    return parser


def _explained(kind: str, error: str) -> InvalidGrammar:
    """The fitting error for what llguidance says."""
    first = re.split(r"\n\s*\d+ \||<state>|<backtrace>|<non-verbose/>", error)[0].strip()
    first = re.sub(r"^at \d+\(\d+\): failed to compile JSON schema: ", "", first)
    short = first if len(first) < 600 else first[:600] + " ..."
    if any(words in error for words in _TOO_COMPLEX):
        return GrammarTooComplex(kind, short, "simplify it, or raise `limits` if you trust its author")
    if any(words in error for words in _UNSUPPORTED):
        return UnsupportedGrammar(kind, short, "leave it out, or check the finished text for it")
    return InvalidGrammar(kind, short, "correct it")


_DEAD_END = "NoExtensionBias"  # nothing goes on from here, which was noticed when the mask was made
_TOO_COMPLEX = (
    "fuel",
    "too complex",
    "too large",
    "TooComplex",
    "limit",
    "too big",
    "exceeds size",
    "too many",
    "max is",
    "panic",
)
_UNSUPPORTED = (
    "Unimplemented keys",
    "Unknown format",
    "oneOf constraints",
    "look-around",
    "lookaround",
    "backreferences",
    "not supported",
    "unsupported",
    "not disjoint",
    "only supported",
)


def _executor() -> llguidance.LLExecutor:
    global _threads
    if _threads is None:
        _threads = _llguidance().LLExecutor(os.cpu_count() or 1)
    return _threads


_threads: llguidance.LLExecutor | None = None


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise BackendUnavailable("llguidance", 'pip install "genlm-backend[grammar]"') from error
    return llguidance
