"""LarkConstraint: texts of a grammar that only lark reads, one token checked at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, NoReturn

from genlm_backend.errors import UnsupportedGrammar
from genlm_backend.llm.base import AsyncLM
from genlm_backend.potentials.base import Constraint, State
from genlm_backend.potentials.grammar import GrammarVocabulary
from genlm_backend.potentials.token_bytes import TokenBytes

if TYPE_CHECKING:
    from genlm_backend.backtracking.parser import Parser


class LarkConstraint(Constraint):
    """The texts of a grammar on lark's engine, over the tokens of a model; made by `Parser.constraint`.

    For what asks about one token at a time: `GrammarRule` in every mode of a walk but `mask`, sample-then-check. Each
    question reads the whole text again, so `GrammarRule(constraint, every=k)` costs about a k-th. There are no masks:
    what needs one (`mask`, `logw_next`, `forced`) raises `UnsupportedGrammar` with llguidance's refusal.

    Args:
        llm: The model, or its vocabulary.
        parser: Of the grammar.
    """

    def __init__(self, llm: AsyncLM | GrammarVocabulary, parser: Parser) -> None:
        self._tokens = TokenBytes.of(llm if isinstance(llm, AsyncLM) else llm.byte_vocab)
        self.n_tokens = self._tokens.n_tokens
        self.parser = parser

    def start(self) -> State:
        return _Text(b"", True)

    def extend(self, state: State, token_id: int) -> State:
        piece = self._tokens.text_of(token_id)
        if piece is None or not state.is_alive:
            return _DEAD
        text = state.text + piece
        return _Text(text, True) if self.parser.n_viable_bytes(text) == len(text) else _DEAD

    def is_alive(self, state: State) -> bool:
        return bool(state.is_alive)

    def is_complete(self, state: State) -> bool:
        if not state.is_alive:
            return False
        try:
            return self.parser.is_valid(state.text.decode())
        except UnicodeDecodeError:  # it ends within a character
            return False

    def mask(self, state: State) -> NoReturn:
        """
        Raises:
            UnsupportedGrammar: Always; the message says why llguidance refuses the grammar.
        """
        refusal = self.parser.refusal
        why = "llguidance does not read it" if refusal is None else refusal.data[1]
        raise UnsupportedGrammar("Lark grammar", f"no masks, because {why}", "check instead of masking")


class _Text(NamedTuple):
    text: bytes
    is_alive: bool


_DEAD = _Text(b"", False)
