"""Phrases: bans, or penalises, phrases in the text, in whatever tokens they come.

Phrases are compared as characters, without case if asked, and where a phrase begins or ends in a word character only
at the edge of a word: "So" is not found in "Some". Whether a word ends is known one character later, so a phrase that
ends with its token is judged at the next one, and with the text at the latest. A phrase that begins in the prompt is
found; what is taken back are only new tokens. Of added tokens such as `</think>` the name is their text, if a phrase
has it in it; other special tokens are no text, and no phrase goes across them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from weakref import WeakValueDictionary

import numpy as np

from genlm_backend.backtracking.automaton import Automaton
from genlm_backend.backtracking.characters import Characters, is_word, n_bytes_of
from genlm_backend.backtracking.rules import KEEP, BoolRow, Keep, Prompt, Rule, Step, Undo, Verdict
from genlm_backend.tokenization import Token

_AUTOMATA: WeakValueDictionary[tuple[str, ...], Automaton] = WeakValueDictionary()
_ENDS: dict[int, tuple[Sequence[Token], BoolRow]] = {}  # by identity; the vocabulary is kept, so its number stays its


class Found(NamedTuple):
    """An occurrence: it began so many characters before the end of the text, of whose bytes `n_after` come after it."""

    n_back: int
    n_after: int
    keep: float
    text: str


class Searched(NamedTuple):
    """Where the search is after some tokens.

    Attributes:
        characters: The end of the text.
        at: State of the automaton.
        pending: Lengths of phrases that end here, if the word ends here too.
        n_left_out: Tokens still to come that are not searched.
    """

    characters: Characters
    at: int = 0
    pending: tuple[int, ...] = ()
    n_left_out: int = 0


class Search:
    """Finds phrases in a stream of tokens.

    Args:
        phrases: At least one; each with the share of probability that stays.
        words: Only at the edges of words.
        fold: Without case.
        skip_tokens: So many first tokens are not searched.
        n_more: Characters of the text to keep besides those of the longest phrase.

    Raises:
        ValueError: No phrase, an empty one, or a share outside of [0, 1).
    """

    def __init__(
        self, phrases: Mapping[str, float], *, words: bool, fold: bool, skip_tokens: int = 0, n_more: int = 0
    ) -> None:
        self.words, self.fold, self.skip_tokens, self.n_more = words, fold, skip_tokens, n_more
        self.keeps: dict[str, float] = {}
        for phrase, keep in phrases.items():
            if not phrase or not 0 <= keep < 1:
                raise ValueError(f"{phrase!r}: {keep!r} is no phrase to ban; expected some text, and 0 <= keep < 1")
            folded = phrase.casefold() if fold else phrase
            self.keeps[folded] = min(keep, self.keeps.get(folded, 1.0))
        if not self.keeps:
            raise ValueError("there is no phrase to look for; expected at least one")
        self.longest = max(map(len, self.keeps))
        self._automaton = _automaton(tuple(self.keeps))

    def start(self, prompt: Prompt) -> Searched:
        """The state at the end of a prompt."""
        state = Searched(Characters(), n_left_out=self.skip_tokens)
        if self.skip_tokens:
            return state
        text = prompt.tail(4 * self.longest).decode("utf-8", "ignore")
        state, _ = self._read(state, text.encode())
        return state._replace(characters=state.characters._replace(tokens=None), pending=())

    def step(self, state: Searched, step: Step) -> tuple[Searched, list[Found]]:
        """The state one token later, and what is found with it."""
        if state.n_left_out > 0:
            return Searched(state.characters.broken(), n_left_out=state.n_left_out - 1), []
        if step.is_end or (step.is_special and not self._is_text(step.piece)):
            return Searched(state.characters.broken()), self._at_edge(state)
        return self._read(state, step.piece)

    def at_end(self, state: Searched) -> list[Found]:
        """What is found if the text ends here."""
        return self._at_edge(state)

    def hold(self, state: Searched) -> int:
        """How many of the last tokens an occurrence may have that is not complete."""
        return state.characters.n_tokens(max(self._open_depth(state), *state.pending, 0))

    def _read(self, state: Searched, piece: bytes) -> tuple[Searched, list[Found]]:
        characters, new = state.characters.extended(piece, self.longest + 1 + self.n_more, self.fold)
        found: list[Found] = []
        at, pending = state.at, state.pending
        before, data = state.characters.tail, state.characters.partial + piece
        for i, character in enumerate(new):
            if pending:
                if not is_word(character):
                    found += [self._found(before, new, i, length, data) for length in pending]
                pending = ()
            at = self._automaton.step(at, character)
            for length in self._automaton.lengths[at]:
                text = before + new[: i + 1]
                if not self._begins_at_edge(text, length):
                    continue
                if self.words and is_word(character):
                    pending = (*pending, length)
                else:
                    found.append(self._found(before, new, i + 1, length, data))
        return Searched(characters, at, pending), found

    def _at_edge(self, state: Searched) -> list[Found]:
        tail, partial = state.characters.tail, state.characters.partial
        return [self._found(tail, "", 0, length, partial) for length in state.pending]

    def _found(self, before: str, new: str, n_new: int, length: int, data: bytes) -> Found:
        """What ends with the first `n_new` of the characters `new`, which came with the bytes `data`."""
        phrase = (before + new[:n_new])[-length:]
        n_after = len(data) - n_bytes_of(data, n_new, self.fold)
        return Found(length + len(new) - n_new, n_after, self.keeps[phrase], phrase)

    def _begins_at_edge(self, text: str, length: int) -> bool:
        if not self.words or len(text) == length:
            return True
        return not (is_word(text[-length]) and is_word(text[-length - 1]))

    def _open_depth(self, state: Searched) -> int:
        """Length of the longest beginning of a phrase that the text ends with, and that began at an edge."""
        automaton, at, tail = self._automaton, state.at, state.characters.tail
        while at and not self._begins_at_edge(tail, automaton.depth[at]):
            at = automaton.fail(at)
        return automaton.depth[at]

    def _is_text(self, name: bytes) -> bool:
        text = name.decode("utf-8", "replace")
        text = text.casefold() if self.fold else text
        return any(text in phrase for phrase in self.keeps)


def _automaton(phrases: tuple[str, ...]) -> Automaton:
    """One for all searches for these phrases while any of them lives: it holds no state of theirs."""
    known = _AUTOMATA.get(phrases)
    if known is None:
        known = _AUTOMATA[phrases] = Automaton(phrases)
    return known


class Phrases(Rule[Searched]):
    """Takes back each of some phrases to its start.

    Args:
        phrases: What to ban; one string is one phrase. A mapping gives each phrase the share of its probability that
            stays: 0 bans it, 0.1 makes it ten times less probable wherever it comes.
        words: Only at the edges of words, where a phrase begins or ends in a word character.
        fold: Without case.
        keep: The share for all, if `phrases` is no mapping.
        skip_tokens: The first tokens of the text are not searched.

    Raises:
        ValueError: No phrase, an empty one, or a share outside of [0, 1).
    """

    def __init__(
        self,
        phrases: str | Sequence[str] | Mapping[str, float],
        *,
        words: bool = True,
        fold: bool = True,
        keep: float = 0.0,
        skip_tokens: int = 0,
    ) -> None:
        if isinstance(phrases, str):
            phrases = [phrases]
        shares = phrases if isinstance(phrases, Mapping) else dict.fromkeys(phrases, keep)
        self.search = Search(shares, words=words, fold=fold, skip_tokens=skip_tokens)

    def init(self, prompt: Prompt) -> Searched:
        return self.search.start(prompt)

    def step(self, state: Searched, step: Step) -> tuple[Searched, Verdict]:
        new, found = self.search.step(state, step)
        if not found:
            return new, Keep(self.search.hold(new))
        undo = undo_of(found, new.characters, Keep(self.search.hold(new)))
        is_edge = bool(state.pending) and not state.characters.partial and undo.keep == 0
        if is_edge and self._last(found).n_after == max(f.n_after for f in found):
            undo = undo._replace(siblings=ends_of_words(step.byte_vocab))
        return new, undo

    def end(self, state: Searched) -> Verdict:
        found = self.search.at_end(state)
        return undo_of(found, state.characters, KEEP) if found else KEEP

    @staticmethod
    def _last(found: Sequence[Found]) -> Found:
        return max(found, key=lambda f: (f.keep == 0, f.n_back))


def undo_of(found: Sequence[Found], characters: Characters, otherwise: Verdict) -> Undo:
    """The verdict on a token with which phrases were found: the ban that reaches furthest back, else all penalties."""
    bans = [f for f in found if f.keep == 0]
    chosen = max(bans or found, key=lambda f: f.n_back)
    keep = 0.0 if bans else math.prod(f.keep for f in found)
    n = max(1, characters.n_tokens(chosen.n_back))
    why = f"{chosen.text!r}" if bans else f"{chosen.text!r} (kept with probability {keep:g})"
    return Undo(n, keep=keep, why=why, tail=chosen.n_after, otherwise=otherwise)


def ends_of_words(vocab: Sequence[Token]) -> BoolRow:
    """(vocab,) bool: tokens whose first character belongs to no word, and special tokens; do not change it."""
    known = _ENDS.get(id(vocab))
    if known is None:
        known = _ENDS[id(vocab)] = vocab, np.array([_ends_word(token) for token in vocab])
        while len(_ENDS) > 8:
            del _ENDS[next(iter(_ENDS))]
    return known[1]


def _ends_word(token: Token) -> bool:
    if token.is_special or token.is_hole:
        return True
    text = token.byte_string.decode("utf-8", "replace")
    return bool(text) and text[0] != "\N{REPLACEMENT CHARACTER}" and not is_word(text[0])


def phrases(
    banned: str | Sequence[str] | Mapping[str, float],
    *,
    words: bool = True,
    fold: bool = True,
    keep: float = 0.0,
    skip_tokens: int = 0,
) -> Phrases:
    """A rule that bans phrases, or makes them less probable; see `Phrases`."""
    return Phrases(banned, words=words, fold=fold, keep=keep, skip_tokens=skip_tokens)
