"""Loop: the steps of one walk: draw a token, ask the rules, go on or back, until the text ends."""

from __future__ import annotations

import inspect
import logging
import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from genlm_backend import sampling
from genlm_backend.backtracking import overlay as tree
from genlm_backend.backtracking.cursor import WRITTEN, Cursor, Drawn, Path, objects
from genlm_backend.backtracking.distribution import Distribution
from genlm_backend.backtracking.events import End, Event, Forced, Retract, Token
from genlm_backend.backtracking.proposal import Proposal
from genlm_backend.backtracking.rules import KEEP, BoolRow, Halt, Keep, Owned, Prompt, Splice, Step, Undo, Verdict
from genlm_backend.backtracking.settings import Settings
from genlm_backend.backtracking.writing import write
from genlm_backend.errors import RuleRefused, WalkExhausted

logger = logging.getLogger(__name__)


class _Exhausted(Exception):
    """There is nothing left to draw or to spend."""


class Loop:
    """The state of a walk, and its steps.

    Attributes:
        cursor: Where it is.
        proposal: What it draws from.
        end: How it ended; None while it goes on.
        last: What the last token was drawn from, before anything was removed; None unless a rule sees it.
        log_weight: See the top of `walk`; None where there is none, and before the end.
    """

    def __init__(self, settings: Settings, overlay: tree.Overlay) -> None:
        self._set = settings
        prompt = Prompt(settings.prompt, settings.llm.byte_vocab, settings.eos)
        state = settings.rule.init(prompt) if settings.state is None else settings.state
        self.cursor = Cursor(settings, overlay, state)
        self.proposal = Proposal(settings)
        self.end: End | None = None
        self.last: Distribution | None = None
        self.log_weight: float | None = None
        self._pending: deque[int] = deque()
        self._splice: Splice | None = None
        self._n_healed = 0
        self._accepts_all = False
        self._n_coins = 0
        self._log_masses: list[float] = []  # of what was left at each draw at the cursor, in mode `mask`
        self._first: tuple[Path, str, int] | None = None
        self._final_before_end = 0

    async def step(self) -> list[Event]:
        """Draw one token, or go one step back. Not to be used again once it was cancelled.

        Raises:
            GenlmError: As `walk`.
        """
        is_weighing = self._first is not None
        try:
            told = await self._stepped()
        except _Exhausted as exhausted:
            told = self._given_up(str(exhausted))
        if is_weighing:  # what comes after the first text only weighs it
            told = [event for event in told if isinstance(event, End)]
        return told

    def take_back(self, n: int, why: str) -> list[Retract]:
        """Take back n tokens, at most those that are not final, also after the end; nothing where there are none."""
        cursor = self.cursor
        if self.end is not None:
            self.end, cursor.n_final, self.log_weight = None, self._final_before_end, None
        n = min(n, len(cursor.path.ids) - cursor.n_final)
        return [self._retract(len(cursor.path.ids) - n, why)] if n > 0 else []

    async def _stepped(self) -> list[Event]:
        path = self.cursor.path
        self._check_budget()
        if len(path.ids) >= self._set.max_new_tokens:
            self._pending.clear()
            return await self._applied(self._effective(self._set.rule.end(path.states[-1])), ended="length")
        if self._pending:
            return await self._forced(self._pending.popleft())
        drawn = await self.proposal.drawn(path.end, self.cursor.node(), self._is_masked)
        if drawn is None:
            return self._climbed()
        if isinstance(drawn, Undo | Splice):
            return await self._applied(self._effective(drawn))
        if self._set.mode == "mask":
            self._log_masses.append(drawn.log_mass)
        return await self._appended(drawn)

    def _check_budget(self) -> None:
        n_undos, proposal = self.cursor.n_undos, self.proposal
        if not self._accepts_all and self._set.budget.is_spent(n_undos, proposal.n_draws, proposal.n_reached):
            raise _Exhausted("budget")

    async def _appended(self, drawn: Drawn) -> list[Event]:
        """Put a token that was drawn on the path, and do what the rules say."""
        self.last = drawn.dist
        verdict, ended = await self._judged(drawn)
        if self._set.weighs_tokens and not objects(verdict):
            log_mass = await self._log_mass_by_second_draw()
            self.cursor.path.log_masses[-1] = log_mass
        if not objects(verdict):
            self._log_masses.clear()
        piece = self._set.llm.byte_vocab[drawn.token_id].byte_string
        if isinstance(verdict, Keep):
            self.cursor.keep(verdict.hold)
        told: list[Event] = [Token(drawn.token_id, piece, drawn.logprob, drawn.log_q, self.cursor.n_final)]
        return told + await self._applied(verdict, ended)

    async def _judged(self, drawn: Drawn) -> tuple[Verdict, str]:
        """Put a token that was drawn on the path; the effective verdict on it, and why the text ends if it is kept.

        Where tokens have weights, one that leaves no room for another is asked at once whether the text may end: its
        weight is known when it is kept.
        """
        path, rule = self.cursor.path, self._set.rule
        state, verdict = await _answer(rule.step(path.states[-1], self._step(drawn, path.ids)))
        path.append(drawn.token_id, state, self.proposal.name(path.names[-1], drawn.token_id), drawn)
        verdict = self._effective(verdict)
        if drawn.token_id in self._set.eos:
            return verdict, "eos"
        if not self._set.weighs_tokens or not isinstance(verdict, Keep) or len(path.ids) < self._set.max_new_tokens:
            return verdict, ""
        at_end = self._effective(rule.end(state))
        return verdict if isinstance(at_end, Keep) else at_end, "length"

    async def _forced(self, token_id: int) -> list[Event]:
        """Put a token of a splice on the path. A rule may object; then the rest of the splice is not written."""
        path, splice = self.cursor.path, self._splice
        assert splice is not None
        owner = splice.state if isinstance(splice.state, Owned) else None
        drawn = WRITTEN._replace(token_id=token_id)
        step = self._step(drawn, path.ids)._replace(muted=_muted(owner))
        state, verdict = await _answer(self._set.rule.step(path.states[-1], step))
        if owner is not None and not self._pending:
            state = self._set.rule.spliced(state, owner)
        path.append(token_id, state, self.proposal.name(path.names[-1], token_id), drawn)
        verdict = self._effective(verdict)
        n_healed, self._n_healed = self._n_healed, 0
        if isinstance(verdict, Keep):
            self.cursor.keep(verdict.hold)
        piece = self._set.llm.byte_vocab[token_id].byte_string
        told: list[Event] = [Forced(token_id, piece, n_healed, splice.why, self.cursor.n_final)]
        if isinstance(verdict, Keep) and self._pending:
            return told
        return told + await self._applied(verdict, "eos" if token_id in self._set.eos else "")

    async def _applied(self, verdict: Verdict, ended: str = "") -> list[Event]:
        """Do what an effective verdict on the last token says; `ended` is why the text ends if it is kept."""
        match verdict:
            case Undo():
                return await self._undone(verdict)
            case Splice():
                return await self._spliced(verdict)
            case Halt(reason, cut):
                return self._finished(reason, cut)
        return self._finished(ended, 0) if ended else []

    async def _undone(self, undo: Undo) -> list[Event]:
        n_tokens = len(self.cursor.path.ids)
        await self._remove(undo)
        return [self._retract(0 if self._set.restarts else n_tokens - undo.n, undo.why, undo.late)]

    async def _remove(self, undo: Undo) -> None:
        fault = len(self.cursor.path.ids) - undo.late
        siblings = None
        if undo.siblings is not None and undo.keep == 0:
            siblings = await self._siblings(undo.siblings, fault)
        self.cursor.remove(fault, undo.keep, siblings)

    def _climbed(self) -> list[Event]:
        """Nothing can be drawn at the cursor: lift its filters, or give the prefix up."""
        cursor, restarts = self.cursor, self._set.restarts
        if cursor.is_at_floor and not restarts and self.proposal.widen(cursor.path.names[-1]):
            self._log_masses.clear()
            return []
        if cursor.is_at_floor or self._set.mode == "none" or self._set.weighs_tokens:
            raise _Exhausted("dead end")
        n_tokens = len(cursor.path.ids)
        cursor.remove(n_tokens, 0.0)
        return [self._retract(0 if restarts else n_tokens - 1, "no token left")]

    async def _spliced(self, splice: Splice) -> list[Event]:
        path = self.cursor.path
        n = min(splice.n, len(path.ids) - self.cursor.n_final)
        base = len(path.ids) - n
        token_ids, n_healed = splice.token_ids, 0
        if not token_ids and splice.text:
            before = path.ids[base - 1] if base > self.cursor.n_final else None
            token_ids, n_healed = write(self._set.llm, splice.text, before, self._set.encode)
        base -= 1 if n_healed else 0
        if tree.at(self.cursor.node(base), token_ids).alive == 0:  # what it wants to write was objected to before
            undo = Undo(max(n, 1), why=f"{splice.why}: what it writes is banned")
            return await self._applied(self._effective(undo))
        told: list[Event] = []
        if base < len(path.ids):
            told.append(self._retract(base, splice.why))
        else:
            self.cursor.n_undos += 1
        self._pending = deque(token_ids)
        self._splice, self._n_healed = splice, n_healed
        if not token_ids:  # a splice that writes nothing has its own state at once
            if isinstance(splice.state, Owned):
                path.states[-1] = self._set.rule.spliced(path.states[-1], splice.state)
            self._splice = None
        return told

    def _retract(self, length: int, why: str, late: int = 0) -> Retract:
        retract = self.cursor.retract(length, why, late)
        self._pending.clear()
        self._splice = None
        self._log_masses = self._log_masses if retract.n == 1 and self._set.mode == "mask" else []
        return retract

    # ---- the end

    def _finished(self, reason: str, cut: int) -> list[Event]:
        cursor = self.cursor
        if self._set.weigh and self._set.restarts:
            if self._first is None:
                self._first = cursor.path.copy(), reason, cut
                cursor.path.cut(0)
                return []
            cursor.path, reason, cut = self._first
        self.log_weight = self._weighed()
        return self._ended(reason, cut)

    def _ended(self, reason: str, cut: int) -> list[Event]:
        self._final_before_end = self.cursor.n_final
        self.cursor.n_final = len(self.cursor.path.ids)
        self.end = End(reason, cut, self.cursor.n_final)
        return [self.end]

    def _given_up(self, reason: str) -> list[Event]:
        """The budget is spent, or nothing is left to draw."""
        cursor = self.cursor
        if self._first is not None:  # there is a text, only its weight is unknown
            cursor.path, reason, cut = self._first
            return self._ended(reason, cut)
        if self._set.when_exhausted == "raise":
            raise WalkExhausted(reason, len(cursor.path.ids), self.cursor.n_undos, self.proposal.n_draws)
        if self._set.when_exhausted == "accept" and not self._accepts_all:
            self._accepts_all = True
            cursor.root = tree.WHOLE
            return []
        if not self._set.weigh:
            told = "a walk ended by %s after %d draws and %d rollbacks; its text is the longest that the rules accepted"
            logger.warning(told, reason, self.proposal.n_draws, self.cursor.n_undos)
        elif reason == "dead end":
            self.log_weight = -math.inf
        best = cursor.to_best(lambda state: objects(self._set.rule.end(state)))
        return best + self._ended(reason, 0)

    def _weighed(self) -> float | None:
        path = self.cursor.path
        log_ratio = math.fsum(path.logprobs) - math.fsum(path.log_qs)
        if math.isnan(log_ratio) or self._set.filters.is_greedy:
            return None
        if not self._set.weigh:
            return None if self._set.rule.forbids else log_ratio
        if self._set.restarts:
            return log_ratio - math.log(sum(1 / alive for alive in self.cursor.rounds))
        return log_ratio + math.fsum(path.log_masses)

    async def _log_mass_by_second_draw(self) -> float:
        """Log of an unbiased estimate of the mass of the tokens that the rules accept; see the top of `walk`."""
        has_room = len(self.cursor.path.ids) < self._set.max_new_tokens
        if not (self._set.rule.masks_all and has_room):  # of the end, which is asked without room, no mask tells
            accepted = self.cursor.path.copy()
            try:
                await self._accepted_again()
            finally:
                self.cursor.path = accepted
        lowest = min(self._log_masses)  # masses themselves may be too small for a float
        return lowest - math.log(sum(math.exp(lowest - log_mass) for log_mass in self._log_masses))

    async def _accepted_again(self) -> None:
        """Draw in the place of the last token, as it was drawn itself, until a second one is accepted."""
        cursor = self.cursor
        n_before = len(cursor.path.ids) - 1
        cursor.path.cut(n_before)
        self._log_masses.pop()  # the next draw has the same
        while True:
            self._check_budget()
            drawn = await self.proposal.drawn(cursor.path.end, cursor.node(), self._is_masked)
            if drawn is None:
                raise _Exhausted("dead end")
            assert isinstance(drawn, Drawn), "no rule chooses where tokens have weights"
            self._log_masses.append(drawn.log_mass)
            verdict, _ = await self._judged(drawn)
            if not isinstance(verdict, Undo):
                return
            await self._remove(verdict)
            cursor.retract(n_before, verdict.why)

    # ---- for these

    def _effective(self, verdict: Verdict) -> Verdict:
        """The verdict after what can overrule it.

        Raises:
            RuleRefused: The weight that was asked for cannot be had with it.
        """
        if not self._accepts_all:
            verdict = self.cursor.effective(verdict, self._coin)
            if self._set.weigh:
                self._check_weighable(verdict)
            return verdict
        while isinstance(verdict, Undo):
            verdict = verdict.otherwise
        return KEEP if isinstance(verdict, Splice) else verdict

    def _check_weighable(self, verdict: Verdict) -> None:
        is_late = self._set.weighs_tokens and isinstance(verdict, Undo) and verdict.late > 0
        if is_late or isinstance(verdict, Splice):
            names = self._set.rule.names(lambda member: member.forbids)
            why = "an objection to tokens before the last one: they have their weights; use mode='exact'"
            why = why if is_late else "text that was written has no weight"
            raise RuleRefused(names, f"weigh=True in mode {self._set.mode!r}", why)

    @property
    def _is_masked(self) -> bool:
        return self._set.mode == "mask" and self._set.rule.masks and not self._accepts_all

    async def _siblings(self, siblings: BoolRow | Sequence[int], fault: int) -> tree.Siblings:
        before = self.cursor.path.prefix(fault - 1)
        mask = np.zeros(len(self._set.llm.byte_vocab), np.bool_)
        chosen = np.asarray(siblings)
        mask[chosen if chosen.dtype == np.bool_ else chosen.astype(np.int64)] = True
        dist = await self.proposal.distribution(before)
        return tree.Siblings(mask, dist.token_ids, dist.probabilities)

    def _step(self, drawn: Drawn, before: Sequence[int]) -> Step:
        token = self._set.llm.byte_vocab[drawn.token_id]
        return Step(
            token_id=drawn.token_id,
            piece=token.byte_string,
            path=(*before, drawn.token_id),
            logprob=drawn.logprob,
            log_q=drawn.log_q,
            dist=drawn.dist,
            is_special=token.is_special,
            is_end=drawn.token_id in self._set.eos,
            byte_vocab=self._set.llm.byte_vocab,
        )

    def _coin(self) -> float:
        self._n_coins += 1
        return sampling.draw_key(self._set.seed, self._set.lineage, self._n_coins, "walk coin") / 2**64


async def _answer(outcome: Any) -> tuple[Any, Verdict]:
    """What `step` gave, awaited where it is a coroutine."""
    if type(outcome) is not tuple and inspect.isawaitable(outcome):
        outcome = await outcome
    state, verdict = outcome
    return state, verdict


def _muted(owner: Owned | None) -> tuple[int, ...]:
    """Where in the composition the rule is that writes."""
    return () if owner is None else (owner.place, *_muted(owner.state if isinstance(owner.state, Owned) else None))
