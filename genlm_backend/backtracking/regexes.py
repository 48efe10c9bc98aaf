"""Regexes: bans, or penalises, texts that match a regular expression."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import regex

from genlm_backend.backtracking.characters import Characters, n_bytes_of
from genlm_backend.backtracking.phrases import Found, undo_of
from genlm_backend.backtracking.rules import KEEP, Keep, Prompt, Rule, Step, Verdict


class Seen(NamedTuple):
    """The end of the text, and the lengths from the end of matches that what follows may still make void."""

    characters: Characters
    pending: tuple[int, ...] = ()


class Regexes(Rule[Seen]):
    """Takes back whatever matches one of some expressions, to the start of the match.

    An expression is searched in the last `window` characters after each token. A match that ends with the text, and
    that the next character could make void (`So\\b` before "Some"), is judged at the next token.

    Args:
        patterns: Of the package `regex`, whose syntax is that of `re` and more; one string is one pattern.
        window: No match is longer. Text is held back for a partial match, at most so long.
        keep: The share of probability that stays; 0 bans.
        ignore_case: Without case.

    Raises:
        ValueError: A pattern is malformed, or matches the empty text.
    """

    def __init__(
        self, patterns: str | Sequence[str], *, window: int = 200, keep: float = 0.0, ignore_case: bool = False
    ) -> None:
        sources = [patterns] if isinstance(patterns, str) else list(patterns)
        flags = regex.IGNORECASE if ignore_case else 0
        try:
            self._patterns = [regex.compile(source, flags) for source in sources]
        except regex.error as error:
            raise ValueError(f"a pattern is malformed: {error}") from error
        for source, pattern in zip(sources, self._patterns, strict=True):
            if pattern.fullmatch(""):
                raise ValueError(f"the pattern {source!r} matches the empty text, so it would ban everything")
        if not 0 <= keep < 1:
            raise ValueError(f"keep is {keep!r}; expected 0 <= keep < 1")
        self._window, self._keep = window, keep

    def init(self, prompt: Prompt) -> Seen:
        tail = prompt.tail(4 * self._window).decode("utf-8", "ignore")[-self._window :]
        return Seen(Characters(tail))

    def step(self, state: Seen, step: Step) -> tuple[Seen, Verdict]:
        if step.is_end or step.is_special:
            found = self._final(state)
            return Seen(state.characters.broken()), self._verdict(found, state.characters.broken())
        characters, new = state.characters.extended(step.piece, self._window, fold=False)
        data = state.characters.partial + step.piece
        found, pending = [], []
        for pattern in self._patterns:
            match = pattern.search(characters.tail)
            if match is None or (match.end() <= len(characters.tail) - len(new) and not state.pending):
                continue  # nothing, or in the prompt alone
            length = len(characters.tail) - match.start()
            if match.end() == len(characters.tail) and self._may_be_void(pattern, characters.tail, match):
                pending.append(length)
            else:
                n_after = len(characters.tail) - match.end()
                n_bytes_after = len(data) - n_bytes_of(data, len(new) - n_after, fold=False)
                found.append(Found(length, n_bytes_after, self._keep, match.group()))
        seen = Seen(characters, tuple(pending))
        if found:
            return seen, self._verdict(found, characters)
        return seen, Keep(self._hold(seen))

    def end(self, state: Seen) -> Verdict:
        found = self._final(state)
        return undo_of(found, state.characters, KEEP) if found else KEEP

    def _final(self, state: Seen) -> list[Found]:
        tail, n_after = state.characters.tail, len(state.characters.partial)
        return [Found(length, n_after, self._keep, tail[-length:]) for length in state.pending]

    def _verdict(self, found: list[Found], characters: Characters) -> Verdict:
        return undo_of(found, characters, KEEP) if found else KEEP

    def _may_be_void(self, pattern: Any, text: str, match: Any) -> bool:
        """Whether the match depends on what follows it."""
        for following in ("a", " ", "."):
            longer = pattern.match(text + following, match.start())
            if longer is None:
                return True
        return False

    def _hold(self, seen: Seen) -> int:
        tail = seen.characters.tail
        depth = max(seen.pending, default=0)
        for pattern in self._patterns:
            match = pattern.search(tail, partial=True)
            if match is not None and match.partial:
                depth = max(depth, len(tail) - match.start())
        return seen.characters.n_tokens(depth)


def regexes(
    patterns: str | Sequence[str], *, window: int = 200, keep: float = 0.0, ignore_case: bool = False
) -> Regexes:
    """A rule that bans what matches an expression; see `Regexes`."""
    return Regexes(patterns, window=window, keep=keep, ignore_case=ignore_case)
