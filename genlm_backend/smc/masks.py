"""Masks that several particles want at once, made by one call: in parallel threads where the constraint can.

Constraints that may be used in any thread, such as grammars, are asked in a thread of their own, while the model
computes the rows that the masks are for: whoever takes a batch begins its masks, and only who draws waits for them.
"""

from __future__ import annotations

import _thread
import asyncio
import atexit
import threading
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import numpy as np

from genlm_backend.batching.scheduling import responsive_threads
from genlm_backend.packed_mask import WORD_BITS, LateMask, PackedMask, n_words
from genlm_backend.potentials.base import Constraint, State


class _Asked(NamedTuple):
    """The states of one particle, one for each constraint, and where its mask goes."""

    states: Sequence[State]
    answer: asyncio.Future[PackedMask]


class _Round:
    """What is asked late until somebody begins: states, and where all of their masks go."""

    def __init__(self) -> None:
        self.states: list[Sequence[State]] = []
        self.made: Future[Sequence[PackedMask | Exception]] = Future()
        self.has_begun = False


class Masks:
    """What constraints allow a model together; whatever is asked in one pass of an event loop is computed together.

    Args:
        constraints: One or more.
        eos_token_ids: The model's end tokens; each may be drawn where the constraints let the text end.

    Attributes:
        can_be_late: Whether `late` may be called: every constraint may be used in any thread.
    """

    def __init__(self, constraints: Sequence[Constraint], eos_token_ids: Collection[int]) -> None:
        self._constraints = constraints
        self.can_be_late = all(constraint.is_thread_safe for constraint in constraints)
        self._ends = sorted(eos_token_ids)
        # By loop: what an interrupted one left behind must not keep the next one waiting.
        self._waiting: WeakKeyDictionary[asyncio.AbstractEventLoop, list[_Asked]] = WeakKeyDictionary()
        self._lock = threading.Lock()
        self._round = _Round()
        self._n_making = 0
        self._is_idle = threading.Event()
        self._is_idle.set()
        _LIVE.add(self)

    def ask(self, states: Sequence[State]) -> asyncio.Future[PackedMask]:
        """Of `n_tokens`: the tokens that may be drawn; for the same states at once, the same object.

        Cancelled, it changes nothing for others; what a constraint raises reaches the particles whose states cause it.

        Args:
            states: One for each constraint.
        """
        loop = asyncio.get_running_loop()
        answer = loop.create_future()
        for closed in [other for other in self._waiting if other.is_closed()]:
            del self._waiting[closed]  # its futures would keep it
        waiting = self._waiting.setdefault(loop, [])
        if not waiting:
            loop.call_soon(self._answer, loop)
        waiting.append(_Asked(states, answer))
        return answer

    def late(self, states: Sequence[State]) -> LateMask:
        """As `ask`, but another thread makes it, together with all that is asked until one of them is begun."""
        with self._lock:
            late = LateMask(
                self._constraints[0].n_tokens,
                partial(self._begin, self._round),
                self._round.made,
                len(self._round.states),
            )
            self._round.states.append(states)
        return late

    def _begin(self, some: _Round) -> None:
        with self._lock:
            if some.has_begun:
                return
            some.has_begun = True
            self._round = _Round()
            self._n_making += 1
            self._is_idle.clear()
        try:
            # Not `Thread.start`, which waits until the thread runs: 1 ms beside a forward pass.
            _thread.start_new_thread(self._make, (some,))
        except Exception:  # no more threads are to be had, or no memory for one
            self._make(some)

    def _make(self, some: _Round) -> None:
        try:
            with responsive_threads():
                some.made.set_result(self._outcomes(some.states))
        except BaseException as error:  # no memory, for one; who waits must not wait for ever
            some.made.set_exception(_as_exception(error))
        finally:
            with self._lock:
                self._n_making -= 1
                if not self._n_making:
                    self._is_idle.set()

    def _answer(self, loop: asyncio.AbstractEventLoop) -> None:
        asked = [one for one in self._waiting.pop(loop) if not one.answer.done()]
        try:
            outcomes = self._outcomes([one.states for one in asked], (KeyboardInterrupt, SystemExit))
        except (KeyboardInterrupt, SystemExit) as error:
            for one in asked:
                one.answer.set_exception(_as_exception(error))
            raise
        for one, outcome in zip(asked, outcomes, strict=True):
            if isinstance(outcome, Exception):
                one.answer.set_exception(outcome)
            else:
                one.answer.set_result(outcome)

    def _outcomes(
        self, states: Sequence[Sequence[State]], leaves: tuple[type[BaseException], ...] = ()
    ) -> Sequence[PackedMask | Exception]:
        """A mask for each, or what its own states cause, unless it is of a kind that `leaves`."""
        try:
            return self._together(states)
        except leaves:
            raise
        except BaseException as error:  # a panic of Rust's is no Exception; who waits must not wait for ever
            if len(states) == 1:
                return [_as_exception(error)]
            return [outcome for one in states for outcome in self._outcomes([one], leaves)]

    def _together(self, states: Sequence[Sequence[State]]) -> Sequence[PackedMask]:
        keys = [tuple(map(id, of_particle)) for of_particle in states]  # copies of a particle have the same states
        different = dict(zip(keys, states, strict=True))
        rows = dict(zip(different, self._rows(list(different.values())), strict=True)) if different else {}
        return [rows[key] for key in keys]

    def _rows(self, states: Sequence[Sequence[State]]) -> list[PackedMask]:
        of_constraint = zip(self._constraints, zip(*states, strict=True), strict=True)
        first, *others = [constraint.packed_masks(its_states) for constraint, its_states in of_constraint]
        for other in others:
            first &= other
        n_tokens = self._constraints[0].n_tokens
        may_end = first[:, n_tokens // WORD_BITS] >> np.uint32(n_tokens % WORD_BITS) & np.uint32(1)
        for token_id in self._ends:
            word, bit = token_id // WORD_BITS, np.uint32(token_id % WORD_BITS)
            first[:, word] = first[:, word] & ~(np.uint32(1) << bit) | may_end << bit
        first[:, n_tokens // WORD_BITS] &= ~(np.uint32(1) << np.uint32(n_tokens % WORD_BITS))
        first.flags.writeable = False
        return [PackedMask(row, n_tokens) for row in first[:, : n_words(n_tokens)]]


_LIVE: WeakSet[Masks] = WeakSet()


@atexit.register
def _wait() -> None:
    """A thread that is inside Rust when the interpreter ends would take the process down."""
    for masks in list(_LIVE):
        masks._is_idle.wait()


def _as_exception(error: BaseException) -> Exception:
    """What a future takes: not StopIteration, and not what would look as if the particle itself had been stopped."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    try:
        told = f": {error}"
    except Exception:  # its own text raises
        told = ""
    wrapped = RuntimeError(f"a constraint raised {type(error).__name__}{told}")
    wrapped.__cause__ = error
    return wrapped
