"""Automaton: finds any of many phrases in a stream of text, one token at a time, by Aho and Corasick.

A state is a number; that of a prefix is all there is to remember, so a rollback is the older number. Existing packages
(pyahocorasick, ahocorasick_rs) search whole strings and keep their state to themselves.

Source: Aho, Corasick 1975, "Efficient string matching".
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class Automaton:
    """The longest beginning of any phrase that the text ends with, at each point of it.

    Args:
        phrases: Not empty; two that are equal count once.

    Attributes:
        depth: state -> length of that beginning; state 0 is the empty one.
        lengths: state -> lengths of all phrases that end here, longest first.
    """

    def __init__(self, phrases: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self.depth = [0]
        self.lengths: list[tuple[int, ...]] = [()]
        for phrase in phrases:
            self._insert(phrase)
        self._fail = [0] * len(self._next)
        self._link()

    def step(self, state: int, character: str) -> int:
        """The state one character later."""
        while state and character not in self._next[state]:
            state = self._fail[state]
        return self._next[state].get(character, 0)

    def fail(self, state: int) -> int:
        """The state of the next shorter beginning that the text ends with."""
        return self._fail[state]

    def _insert(self, phrase: str) -> None:
        state = 0
        for character in phrase:
            following = self._next[state].get(character)
            if following is None:
                following = len(self._next)
                self._next[state][character] = following
                self._next.append({})
                self.depth.append(self.depth[state] + 1)
                self.lengths.append(())
            state = following
        self.lengths[state] = (len(phrase),)

    def _link(self) -> None:
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            for character, following in self._next[state].items():
                queue.append(following)
                fail = self.step(self._fail[state], character)
                self._fail[following] = fail
                self.lengths[following] += self.lengths[fail]
