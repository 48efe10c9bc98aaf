"""Guesses: what may come next in a walk, and how much of it is worth asking the model about along with what is known.

A forward pass costs as much as some rows more, so a guess that comes true saves its walk a whole pass, shared with the
walks that wait for the same one; a guess that does not costs its row. What is worth it depends on how many walks there
are and on how likely the guess is, which is learned as the walk goes on, whether guesses are asked about or not.

Prompt lookup: Saxena, "Prompt Lookup Decoding", 2023; Yang et al., "Inference with Reference", arXiv:2304.04487.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np

PASS_IN_ROWS = 11
"""The fixed part of a forward pass, in rows of a large one: 38 ms and 3.5 ms for SmolLM2 in float32 on 2 AVX2 cores."""

_LONGEST = 8  # tokens at the end that are looked up; then fewer
_SHORTEST_OF_OTHERS = 3  # tokens at the end that must stand in another text
_PLACES_KEPT = 6  # of each three tokens
_MOST_KEPT = 1 << 15  # different three tokens, of all texts of one prompt; about 1 kB each
_FORESEEN = 0  # the kind of guess that a rule makes; others are named by how many tokens stood before it and before
# How often each kind is right before anything was learned, and how many guesses that counts for. Measured on a JSON
# object, a schema, prose and code by SmolLM2: 0.8, 0.13 - 0.33, 0.22 - 0.55, 0.24 - 0.69, 0.67 - 0.81, and so on.
_RIGHT_BEFORE = (0.8, 0.25, 0.45, 0.6, 0.75, 0.75, 0.75, 0.8, 0.9)
_PRIOR_WEIGHT = 4.0


class _Guess(NamedTuple):
    token_id: int
    kind: int


class _Place(NamedTuple):
    """Where three tokens in a row were: the walk, its text, and where in it the third of them is."""

    writer: object
    text: list[int]
    at: int


class Siblings:
    """Texts that are being written after one prompt; each is looked up by the others, which say much the same.

    For any thread. Of the oldest and longest ones only the end is kept.
    """

    def __init__(self) -> None:
        self._places: dict[tuple[int, ...], deque[_Place]] = {}  # in the order of their last use
        self._lock = threading.Lock()

    def tell(self, writer: object, known: list[int], ids: Sequence[int]) -> list[int]:
        """Remember a text; what is kept of it, to be given as `known` the next time.

        Args:
            writer: Whose text it is.
            known: What this gave for an earlier state of the text; [] at first.
            ids: The text now.
        """
        n_same = min(len(known), len(ids))
        if known != list(ids[: len(known)]):  # something was taken back: what others have seen of it stays as it was
            n_same = next((i for i in range(n_same) if known[i] != ids[i]), n_same)
            known = list(ids[:n_same])
        known += ids[n_same:]
        with self._lock:
            for at in range(max(n_same, _SHORTEST_OF_OTHERS - 1), len(known)):
                self._keep(tuple(known[at - _SHORTEST_OF_OTHERS + 1 : at + 1]), _Place(writer, known, at))
        return known

    def looked_up(self, writer: object, ids: Sequence[int], n: int) -> tuple[int, list[int]]:
        """How many tokens at the end of `ids` stand in another walk's text, at least 3, and up to n that follow there.

        0 and [] if none do; the most, of equals the last place.
        """
        best: tuple[int, list[int]] = 0, []
        for its_writer, text, at in reversed(tuple(self._places.get(tuple(ids[-_SHORTEST_OF_OTHERS:]), ()))):
            width = _SHORTEST_OF_OTHERS
            while width < min(_LONGEST, at + 1, len(ids)) and text[at - width] == ids[-1 - width]:
                width += 1
            if its_writer is not writer and width > best[0] and at + 1 < len(text):
                best = width, text[at + 1 : at + 1 + n]
        return best

    def _keep(self, tokens: tuple[int, ...], place: _Place) -> None:
        places = self._places.pop(tokens, None) or deque(maxlen=_PLACES_KEPT)
        places.append(place)
        self._places[tokens] = places
        if len(self._places) > _MOST_KEPT:
            del self._places[next(iter(self._places))]


class Guesses:
    """The guesses of one walk.

    Args:
        most: Tokens that are looked up at a time; what rules foresee comes before them.
        siblings: The texts of other walks.
    """

    def __init__(self, most: int, siblings: Siblings | None = None) -> None:
        self._most = most
        self._siblings = siblings or Siblings()
        self._writer = object()
        self._told: list[int] = []
        self._n_right = [_PRIOR_WEIGHT * right for right in _RIGHT_BEFORE]
        self._n_made = [_PRIOR_WEIGHT] * len(_RIGHT_BEFORE)
        self._last: tuple[list[int], list[_Guess]] = [], []  # after which tokens guesses were made last, and which

    def after(
        self,
        prompt: Sequence[int],
        ids: Sequence[int],
        foreseen: Sequence[int],
        ends: Collection[int],
        n_room: int,
        n_walks: float,
    ) -> list[int]:
        """Tokens that are worth asking about along with what follows `ids`.

        Args:
            prompt: Before `ids`.
            ids: The walk's own tokens.
            foreseen: By its rules.
            ends: No guess is one of these, or comes after one.
            n_room: At most so many.
            n_walks: How many share a forward pass.
        """
        self._learn(ids)
        guesses = [_Guess(token_id, _FORESEEN) for token_id in foreseen]
        if self._most:
            self._told = self._siblings.tell(self._writer, self._told, ids)
            whole = [*prompt, *ids, *foreseen]
            own, of_others = looked_up(whole, self._most), self._siblings.looked_up(self._writer, whole, self._most)
            width, found = max(own, of_others, key=lambda guess: guess[0])
            guesses += [_Guess(token_id, min(width + i, _LONGEST)) for i, token_id in enumerate(found)]
        guesses = list(itertools.takewhile(lambda guess: guess.token_id not in ends, guesses[:n_room]))
        self._last = list(ids), guesses
        return [guess.token_id for guess in self._worth(guesses, n_walks)]

    def _worth(self, guesses: Sequence[_Guess], n_walks: float) -> Iterator[_Guess]:
        right = 1.0
        for guess in guesses:
            right *= self._n_right[guess.kind] / self._n_made[guess.kind]
            if right * PASS_IN_ROWS < (1.0 - right) * n_walks:
                return
            yield guess

    def _learn(self, ids: Sequence[int]) -> None:
        """Compare the last guesses with what came; what was taken back, or follows a wrong one, teaches nothing."""
        before, guesses = self._last
        if list(ids[: len(before)]) != before:
            return
        for guess, token_id in zip(guesses, ids[len(before) :], strict=False):
            self._n_made[guess.kind] += 1
            if guess.token_id != token_id:
                return
            self._n_right[guess.kind] += 1


def looked_up(ids: Sequence[int], n: int) -> tuple[int, list[int]]:
    """How many tokens at the end stood before, and the n that followed at their last place; 0 and [] if none did.

    The longest end that stood before counts, of up to eight tokens. A place less than n before the end is a cycle, and
    the guess goes round in it.
    """
    known = np.asarray(ids)
    width, places = 0, np.arange(len(known) - 1)  # of the last tokens of what is the same as the end
    while width < min(_LONGEST, len(known) - 1):
        longer = places[places >= width]
        longer = longer[known[longer - width] == known[-1 - width]]
        if not len(longer):
            break
        width, places = width + 1, longer
    if not width or n < 1:
        return 0, []
    return width, np.resize(known[places[-1] + 1 :], n).tolist()
