"""StopStrings: ends the text before the first occurrence of a string, wherever in a token it lies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from genlm_backend.backtracking.rules import Halt, Keep, Prompt, Rule, Step, Verdict


class Tail(NamedTuple):
    """The end of what is searched.

    Attributes:
        text: Its last bytes, with the names of special tokens.
        lengths: How many bytes each token added that may still belong to a stop string.
        shown: For each byte of `text`, 1 if it is in the text of the walk, 0 if it is of a name.
    """

    text: bytes
    lengths: tuple[int, ...] = ()
    shown: bytes = b""


class StopStrings(Rule[Tail]):
    """Halts where one of some strings is complete; the string and what follows it in the token are cut off.

    The names of special tokens are searched too, though they are not in the text: nothing is cut off for them.

    Args:
        strings: Not empty. Matched as bytes, in the new text only.

    Raises:
        ValueError: A string is empty.
    """

    def __init__(self, strings: Sequence[str | bytes]) -> None:
        encoded = [string.encode() if isinstance(string, str) else bytes(string) for string in strings]
        if not all(encoded):
            raise ValueError("a stop string is empty; expected at least one character")
        self.strings = tuple(dict.fromkeys(encoded))
        self._longest = max(map(len, self.strings))

    @property
    def forbids(self) -> bool:
        return False

    def init(self, prompt: Prompt) -> Tail:
        return Tail(b"")

    def step(self, state: Tail, step: Step) -> tuple[Tail, Verdict]:
        if step.is_end:
            return state, Keep()
        text = state.text + step.piece
        starts = [start for start in (text.find(string) for string in self.strings) if start >= 0]
        shown = state.shown + bytes([not step.is_special]) * len(step.piece)
        if starts:
            return state, Halt("stop", sum(shown[min(starts) :]))
        n_kept = min(len(text), self._longest - 1)
        text, shown = text[len(text) - n_kept :], shown[len(text) - n_kept :]
        lengths = (*state.lengths, len(step.piece))[-self._longest :]
        return Tail(text, lengths, shown), Keep(_n_tokens(lengths, self._partial(text)))

    def _partial(self, text: bytes) -> int:
        """Length of the longest end of `text` that begins a string."""
        lengths = range(min(len(text), self._longest - 1), 0, -1)
        return next((n for n in lengths if any(s.startswith(text[-n:]) for s in self.strings if len(s) > n)), 0)


def _n_tokens(lengths: Sequence[int], n_bytes: int) -> int:
    """How many of the last tokens cover so many bytes."""
    n = 0
    for length in reversed(lengths):
        if n_bytes <= 0:
            break
        n += 1
        n_bytes -= length
    return n
