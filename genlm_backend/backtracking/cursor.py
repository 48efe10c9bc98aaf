"""Cursor: where a walk is on the tree of prefixes, what was removed there, and which of its tokens are final."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from genlm_backend.backtracking import overlay as tree
from genlm_backend.backtracking.distribution import Distribution
from genlm_backend.backtracking.events import Event, Forced, Retract
from genlm_backend.backtracking.rules import Splice, Undo, Verdict
from genlm_backend.backtracking.settings import Settings


class Drawn(NamedTuple):
    """A token at the cursor. `edge` is its probability for the arithmetic of the overlay, 0 if it was not drawn;
    `log_mass` the log of what a mask left at the cursor.
    """

    token_id: int
    logprob: float
    log_q: float
    edge: float
    dist: Distribution | None
    log_mass: float = 0.0


WRITTEN = Drawn(-1, math.nan, math.nan, 0.0, None)
"""A token that a rule wrote; its id is to be filled in."""


class Prefix(NamedTuple):
    """Tokens after the prompt, not to be changed; a number that stands for them; the state of the rules after them."""

    ids: Sequence[int]
    name: int
    state: Any


@dataclass(slots=True)
class Path:
    """The tokens after the prompt, and what belongs to their prefixes: `states[i]`, `names[i]` are after i tokens."""

    states: list[Any]
    names: list[int]
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    log_qs: list[float] = field(default_factory=list)
    edges: list[float] = field(default_factory=list)
    log_masses: list[float] = field(default_factory=list)
    finals: list[int] = field(default_factory=lambda: [0])

    def append(self, token_id: int, state: Any, name: int, drawn: Drawn) -> None:
        """One token more."""
        self.ids.append(token_id)
        self.states.append(state)
        self.names.append(name)
        self.logprobs.append(drawn.logprob)
        self.log_qs.append(drawn.log_q)
        self.edges.append(drawn.edge)
        self.log_masses.append(drawn.log_mass)
        self.finals.append(0)

    def cut(self, n: int) -> None:
        """Keep the first n tokens."""
        for entries in (self.ids, self.logprobs, self.log_qs, self.edges, self.log_masses):
            del entries[n:]
        for per_prefix in (self.states, self.names, self.finals):
            del per_prefix[n + 1 :]

    def settle(self, hold: int) -> int:
        """How many tokens no chain of rollbacks can reach any more, the last `hold` of all being open to one.

        What a rollback leads to has tokens of its own that may still be taken back, as they were when it was the end.
        """
        n = len(self.ids)
        first = max(0, n - hold)
        self.finals[n] = min([first, *self.finals[first:n]])
        return self.finals[n]

    def copy(self) -> Path:
        """A path of its own lists."""
        return Path(*(list(getattr(self, name)) for name in self.__slots__))

    @property
    def end(self) -> Prefix:
        """All of it; its tokens are the path's own list."""
        return Prefix(self.ids, self.names[-1], self.states[-1])

    def prefix(self, n: int) -> Prefix:
        """Its first n tokens."""
        return Prefix(self.ids[:n], self.names[n], self.states[n])


class Cursor:
    """The path of a walk, and what was removed from the tree below the final part of it.

    Attributes:
        path: The tokens after the prompt.
        n_final: How many of them no rule can take back any more.
        root: What is left of the tree below those.
        n_undos: How often tokens were taken back.
        rounds: The mass left at each start from the prompt.
    """

    def __init__(self, settings: Settings, overlay: tree.Overlay, state: Any) -> None:
        self._set, self._overlay = settings, overlay
        self.path = Path([state], [0])
        self.n_final = 0
        self.root = overlay.root
        self.n_undos = 0
        self.rounds = [overlay.root.alive]
        self._best: Path | None = None

    def node(self, length: int | None = None) -> tree.Node:
        """What is left of the first `length` tokens; None is all."""
        return tree.at(self.root, self.path.ids[self.n_final : length])

    @property
    def is_at_floor(self) -> bool:
        """Whether all of the path is final."""
        return len(self.path.ids) == self.n_final

    def remove(self, length: int, keep: float, siblings: tree.Siblings | None = None) -> None:
        """Leave the share `keep` of the probability of the first `length` tokens, after an objection.

        Args:
            length: Of the prefix, more than `n_final`.
            keep: 0 bans it; 1 leaves all.
            siblings: Also removed.
        """
        restarts, weigh = self._set.restarts, self._set.weigh
        if keep < 1:
            path, edges = self.path.ids[self.n_final : length], self.path.edges[self.n_final : length]
            root = self._overlay.root if restarts and not weigh else self.root
            self.root = tree.removed(root, path, edges, keep, siblings)
            if restarts:
                self._overlay.root = self.root
        if restarts:
            self.rounds.append(self.root.alive)

    def retract(self, length: int, why: str, late: int = 0) -> Retract:
        """Go back to the first `length` tokens.

        Args:
            length: At least `n_final`.
            why: For the trace.
            late: The prefix at fault ends so many tokens before the newest one; nothing longer was accepted.
        """
        path, best = self.path, self._best
        n = len(path.ids) - length
        n_good = max(len(path.ids) - 1 - late, self.n_final)
        if late and best is not None and n_common(best.ids, path.ids) > n_good:
            best.cut(n_good)
        if best is None or n_good > len(best.ids):
            self._best = path.copy()
            self._best.cut(n_good)
        path.cut(length)
        self.n_undos += 1
        return Retract(n, why, self.n_final, length)

    def keep(self, hold: int) -> None:
        """What no rule can take back any more becomes final: like the prompt, it is below the root of the overlay."""
        if self._set.mode == "exact":
            return
        reach = self._set.rule.reach
        hold = max(hold, 0 if reach is None else reach - 1)
        final = max(self.path.settle(hold), len(self.path.ids) - self._set.hold)
        if final > self.n_final:
            self.root = self.node(final)
            if self._best is not None and self._best.ids[self.n_final : final] != self.path.ids[self.n_final : final]:
                self._best = None
            self.n_final = final

    def to_best(self, objects: Callable[[Any], bool]) -> list[Event]:
        """Go to the longest text that the rules accepted, also as a whole; `objects` says of a state if they do not."""
        path, best = self.path, self._best
        if best is None or len(best.ids) <= len(path.ids):
            best = path.copy()
        while len(best.ids) > self.n_final and objects(best.states[-1]):
            best.cut(len(best.ids) - 1)
        common = n_common(path.ids, best.ids)
        told: list[Event] = []
        if common < len(path.ids):
            told.append(Retract(len(path.ids) - common, "the longest text found", self.n_final, common))
        for token_id in best.ids[common:]:
            piece = self._set.llm.byte_vocab[token_id].byte_string
            told.append(Forced(token_id, piece, 0, "the longest text found", self.n_final))
        self.path, self._best = best, None
        return told

    def in_mode(self, undo: Undo) -> Undo:
        """How far an objection goes and what it removes, as the mode has it. Done twice it gives the same."""
        n_free = len(self.path.ids) - self.n_final
        n, late, keep, siblings = undo.n, undo.late, undo.keep, undo.siblings
        if self._set.mode == "first":
            late = max(late, min(n, n_free) - 1)
            siblings = siblings if late == undo.late else None  # of another place
        elif self._set.mode == "mask":
            n = 1
        elif self._set.mode == "none":
            keep = 1.0
        return undo._replace(n=min(max(n, late + 1), n_free), late=late, keep=keep, siblings=siblings)

    def effective(self, verdict: Verdict, coin: Callable[[], float]) -> Verdict:
        """The verdict after what can overrule it: the prompt and final text, a penalty that was not exacted.

        Args:
            verdict: On the last token.
            coin: Gives a number in [0, 1), where a penalty is to be exacted or not.
        """
        while isinstance(verdict, Undo):
            undo = self._with_penalties(self.in_mode(verdict))
            fault = len(self.path.ids) - undo.late
            if fault > self.n_final and undo.n >= 1:
                if not 0 < undo.keep < 1 or not (self.node(fault).settled or coin() < undo.keep):
                    return undo
            verdict = undo.otherwise
        return verdict

    def _with_penalties(self, undo: Undo) -> Undo:
        """A penalty together with those that come after it and are on the same prefix, which is settled only once."""
        while 0 < undo.keep < 1 and isinstance(undo.otherwise, Undo):
            also = self.in_mode(undo.otherwise)
            if not 0 < also.keep < 1 or also.late != undo.late:
                break
            undo = undo._replace(keep=undo.keep * also.keep, otherwise=also.otherwise)
        return undo


def objects(verdict: Verdict) -> bool:
    """Whether it takes tokens back or writes."""
    return isinstance(verdict, Undo | Splice)


def n_common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many of the first tokens are the same."""
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)
