"""Rules that do more than forbid: replace text, avoid the obvious, adapt the temperature, ask a person.

What they give is the outcome of a procedure, no conditional of the model.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from genlm_backend.backtracking.distribution import Distribution
from genlm_backend.backtracking.phrases import Found, Search, Searched
from genlm_backend.backtracking.rules import (
    EVERYTHING,
    Choices,
    FloatRow,
    Keep,
    Prompt,
    Rule,
    Sees,
    Splice,
    Step,
    Undo,
    Verdict,
)

_PREFIX = 64  # characters of the token in which a phrase begins that can be kept before its replacement


class Replacing(NamedTuple):
    """Where the search is.

    Attributes:
        search: The end of the text.
        n_replaced: How often it replaced.
        probabilities: Of tokens, newest first, as nested pairs.
        n_tokens: How many the text has; not after a replacement, in which nothing is found.
    """

    search: Searched
    n_replaced: int = 0
    probabilities: tuple[float, Any] | None = None
    n_tokens: int = 0


class Replace(Rule[Replacing]):
    """Writes another text in the place of each of some phrases.

    Args:
        find: Phrases; see `phrases` for how they are found. Case counts.
        replace: What to write; it is not searched again by this rule.
        max_replacements: At most so many in one text.
        before: Only while the text has fewer tokens than this.
        skip_tokens: Not in the first so many tokens.
        max_prob: Only where the first token of what was found had at most this probability.
        words: Only at the edges of words.

    Raises:
        ValueError: No phrase, or an empty one.
    """

    is_procedure = True

    def __init__(
        self,
        find: str | Sequence[str],
        replace: str,
        *,
        max_replacements: int = sys.maxsize,
        before: int = sys.maxsize,
        skip_tokens: int = 0,
        max_prob: float = 1.0,
        words: bool = True,
    ) -> None:
        phrases = dict.fromkeys([find] if isinstance(find, str) else find, 0.0)
        self._search = Search(phrases, words=words, fold=False, skip_tokens=skip_tokens, n_more=_PREFIX)
        self._replace = replace
        self._max_replacements, self._before, self._max_prob = max_replacements, before, max_prob

    def init(self, prompt: Prompt) -> Replacing:
        return Replacing(self._search.start(prompt))

    def step(self, state: Replacing, step: Step) -> tuple[Replacing, Verdict]:
        p = math.exp(step.log_q) if not math.isnan(step.log_q) else 1.0
        search, found = self._search.step(state.search, step)
        new = Replacing(search, state.n_replaced, (p, state.probabilities), len(step.path))
        tail = search.characters.tail or state.search.characters.tail  # after the end of the text it is empty
        return new, self._splice(new, found, tail) or Keep(self._search.hold(search))

    def end(self, state: Replacing) -> Verdict:
        found, tail = self._search.at_end(state.search), state.search.characters.tail
        return self._splice(state, found, tail) or Keep()

    def _splice(self, state: Replacing, found: Sequence[Found], tail: str) -> Splice | None:
        """What to write for that of what was found which reaches furthest back; `tail` are the last characters."""
        if not found or state.n_replaced >= self._max_replacements or state.n_tokens >= self._before:
            return None
        furthest = max(found, key=lambda f: f.n_back)
        characters = state.search.characters
        n = max(1, characters.n_tokens(furthest.n_back))
        if self._probability(state, n) > self._max_prob:
            return None
        n_characters, chain = -bool(characters.partial), characters.tokens
        for _ in range(n):
            if chain is not None:
                n_characters, chain = n_characters + chain[0], chain[1]
        kept = tail[-n_characters : len(tail) - furthest.n_back] if n_characters > furthest.n_back else ""
        if kept.endswith(" ") and self._replace.startswith(" "):
            kept = kept[:-1]
        after = Replacing(Searched(characters.broken()._replace(tokens=None)), state.n_replaced + 1)
        why = f"{furthest.text!r} -> {self._replace!r}"
        return Splice(n, (kept + self._replace).encode(), state=after, why=why)

    def _probability(self, state: Replacing, n_back: int) -> float:
        p, chain = 1.0, state.probabilities
        for _ in range(n_back):
            if chain is None:
                return p
            p, chain = chain
        return p


class Daring(NamedTuple):
    """Where the walk may go back to.

    Attributes:
        eos: The tokens that end a text.
        choice: The place and the alternative of the last unusual choice, if there is one to go back to.
    """

    eos: tuple[int, ...]
    choice: tuple[int, int] | None = None


class Creative(Rule[Daring]):
    """Never the obvious token, unless that leads to where everything is as good.

    The most probable token is never drawn. Where the distribution is flat, the last unusual choice was a bad one: the
    walk goes back to it and takes the second most probable token there instead.

    Args:
        top_p_flat: A distribution is flat if it takes at least ...
        top_k_threshold_flat: ... so many tokens to reach this mass.
        eos_penalty: Multiplies the probability of the end.
    """

    sees = Sees.SUPPORT
    reach = EVERYTHING
    is_procedure = True

    def __init__(self, top_p_flat: float = 0.65, top_k_threshold_flat: int = 9, eos_penalty: float = 0.8) -> None:
        self._top_p, self._top_k = top_p_flat, top_k_threshold_flat
        self._log_penalty = math.log(eos_penalty) if eos_penalty > 0 else -math.inf

    def init(self, prompt: Prompt) -> Daring:
        return Daring(tuple(sorted(prompt.eos)))

    def warp(self, state: Daring, row: FloatRow) -> FloatRow:
        best = int(np.argmax(row))
        row = row.copy()
        if best not in state.eos:
            row[best] = -math.inf
        return row

    def reweigh(self, state: Daring, row: FloatRow) -> FloatRow:
        row = row.copy()
        row[list(state.eos)] += self._log_penalty
        return row

    def step(self, state: Daring, step: Step) -> tuple[Daring, Verdict]:
        dist = step.dist
        if dist is None or step.is_forced or dist.token_ids is None:
            return state, Keep()
        at, best = len(step.path) - 1, int(dist.token_ids[0])
        if step.token_id != best:
            state = state._replace(choice=(at, best))
        if state.choice is None or not self._is_flat(dist, state.eos):
            return state, Keep()
        place, token_id = state.choice
        after = state._replace(choice=None)
        return after, Splice(len(step.path) - place, token_ids=(token_id,), state=after, why="a flat place")

    def _is_flat(self, dist: Distribution, eos: Sequence[int]) -> bool:
        assert dist.token_ids is not None
        p = dist.probabilities.astype(np.float64)
        if self._log_penalty > -math.inf:
            p = np.where(np.isin(dist.token_ids, eos), p / math.exp(self._log_penalty), p)
        masses = np.cumsum(np.sort(p / p.sum())[::-1])
        return int(np.searchsorted(masses, self._top_p)) + 1 >= self._top_k


class AdaptiveTemperature(Rule[None]):
    """Sharpens a row by a polynomial of its entropy: `row * max(1, poly(H))` where H, in nats, is above 0.5.

    A function of the prefix, so mode `exact` conditions the model so changed.

    Args:
        poly_coeffs: From the highest power down.

    Source: Veličković et al. 2024, "softmax is not enough (for sharp out-of-distribution)", algorithm 1.
    """

    def __init__(self, poly_coeffs: Sequence[float] = (-0.037, 0.481, -2.3, 4.917, -1.791)) -> None:
        self._coefficients = [float(c) for c in poly_coeffs]

    @property
    def forbids(self) -> bool:
        return False

    def step(self, state: None, step: Step) -> tuple[None, Verdict]:
        return None, Keep()

    def warp(self, state: None, row: FloatRow) -> FloatRow:
        p = np.exp(row - row.max())
        p /= p.sum()
        entropy = float(-(p * np.log(p + 1e-9)).sum())
        beta = max(1.0, float(np.polyval(self._coefficients, entropy))) if entropy > 0.5 else 1.0
        return row * np.float32(beta)


Ask = Callable[[list[tuple[str, float | None]], str], int | Awaitable[int]]
"""From options (text, probability; None goes back) and the text so far to the index of the choice."""


class Human(Rule[None]):
    """A person, or anything else that is asked, chooses each token.

    Args:
        ask: Gets options and the text so far, gives the index of one; may be a coroutine function.
        decode: From tokens to text.
        top_k: So many best tokens are options, and to go back by one.
        min_autopass: A token at least so probable is taken without asking.
    """

    sees = Sees.SUPPORT
    reach = EVERYTHING
    is_procedure = True

    def __init__(
        self, ask: Ask, decode: Callable[[Sequence[int]], str], top_k: int = 3, min_autopass: float = 1.0
    ) -> None:
        self._ask, self._decode, self._top_k, self._min_autopass = ask, decode, top_k, min_autopass

    def step(self, state: None, step: Step) -> tuple[None, Verdict]:
        return None, Keep()

    async def choose(self, state: None, choices: Choices) -> int | Undo | Splice:
        best = choices.dist.top(self._top_k)
        if best[0][1] >= self._min_autopass:
            return best[0][0]
        options: list[tuple[str, float | None]] = [(self._decode([token_id]), p) for token_id, p in best]
        if choices.path:
            options.append(("Go back", None))
        chosen = self._ask(options, self._decode(choices.path))
        i = await chosen if inspect.isawaitable(chosen) else chosen
        return best[i][0] if i < len(best) else Undo(1, keep=1.0, why="the reader went back")


class Tell(Rule[None]):
    """Tells the best tokens at each draw, and changes nothing.

    Args:
        tell: Gets the best tokens and their probabilities.
        n: How many.
    """

    sees = Sees.SUPPORT

    def __init__(self, tell: Callable[[list[tuple[int, float]]], None], n: int = 2) -> None:
        self._tell, self._n = tell, n

    @property
    def forbids(self) -> bool:
        return False

    def step(self, state: None, step: Step) -> tuple[None, Verdict]:
        if step.dist is not None:
            self._tell(step.dist.top(self._n))
        return None, Keep()
