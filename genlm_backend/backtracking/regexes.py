"""Regexes: bans, or penalises, texts that match a regular expression."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import regex

from genlm_backend.backtracking.characters import Characters, n_bytes_of
from genlm_backend.backtracking.phrases import Found, undo_of
from genlm_backend.backtracking.rules import KEEP, Keep, Prompt, Rule, Step, Verdict


class Undecided(NamedTuple):
    """What of the text matches one expression or not, depending on what follows; as lengths from the end.

    Attributes:
        matches: Matches that what follows may make void.
        beginning: The longest beginning of a match, or more; 0 if there is none.
    """

    matches: tuple[int, ...] = ()
    beginning: int = 0


class Seen(NamedTuple):
    """Where the search is.

    Attributes:
        characters: The end of the text.
        undecided: What is undecided of it, for each expression.
        n_new: How many of its characters came after the prompt, or after what is no text.
    """

    characters: Characters
    undecided: tuple[Undecided, ...]
    n_new: int = 0


class Regexes(Rule[Seen]):
    """Takes back whatever matches one of some expressions, to the start of the match.

    An expression is searched in the last `window` characters after each token. A match that ends with the text, and
    that the next character could make void (`So\\b` before "Some"), is judged at the next token. Each match counts
    once, whatever others of the prompt, or that a penalty left, are before it; of those that overlap the first.

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
        return self._from_here(Characters(tail))

    def step(self, state: Seen, step: Step) -> tuple[Seen, Verdict]:
        if step.is_end or step.is_special:
            seen, found = self._from_here(state.characters.broken()), self._final(state)
            return seen, undo_of(found, seen.characters, KEEP) if found else KEEP
        characters, new = state.characters.extended(step.piece, self._window, fold=False)
        text, data, n_new = characters.tail, state.characters.partial + step.piece, state.n_new + len(new)
        found, undecided = [], []
        for pattern, before in zip(self._patterns, state.undecided, strict=True):
            matches, now = _search(pattern, text, len(text) - len(new), len(text) - n_new, before)
            found += [self._found(match, len(new), data) for match in matches]
            undecided.append(now)
        hold = characters.n_tokens(max((n for now in undecided for n in (*now.matches, now.beginning)), default=0))
        seen = Seen(characters, tuple(undecided), n_new)
        return seen, undo_of(found, characters, Keep(hold)) if found else Keep(hold)

    def end(self, state: Seen) -> Verdict:
        found = self._final(state)
        return undo_of(found, state.characters, KEEP) if found else KEEP

    def _from_here(self, characters: Characters) -> Seen:
        """Nothing in the text so far is new, but a match may begin anywhere in it."""
        return Seen(characters, (Undecided(beginning=len(characters.tail)),) * len(self._patterns))

    def _final(self, state: Seen) -> list[Found]:
        tail, n_after = state.characters.tail, len(state.characters.partial)
        lengths = [max(undecided.matches) for undecided in state.undecided if undecided.matches]
        return [Found(length, n_after, self._keep, tail[-length:]) for length in lengths]

    def _found(self, match: Any, n_new: int, data: bytes) -> Found:
        """A match in a text whose last `n_new` characters came with the bytes `data`."""
        n_after = len(match.string) - match.end()
        n_bytes_after = len(data) - n_bytes_of(data, n_new - n_after, fold=False)
        return Found(len(match.string) - match.start(), n_bytes_after, self._keep, match.group())


def _search(pattern: Any, text: str, n_old: int, n_prompt: int, before: Undecided) -> tuple[list[Any], Undecided]:
    """The matches that are new with what comes after the first `n_old` characters, and what is undecided now.

    None that lies in the first `n_prompt` is new, and of those that end in the others the ones that were undecided.
    """
    was_undecided = *before.matches, before.beginning
    decided: list[Any] = []
    matches: list[int] = []
    for match in pattern.finditer(text, overlapped=True):
        if match.end() <= n_prompt or (match.end() <= n_old and n_old - match.start() not in was_undecided):
            continue
        if match.end() == len(text) and _may_be_void(pattern, match):
            matches.append(len(text) - match.start())
        elif not decided or match.start() >= decided[-1].end():
            decided.append(match)
    return decided, Undecided(tuple(matches), _beginning(pattern, text, max(0, n_old - max(was_undecided))))


def _may_be_void(pattern: Any, match: Any) -> bool:
    """Whether the match depends on what follows it."""
    return any(pattern.match(match.string + following, match.start()) is None for following in ("a", " ", "."))


def _beginning(pattern: Any, text: str, first: int) -> int:
    """Length of the longest end of a text with which a match may begin; what begins before `first` is known not to."""
    found = pattern.search(text, first, partial=True)
    if found is not None and not found.partial:  # a whole match hides what else there is
        tried = (pattern.match(text, start, partial=True) for start in range(first, len(text)))
        found = next((match for match in tried if match is not None and match.partial), None)
    return len(text) - found.start() if found is not None else 0


def regexes(
    patterns: str | Sequence[str], *, window: int = 200, keep: float = 0.0, ignore_case: bool = False
) -> Regexes:
    """A rule that bans what matches an expression; see `Regexes`."""
    return Regexes(patterns, window=window, keep=keep, ignore_case=ignore_case)
