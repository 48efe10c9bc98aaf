"""ContextFree: texts of a context-free grammar as it is written, decided by xgrammar.

llguidance (`Grammar`) splits text into terminals by longest match before it parses; xgrammar reads bytes without a
lexer, so every way to divide the text counts. Ask it where that makes a difference; `Grammar` checks what it is given
more closely, has limits for grammars from strangers, and keeps fewer parsers in memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np

from genlm_backend.errors import BackendUnavailable, InvalidGrammar
from genlm_backend.llm.base import AsyncLM
from genlm_backend.potentials.base import BoolRow, Constraint, State
from genlm_backend.potentials.limits import Limits, check_nesting
from genlm_backend.tokenization import Token


class ContextFree(Constraint):
    """The texts of a context-free grammar. Made by `lark` or `ebnf`.

    A state holds its own parser, a fork of the one before. A state is alive while the grammar can go on from it, which
    does not promise an end: that of a rule without a way out is alive for ever.

    Attributes:
        source: The grammar as it was given.
    """

    _compilers: ClassVar[weakref.WeakKeyDictionary[AsyncLM, _Compiler]] = weakref.WeakKeyDictionary()

    def __init__(self, compiler: _Compiler, kind: str, source: str) -> None:
        check_nesting(kind, source, Limits())
        self.n_tokens = compiler.n_tokens
        self.source = source
        self._no_text = compiler.no_text
        self._engine = compiler.engine
        read = compiler.of.compile_lark if kind == _LARK else compiler.of.compile_grammar
        try:
            self._start = compiler.engine.GrammarMatcher(read(source))
        except RuntimeError as error:
            raise InvalidGrammar(kind, str(error).strip(), "correct it") from None

    @classmethod
    def lark(cls, llm: AsyncLM | Sequence[Token], grammar: str) -> Self:
        """Texts of a Lark grammar with the rule `start`, whose terminals match any text of theirs, not the longest.

        Raises:
            InvalidGrammar: xgrammar does not read it.
            GrammarTooComplex: It is larger, or nested more deeply, than `Limits()` allows.
            BackendUnavailable: xgrammar is not installed.
        """
        return cls(_compiler(cls._compilers, llm), _LARK, grammar)

    @classmethod
    def ebnf(cls, llm: AsyncLM | Sequence[Token], grammar: str) -> Self:
        """Texts of a grammar in xgrammar's EBNF (that of llama.cpp), with the rule `root`.

        Raises:
            InvalidGrammar, GrammarTooComplex, BackendUnavailable: As `lark`.
        """
        return cls(_compiler(cls._compilers, llm), _EBNF, grammar)

    def start(self) -> State:
        return self._start

    def extend(self, state: State, token_id: int) -> State:
        """None is the dead state."""
        if state is None or not 0 <= token_id < self.n_tokens or self._no_text[token_id]:
            return None
        longer = state.fork()
        return longer if longer.accept_token(token_id) else None

    def is_alive(self, state: State) -> bool:
        return state is not None

    def is_complete(self, state: State) -> bool:
        return state is not None and bool(state.is_completed())

    def mask(self, state: State) -> BoolRow:
        if state is None:
            return np.zeros(self.n_tokens + 1, np.bool_)
        words = self._engine.allocate_token_bitmask(1, self.n_tokens + 1)
        if state.fill_next_token_bitmask(words):
            bits = np.unpackbits(words.numpy().view(np.uint8), count=self.n_tokens + 1, bitorder="little")
            row: BoolRow = bits.view(np.bool_)
        else:  # it says so where every token may follow
            row = np.ones(self.n_tokens + 1, np.bool_)
        row[:-1] &= ~self._no_text
        row[-1] = state.is_completed()
        return row


_LARK, _EBNF = "Lark grammar", "EBNF grammar"


class _Compiler(NamedTuple):
    """xgrammar's compiler for a vocabulary; one more token, the last, stands for the end.

    Attributes:
        engine: The package.
        of: Its compiler.
        n_tokens: Without the end.
        no_text: (n_tokens,) bool, tokens that are no text.
    """

    engine: Any
    of: Any
    n_tokens: int
    no_text: BoolRow


def _compiler(kept: weakref.WeakKeyDictionary[AsyncLM, _Compiler], llm: AsyncLM | Sequence[Token]) -> _Compiler:
    """That of a model, made at the first call, or of a vocabulary."""
    if not isinstance(llm, AsyncLM):
        return _made(llm)
    if llm not in kept:
        kept[llm] = _made(llm.byte_vocab)
    return kept[llm]


def _made(byte_vocab: Sequence[Token]) -> _Compiler:
    try:
        import xgrammar
    except ImportError as error:
        raise BackendUnavailable("xgrammar", 'pip install "genlm-backend[xgrammar]"') from error
    n_tokens = len(byte_vocab)
    no_text = np.array([token.is_special or token.is_hole or not len(token) for token in byte_vocab])
    texts = [b"" if no_text[i] else bytes(token.byte_string) for i, token in enumerate(byte_vocab)]
    info = xgrammar.TokenizerInfo(
        [*texts, b"<end>"], xgrammar.VocabType.RAW, vocab_size=n_tokens + 1, stop_token_ids=[n_tokens]
    )
    return _Compiler(xgrammar, xgrammar.GrammarCompiler(info, max_threads=1), n_tokens, no_text)
