"""walk: generation that can take tokens back, as one coroutine per text.

    outcome = await walk(llm, "Once upon a time", phrases(["tapestry"]), max_new_tokens=50, seed=1)
    outcomes = await asyncio.gather(*(walk(llm, prompt, rules, max_new_tokens=50, seed=i) for i in range(64)))
    async for event in walk(llm, prompt, rules): ...

A walk is a cursor on the tree of token prefixes. It asks the model for the distribution at the cursor, draws a token
and shows it to its rules (`rules`); a verdict moves the cursor on, or back to an ancestor, and removes the prefix at
fault from a private overlay of the tree (`overlay`). Nothing is cropped, copied or undone: the model answers for
whatever prefix it is asked about, and rule states belong to prefixes. Walks that wait at the same time are one batch.

What is sampled is chosen by `mode`. C is the event that no rule objects to any prefix of the text, q the model after
temperature and filters:

    exact    q given C. After each objection the cursor goes back to the prompt (no forward pass: those rows are known),
             and the removed mass counts at every prefix above. Nothing is final before the end.
    local    the cursor goes back as far as the rule says, and what was kept stays. Each redraw is q given the kept
             prefix and what was removed; the kept prefix itself is not reweighed.
    first    like local, but what is removed is the first token of what was taken back, whatever follows it
    mask     the cursor goes back by the last token only: q without the tokens to which a rule objects, at each step
    none     like local, but nothing is removed: the same tokens may come again, and only the budget ends the walk

Why a walk ends: below the prompt lies a finite tree (at most `max_new_tokens` deep), and in all modes but `none` each
objection removes a prefix of positive probability that nothing removed before. `none`, verdicts with `keep=1`, and
splices give no such guarantee; `Budget` bounds them, and everything else too. Where every token after the final part
is removed although filters left some tokens out, those come back for that one draw (not in mode `exact`).

Importance weights. `outcome.log_weight` w makes E[exp(w) f(text)] = sum over texts in C of p(text) f(text), with p the
model itself: a proper weight, so that a walk can be the proposal of a particle. It is there without rules; in modes
`exact` and `mask` with `weigh=True`, which goes on after the accepted text (or token) until a second one is accepted.
If b_0 ... b_m are the masses left when 0 ... m objections had been made, 1 / (1/b_0 + ... + 1/b_m) is an unbiased
estimate of the mass of C, independent of the text (derived in docs/backtracking/modes.md). Elsewhere it is None.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import logging
import math
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from genlm_backend import sampling
from genlm_backend.backtracking import overlay as tree
from genlm_backend.backtracking.distribution import (
    Distribution,
    Filters,
    Floats,
    alive_scores,
    best_of,
    draw,
    from_best,
    from_row,
    reweighed,
    scaled_row,
)
from genlm_backend.backtracking.lookup import looked_up
from genlm_backend.backtracking.rules import (
    EVERYTHING,
    KEEP,
    AllOf,
    BoolRow,
    Choices,
    Halt,
    Keep,
    Owned,
    Prompt,
    Sees,
    Splice,
    Step,
    Undo,
    Verdict,
    as_rule,
)
from genlm_backend.backtracking.stopping import StopStrings
from genlm_backend.backtracking.writing import bytes_of, text_of, whole_characters, write
from genlm_backend.errors import InvalidQuery, NoTokenAllowed, RuleRefused, WalkExhausted
from genlm_backend.llm.base import AsyncLM
from genlm_backend.llm.contexts import checked_ids
from genlm_backend.llm.queries import Draw, LogNormalizer, Logprobs, Query, Row, TopK

logger = logging.getLogger(__name__)

MODES = ("exact", "local", "first", "mask", "none")
WHEN_EXHAUSTED = ("stop", "raise", "accept")
_ROWS_KEPT = 2
_SUPPORTS_KEPT = 64
_LOG_GONE = math.log(tree.GONE)
_MOST_FORESEEN = 16  # tokens without an alternative that are asked about at once


class Budget(NamedTuple):
    """What a walk may spend; None is without bound.

    Attributes:
        undos: Times that tokens are taken back.
        draws: Tokens drawn in all, rejected ones included.
        prefixes: Different prefixes asked of the model, guesses included; each costs at most one token computed.
    """

    undos: int | None = 1000
    draws: int | None = None
    prefixes: int | None = None


class Token(NamedTuple):
    """A token was drawn.

    Attributes:
        token_id: Which.
        piece: Its bytes; of a special token, its name.
        logprob: Under the model, nats; NaN where a rule chose.
        log_q: Under the filtered distribution, before anything was removed, nats.
        n_final: How many tokens of the text are final now.
    """

    token_id: int
    piece: bytes
    logprob: float
    log_q: float
    n_final: int


class Retract(NamedTuple):
    """The last `n` tokens were taken back, for the reason `why`; `length` are left, `n_final` of them final."""

    n: int
    why: str
    n_final: int
    length: int


class Forced(NamedTuple):
    """A token was written by a rule, not drawn.

    Attributes:
        token_id: Which.
        piece: Its bytes.
        n_healed: So many of its first bytes rewrite a token that was there before, to join the text without a seam.
        why: What the rule says.
        n_final: As in `Token`.
    """

    token_id: int
    piece: bytes
    n_healed: int
    why: str
    n_final: int


class End(NamedTuple):
    """The text is complete; all of it is final.

    Attributes:
        reason: "eos", "length", "stop", a rule's own, or why nothing better could be found: "budget", "dead end".
        cut: How many of the text's last bytes are not part of it: a stop string and what follows.
        n_final: The number of tokens.
    """

    reason: str
    cut: int
    n_final: int


Event = Token | Retract | Forced | End


class Outcome(NamedTuple):
    """What a walk came to.

    Attributes:
        text: The new text, without special tokens and without what a stop string cut off.
        token_ids: The new tokens, an end token included.
        reason: As in `End`.
        logprob: Of the tokens under the model, nats; None if some were not drawn.
        log_q: Under the filtered distribution, nats; None likewise.
        log_weight: See the top of this file; None where there is none; -inf at a dead end.
        n_undos: How often tokens were taken back.
        n_draws: How many tokens were drawn, rejected ones included.
        n_prefixes: How many different prefixes were asked of the model: what an uncached engine computes.
        events: All of them.
        state: Of the rules at the end, to go on from with `walk(..., state=...)`.
    """

    text: str
    token_ids: list[int]
    reason: str
    logprob: float | None
    log_q: float | None
    log_weight: float | None
    n_undos: int
    n_draws: int
    n_prefixes: int
    events: list[Event]
    state: Any

    @property
    def is_complete(self) -> bool:
        """Whether no bound of the budget and no dead end cut it short."""
        return self.reason not in ("budget", "dead end")

    @property
    def forwards_per_token(self) -> float:
        """Prefixes asked per token that stayed; 1 without a rollback."""
        return self.n_prefixes / max(1, len(self.token_ids))


class Overlay:
    """What walks of one prompt have removed, to be shared by them: each makes the later ones cheaper.

    Only for mode `exact`, the same prompt, rules, temperature and filters. A walk reads it when it starts from the
    prompt, so concurrent walks stay exact.
    """

    def __init__(self) -> None:
        self.root = tree.WHOLE

    @property
    def alive(self) -> float:
        """The share of the model's texts that is left: at the end of many walks, an upper bound of the mass of C."""
        return self.root.alive


@dataclass(slots=True)
class _Path:
    """The tokens after the prompt, and what belongs to their prefixes: `states[i]`, `names[i]` are after i tokens."""

    states: list[Any]
    names: list[int]
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    log_qs: list[float] = field(default_factory=list)
    edges: list[float] = field(default_factory=list)
    log_masses: list[float] = field(default_factory=list)
    finals: list[int] = field(default_factory=lambda: [0])

    def append(self, token_id: int, state: Any, name: int, drawn: _Drawn) -> None:
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

    def copy(self) -> _Path:
        return _Path(*(list(getattr(self, name)) for name in self.__slots__))


class _Drawn(NamedTuple):
    """A token at the cursor. `edge` is its probability for the arithmetic of the overlay, 0 if it was not drawn;
    `log_mass` the log of what a mask left at the cursor.
    """

    token_id: int
    logprob: float
    log_q: float
    edge: float
    dist: Distribution | None
    log_mass: float = 0.0


_WRITTEN = _Drawn(-1, math.nan, math.nan, 0.0, None)


class _Exhausted(Exception):
    """There is nothing left to draw or to spend."""


def walk(
    llm: AsyncLM,
    prompt: str | Sequence[int],
    rules: Any = (),
    *,
    max_new_tokens: int = 100,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    stop: str | Sequence[str] = (),
    eos: Collection[int] | None = None,
    budget: Budget | None = None,
    when_exhausted: str = "stop",
    mode: str = "local",
    seed: int | None = None,
    lineage: tuple[int, ...] = (),
    overlay: Overlay | None = None,
    weigh: bool = False,
    hold: int | None = None,
    speculate: int = 0,
    state: Any = None,
    encode: Callable[[bytes], Sequence[int]] | None = None,
    lora_name: str | None = None,
) -> Walk:
    """One text, continuing a prompt under rules: an async iterator of events, and awaitable for its `Outcome`.

    Args:
        llm: The model.
        prompt: Text, or token ids.
        rules: A rule, a function of a `Step`, or several of them.
        max_new_tokens: Most tokens of the text; those taken back do not count.
        temperature: Divides log-probabilities; 0 takes the best token, by what is left of its probability.
        top_k: Draws among so many best tokens; 1 is greedy like temperature 0; None or 0 is all.
        top_p: Draws among the fewest best tokens that reach this mass.
        min_p: Draws among tokens at least so many times as probable as the best.
        stop: Strings before which the text ends.
        eos: Tokens that end the text; None takes the tokenizer's.
        budget: What may be spent; None is `Budget()`.
        when_exhausted: With the budget spent, or nothing left to draw: "stop" ends with the longest text that the rules
            accepted; "raise" raises; "accept" goes on without hearing objections.
        mode: What is sampled; see the top of this file.
        seed: Equal seeds give equal texts, whatever else runs; None takes a fresh one.
        lineage: Tells walks with one seed apart.
        overlay: Shared with other walks, in mode `exact`; None has its own.
        weigh: Estimate an importance weight, in modes `exact` and `mask`.
        hold: Most tokens that may be taken back at any time: a reader waits for no more, and rollbacks end there. None
            is as many as the rules can reach, one rollback after another; that is all of them for most rules that take
            back more than one token, and the length of the partial match for phrases.
        speculate: With each new prefix, ask also for up to so many of its continuations, as they stood in the text or
            prompt before; what a grammar forces is always asked along. The text stays the same; where it repeats
            itself, forward passes are saved. Good for few walks on an engine that computes a batch as one tree
            (`AsyncTransformer`): there a few more tokens cost little. Fewer are asked for where guesses were wrong.
        state: Of the rules at the prompt: the `state` of an outcome that this walk continues.
        encode: From the text of a splice to tokens; None takes the tokenizer.
        lora_name: The adapter.

    Returns:
        A walk that has not begun. Closing its iterator early, or cancelling, leaves nothing behind.

    Raises:
        InvalidQuery: An argument is out of its range.
        RuleRefused: A rule is a procedure, which mode `exact` cannot condition on; while it runs, a rule looks at
            logits and the model does not tell them.
        EmptyPrompt, TokenIdError, ContextTooLong: While it runs; see `AsyncLM`.
        WalkExhausted: While it runs, with `when_exhausted="raise"`.
    """
    if mode not in MODES:
        raise InvalidQuery(f"mode is {mode!r}; expected one of {', '.join(MODES)}")
    if when_exhausted not in WHEN_EXHAUSTED:
        raise InvalidQuery(f"when_exhausted is {when_exhausted!r}; expected one of {', '.join(WHEN_EXHAUSTED)}")
    if max_new_tokens < 0:
        raise InvalidQuery(f"max_new_tokens is {max_new_tokens!r}; expected 0 or more")
    if speculate < 0:
        raise InvalidQuery(f"speculate is {speculate!r}; expected 0 or more")
    if hold is not None and hold < 0:
        raise InvalidQuery(f"hold is {hold!r}; expected 0 or more, or None")
    if overlay is not None and mode != "exact":
        raise InvalidQuery("an overlay is shared in mode 'exact' only: elsewhere it belongs to the kept prefix")
    members = list(rules) if isinstance(rules, list | tuple) else [rules]
    strings = [stop] if isinstance(stop, str) else list(stop)
    if strings:
        members.append(StopStrings(strings))
    joined = AllOf([as_rule(member) for member in members])
    filters = Filters(temperature, top_k, top_p, min_p).check()
    if weigh and (mode not in ("exact", "mask") or filters.is_greedy or joined.chooses or joined.is_procedure):
        raise InvalidQuery("weigh=True is for modes 'exact' and 'mask', with draws, and rules that only forbid")
    if mode == "exact" and joined.is_procedure:
        names = joined.names(lambda member: member.is_procedure)
        raise RuleRefused(names, "mode 'exact'", "it writes or reshapes text, which is no condition; use mode='local'")
    setting = _Setting(
        llm=llm,
        prompt=tuple(_prompt_ids(llm, prompt)),
        eos=frozenset(_eos(llm) if eos is None else eos),
        rule=joined,
        filters=filters,
        max_new_tokens=max_new_tokens,
        budget=Budget() if budget is None else budget,
        when_exhausted=when_exhausted,
        mode=mode,
        seed=sampling.fresh_seed() if seed is None else seed,
        lineage=lineage,
        weigh=weigh,
        hold=EVERYTHING if hold is None else hold,
        speculate=speculate,
        state=state,
        encode=encode,
        adapter=lora_name,
    )
    return Walk(setting, Overlay() if overlay is None else overlay)


@dataclass(frozen=True, slots=True)
class _Setting:
    llm: AsyncLM
    prompt: tuple[int, ...]
    eos: frozenset[int]
    rule: AllOf
    filters: Filters
    max_new_tokens: int
    budget: Budget
    when_exhausted: str
    mode: str
    seed: int
    lineage: tuple[int, ...]
    weigh: bool
    hold: int
    speculate: int
    state: Any
    encode: Callable[[bytes], Sequence[int]] | None
    adapter: str | None


class Walk:
    """A walk, made by `walk`; runs once, when it is iterated or awaited.

    Attributes:
        token_ids: The tokens so far.
        n_final: How many of them are final.
    """

    def __init__(self, setting: _Setting, overlay: Overlay) -> None:
        self._set = setting
        self._overlay = overlay
        self._root = overlay.root
        prompt = Prompt(setting.prompt, setting.llm.byte_vocab, setting.eos)
        first = setting.rule.init(prompt) if setting.state is None else setting.state
        self._path = _Path([first], [0])
        self._best: _Path | None = None
        self.n_final = 0
        self._pending: deque[int] = deque()
        self._splice: Splice | None = None
        self._n_healed = 0
        self._wide: set[int] = set()  # names of prefixes at which the filters are lifted
        self._names: dict[tuple[int, int], int] = {}
        self._asked: set[int] = set()
        self._guessed: tuple[int, list[int]] = (0, [])  # where tokens were guessed last, and which
        self._n_guess = setting.speculate
        self._known: OrderedDict[int, Distribution] = OrderedDict()
        self._accepts_all = False
        self._events: list[Event] = []
        self.n_draws = 0
        self.n_undos = 0
        self._n_coins = 0
        self._rounds = [self._root.alive]  # the mass left at each start from the prompt
        self._masses: list[float] = []  # the mass left at each draw at the cursor, in mode `mask`
        self._first: tuple[_Path, str, int] | None = None
        self._end: End | None = None
        self._log_weight: float | None = None
        self._last: Distribution | None = None
        self._final_before_end = 0

    # ---- how it is used

    @property
    def token_ids(self) -> list[int]:
        """The tokens so far; the first `n_final` of them are final."""
        return list(self._path.ids)

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """The tokens that it continues."""
        return self._set.prompt

    def __aiter__(self) -> AsyncGenerator[Event, None]:
        return self._stream()

    async def _stream(self) -> AsyncGenerator[Event, None]:
        while self._end is None:
            for event in await self.advance():
                yield event

    def __await__(self) -> Generator[Any, None, Outcome]:
        return self.finish().__await__()

    async def finish(self) -> Outcome:
        """Walk to the end, from wherever it is.

        Raises:
            GenlmError: As `walk`.
        """
        while self._end is None:
            await self.advance()
        return self.outcome()

    async def advance(self) -> list[Event]:
        """Draw one token, or go one step back; nothing at the end. Cancelled while it waits, it has changed nothing.

        Raises:
            GenlmError: As `walk`.
        """
        if self._end is not None:
            return []
        try:
            told = await self._stepped()
        except _Exhausted as exhausted:
            told = self._given_up(str(exhausted))
        if self._first is not None:  # what comes after the first text only weighs it
            told = [event for event in told if isinstance(event, End)]
        for event in told:
            if isinstance(event, Retract):
                logger.info("took back %d tokens at %d: %s", event.n, event.length + event.n, event.why)
        self._events += told
        return told

    def take_back(self, n: int, why: str = "asked to") -> int:
        """Take back tokens on behalf of a caller, also after the end; how many there were that were not final."""
        if self._end is not None:
            self._end, self.n_final, self._log_weight = None, self._final_before_end, None
        n = min(n, len(self._path.ids) - self.n_final)
        if n > 0:
            retract = self._retract(len(self._path.ids) - n, why)
            logger.info("took back %d tokens at %d: %s", n, retract.length + n, why)
            self._events.append(retract)
        return n

    @property
    def is_done(self) -> bool:
        """Whether the text is complete."""
        return self._end is not None

    @property
    def last(self) -> Distribution | None:
        """What the last token was drawn from, before anything was removed; None unless a rule sees it."""
        return self._last

    def outcome(self) -> Outcome:
        """What the walk came to, or where it is: `reason` is "unfinished" then."""
        path, end = self._path, self._end
        is_drawn = not any(math.isnan(value) for value in path.logprobs)
        return Outcome(
            text=text_of(self._set.llm, path.ids, self._set.eos, end.cut if end else 0),
            token_ids=list(path.ids),
            reason=end.reason if end else "unfinished",
            logprob=math.fsum(path.logprobs) if is_drawn else None,
            log_q=math.fsum(path.log_qs) if is_drawn else None,
            log_weight=self._log_weight,
            n_undos=self.n_undos,
            n_draws=self.n_draws,
            n_prefixes=len(self._asked),
            events=list(self._events),
            state=path.states[-1],
        )

    async def text(self) -> AsyncIterator[str]:
        """The text piece by piece as it becomes final; never takes anything back.

        Raises:
            GenlmError: As `walk`.
        """
        written = b""
        async for event in self:
            cut = event.cut if isinstance(event, End) else 0
            final = bytes_of(self._set.llm, self._path.ids[: event.n_final], self._set.eos)
            final = final[: len(final) - cut]
            whole = len(final) if isinstance(event, End) else whole_characters(final)
            if whole > len(written):
                piece, written = final[len(written) : whole], final[:whole]
                yield piece.decode("utf-8", "replace")

    # ---- the loop

    async def _stepped(self) -> list[Event]:
        self._spend()
        path = self._path
        if len(path.ids) >= self._set.max_new_tokens:
            self._pending.clear()
            return await self._applied(self._effective(self._set.rule.end(path.states[-1])), ended="length")
        if self._pending:
            return await self._forced(self._pending.popleft())
        drawn = await self._at_cursor()
        if drawn is None:
            return self._climbed()
        if isinstance(drawn, Undo | Splice):
            return await self._applied(self._effective(drawn))
        return await self._appended(drawn)

    async def _appended(self, drawn: _Drawn) -> list[Event]:
        """Put a token that was drawn on the path, and do what the rules say."""
        path = self._path
        self._last = drawn.dist
        state, verdict = await _answer(self._set.rule.step(path.states[-1], self._step(drawn, path.ids)))
        path.append(drawn.token_id, state, self._name(path.names[-1], drawn.token_id), drawn)
        verdict = self._effective(verdict)
        if self._set.weigh and self._set.mode == "mask" and not _objects(verdict):
            path.log_masses[-1] = await self._log_mass_by_second_draw(drawn)
        if not _objects(verdict):
            self._masses.clear()
        piece = self._set.llm.byte_vocab[drawn.token_id].byte_string
        ended = "eos" if drawn.token_id in self._set.eos else ""
        if isinstance(verdict, Keep):
            self._keep(verdict.hold)
        told: list[Event] = [Token(drawn.token_id, piece, drawn.logprob, drawn.log_q, self.n_final)]
        return told + await self._applied(verdict, ended)

    async def _forced(self, token_id: int) -> list[Event]:
        """Put a token of a splice on the path. A rule may object; then the rest of the splice is not written."""
        path, splice = self._path, self._splice
        assert splice is not None
        owner = splice.state if isinstance(splice.state, Owned) else None
        drawn = _WRITTEN._replace(token_id=token_id)
        step = self._step(drawn, path.ids)._replace(muted=_muted(owner))
        state, verdict = await _answer(self._set.rule.step(path.states[-1], step))
        if owner is not None and not self._pending:
            state = self._set.rule.spliced(state, owner)
        path.append(token_id, state, self._name(path.names[-1], token_id), drawn)
        verdict = self._effective(verdict)
        n_healed, self._n_healed = self._n_healed, 0
        if isinstance(verdict, Keep):
            self._keep(verdict.hold)
        piece = self._set.llm.byte_vocab[token_id].byte_string
        told: list[Event] = [Forced(token_id, piece, n_healed, splice.why, self.n_final)]
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

    def _effective(self, verdict: Verdict) -> Verdict:
        """The verdict after what can overrule it: the prompt and final text, a penalty that was not exacted."""
        if self._accepts_all and isinstance(verdict, Splice):
            return KEEP
        if not isinstance(verdict, Undo):
            return verdict
        path = self._path
        undo = self._in_mode(verdict)
        fault = len(path.ids) - undo.late
        if self._accepts_all or fault <= self.n_final or undo.n < 1:
            return self._effective(verdict.otherwise)
        if 0 < undo.keep < 1:
            settled = tree.at(self._root, path.ids[self.n_final : fault]).settled
            if settled or self._uniform() < undo.keep:
                return self._effective(verdict.otherwise)
        return undo

    def _in_mode(self, undo: Undo) -> Undo:
        """How far it goes and what it removes, as the mode has it. Done twice it gives the same."""
        n_free = len(self._path.ids) - self.n_final
        n, late, keep = undo.n, undo.late, undo.keep
        if self._set.mode == "first":
            late = max(late, min(n, n_free) - 1)
        elif self._set.mode == "mask":
            n = 1
        elif self._set.mode == "none":
            keep = 1.0
        return undo._replace(n=min(max(n, late + 1), n_free), late=late, keep=keep)

    async def _undone(self, undo: Undo) -> list[Event]:
        path, start = self._path, self.n_final
        fault = len(path.ids) - undo.late
        if undo.keep < 1:
            siblings = None
            if undo.siblings is not None and undo.keep == 0:
                siblings = await self._siblings(undo.siblings, fault)
            self._remove(path.ids[start:fault], path.edges[start:fault], undo.keep, siblings)
        return [self._retract(0 if self._restarts else len(path.ids) - undo.n, undo.why)]

    def _climbed(self) -> list[Event]:
        """Nothing can be drawn at the cursor: lift its filters, or give the prefix up."""
        path, start = self._path, self.n_final
        filters = self._set.filters
        here = path.names[-1]
        is_at_floor = len(path.ids) == start
        may_widen = is_at_floor and not self._restarts
        if filters.truncates and may_widen and here not in self._wide:
            self._wide.add(here)
            self._known.pop(here, None)
            return []
        if is_at_floor or self._set.mode == "none" or (self._set.weigh and self._set.mode == "mask"):
            raise _Exhausted("dead end")
        self._remove(path.ids[start:], path.edges[start:], 0.0, None)
        return [self._retract(0 if self._restarts else len(path.ids) - 1, "no token left")]

    def _remove(self, path: Sequence[int], edges: Sequence[float], keep: float, siblings: tree.Siblings | None) -> None:
        self._root = tree.removed(self._root, path, edges, keep, siblings)
        if self._restarts:
            shared = self._overlay
            shared.root = self._root if self._set.weigh else tree.removed(shared.root, path, edges, keep, siblings)
            self._root = shared.root
            self._rounds.append(self._root.alive)

    def _retract(self, length: int, why: str) -> Retract:
        path = self._path
        n = len(path.ids) - length
        if self._best is None or len(path.ids) - 1 > len(self._best.ids):
            self._best = path.copy()
            self._best.cut(max(len(path.ids) - 1, self.n_final))
        path.cut(length)
        self._pending.clear()
        self._splice = None
        self._masses = self._masses if n == 1 and self._set.mode == "mask" else []
        self.n_undos += 1
        return Retract(n, why, self.n_final, length)

    async def _spliced(self, splice: Splice) -> list[Event]:
        path = self._path
        n = min(splice.n, len(path.ids) - self.n_final)
        base = len(path.ids) - n
        token_ids, n_healed = splice.token_ids, 0
        if not token_ids and splice.text:
            before = path.ids[base - 1] if base > self.n_final else None
            token_ids, n_healed = write(self._set.llm, splice.text, before, self._set.encode)
        base -= 1 if n_healed else 0
        node = tree.at(self._root, path.ids[self.n_final : base])
        for token_id in token_ids:
            node = node.child(token_id)
        if node.alive == 0:  # what it wants to write was objected to before
            undo = Undo(max(n, 1), why=f"{splice.why}: what it writes is banned")
            return await self._applied(self._effective(undo))
        told: list[Event] = []
        if base < len(path.ids):
            told.append(self._retract(base, splice.why))
        else:
            self.n_undos += 1
        self._pending = deque(token_ids)
        self._splice, self._n_healed = splice, n_healed
        if not token_ids:
            self._settle(splice)
        return told

    def _settle(self, splice: Splice) -> None:
        """A splice that writes nothing has its own state at once."""
        if isinstance(splice.state, Owned):
            self._path.states[-1] = self._set.rule.spliced(self._path.states[-1], splice.state)
        self._splice = None

    def _keep(self, hold: int) -> None:
        """What no rule can take back any more becomes final: like the prompt, it is below the root of the overlay."""
        if self._set.mode == "exact":
            return
        reach = self._set.rule.reach
        hold = max(hold, 0 if reach is None else reach - 1)
        n = len(self._path.ids)
        final = max(self._path.settle(hold), n - self._set.hold)
        if final > self.n_final:
            self._root = tree.at(self._root, self._path.ids[self.n_final : final])
            self.n_final = final

    def _finished(self, reason: str, cut: int) -> list[Event]:
        if self._set.weigh and self._restarts:
            if self._first is None:
                self._first = self._path.copy(), reason, cut
                self._path.cut(0)
                return []
            self._path, reason, cut = self._first
        self._log_weight = self._weighed()
        return self._ended(reason, cut)

    def _ended(self, reason: str, cut: int) -> list[Event]:
        self._final_before_end = self.n_final
        self.n_final = len(self._path.ids)
        self._end = End(reason, cut, self.n_final)
        return [self._end]

    def _weighed(self) -> float | None:
        path = self._path
        log_ratio = math.fsum(path.logprobs) - math.fsum(path.log_qs)
        if math.isnan(log_ratio) or self._set.filters.is_greedy:
            return None
        if not self._set.weigh:
            return None if self._set.rule.forbids else log_ratio
        if self._restarts:
            return log_ratio - math.log(sum(1 / alive for alive in self._rounds))
        return log_ratio + math.fsum(path.log_masses)

    def _given_up(self, reason: str) -> list[Event]:
        """The budget is spent, or nothing is left to draw."""
        if self._first is not None:  # there is a text, only its weight is unknown
            self._path, reason, cut = self._first
            return self._ended(reason, cut)
        if self._set.when_exhausted == "raise":
            raise WalkExhausted(reason, len(self._path.ids), self.n_undos, self.n_draws)
        if self._set.when_exhausted == "accept" and not self._accepts_all:
            self._accepts_all = True
            self._root = tree.WHOLE
            return []
        if not self._set.weigh:
            told = "a walk ended by %s after %d draws and %d rollbacks; its text is the longest that the rules accepted"
            logger.warning(told, reason, self.n_draws, self.n_undos)
        elif reason == "dead end":
            self._log_weight = -math.inf
        return self._to_best() + self._ended(reason, 0)

    def _to_best(self) -> list[Event]:
        """Go to the longest text that the rules accepted, also as a whole."""
        path, best = self._path, self._best
        if best is None or len(best.ids) <= len(path.ids):
            best = path.copy()
        while len(best.ids) > self.n_final and _objects(self._set.rule.end(best.states[-1])):
            best.cut(len(best.ids) - 1)
        common = 0
        while common < min(len(path.ids), len(best.ids)) and path.ids[common] == best.ids[common]:
            common += 1
        told: list[Event] = []
        if common < len(path.ids):
            told.append(Retract(len(path.ids) - common, "the longest text found", self.n_final, common))
        for token_id in best.ids[common:]:
            piece = self._set.llm.byte_vocab[token_id].byte_string
            told.append(Forced(token_id, piece, 0, "the longest text found", self.n_final))
        self._path = best
        return told

    def _spend(self) -> None:
        budget = self._set.budget
        spent = ((budget.undos, self.n_undos), (budget.draws, self.n_draws), (budget.prefixes, len(self._asked)))
        if not self._accepts_all and any(bound is not None and n > bound for bound, n in spent):
            raise _Exhausted("budget")

    # ---- drawing

    async def _at_cursor(self) -> _Drawn | Undo | Splice | None:
        path = self._path
        drawn = await self._drawn(path.ids, path.names[-1], path.states[-1], path.ids[self.n_final :])
        if self._set.mode == "mask" and isinstance(drawn, _Drawn):
            self._masses.append(math.exp(drawn.log_mass))
        return drawn

    async def _drawn(self, ids: list[int], name: int, state: Any, below: list[int]) -> _Drawn | Undo | Splice | None:
        """A token after `ids`, of which `below` are not final; None if there is none."""
        rule = self._set.rule
        node = tree.at(self._root, below)
        mask = rule.allowed(state) if self._set.mode == "mask" and rule.masks and not self._accepts_all else None
        if self._is_plain and node.is_whole and (mask is None or self._set.filters.temperature == 1):
            return await self._drawn_by_engine(ids, name, state, mask)
        dist = await self._distribution(ids, name, state)
        scores, log_mass = alive_scores(dist, node, mask)
        # A rest that differences left may be their rounding error; what a mask alone leaves is exact, however little.
        if log_mass == -math.inf or (log_mass < _LOG_GONE and not node.is_whole):
            return None
        if rule.chooses:
            return await self._chosen(dist, scores, ids, state)
        self.n_draws += 1
        if self._set.filters.is_greedy:
            token_id = best_of(dist, scores)
        else:
            token_id = draw(dist, scores, self._key())
        return None if token_id is None else self._as_drawn(dist, token_id, log_mass)

    async def _drawn_by_engine(self, ids: list[int], name: int, state: Any, mask: BoolRow | None) -> _Drawn | None:
        """The common case: no row leaves the engine, and a batch is drawn at once."""
        self.n_draws += 1
        query = Draw(self._key(), self._set.filters.temperature, mask)
        try:
            token_id, logprob, log_q = await self._query(ids, name, state, query)
        except NoTokenAllowed:
            return None
        if mask is None:
            log_q = logprob if self._set.filters.is_greedy else log_q
            return _Drawn(token_id, logprob, log_q, math.exp(log_q), None)
        return _Drawn(token_id, logprob, logprob, math.exp(logprob), None, logprob - log_q)

    def _as_drawn(self, dist: Distribution, token_id: int, log_mass: float) -> _Drawn:
        i = dist.index(token_id)
        assert i is not None
        log_q = float(dist.log_q[i])
        return _Drawn(token_id, float(dist.logprobs[i]), log_q, math.exp(log_q), dist, log_mass)

    async def _chosen(self, dist: Distribution, scores: Floats, ids: list[int], state: Any) -> _Drawn | Undo | Splice:
        left = scores > -math.inf
        token_ids = np.flatnonzero(left) if dist.token_ids is None else dist.token_ids[left]
        order = np.argsort(-dist.log_q[left], kind="stable")
        shown = Distribution(token_ids[order], dist.logprobs[left][order], dist.log_q[left][order])
        choice: Any = await self._set.rule.choose(state, Choices(shown, ids, self._set.llm.byte_vocab))
        if isinstance(choice, Undo | Splice):
            return choice
        self.n_draws += 1
        i = dist.index(int(choice))
        logprob = math.nan if i is None else float(dist.logprobs[i])
        return _Drawn(int(choice), -math.inf if math.isnan(logprob) else logprob, math.nan, 0.0, dist)

    async def _log_mass_by_second_draw(self, accepted: _Drawn) -> float:
        """Log of an unbiased estimate of the mass of the tokens that the rules accept; see the top of this file."""
        path, rule = self._path, self._set.rule
        ids, name, state = path.ids[:-1], path.names[-2], path.states[-2]
        below = ids[self.n_final :]
        while not rule.masks_all:
            drawn = await self._drawn(ids, name, state, below)
            assert isinstance(drawn, _Drawn), "the accepted token is still there"
            step = self._step(drawn, ids)
            _, verdict = await _answer(rule.step(state, step))
            if not (isinstance(verdict, Undo) and verdict.keep == 0):
                break
            self._root = tree.removed(
                self._root, [*below, drawn.token_id], [*path.edges[self.n_final : -1], drawn.edge]
            )
            node = tree.at(self._root, below)
            mask = rule.allowed(state) if rule.masks else None
            _, log_mass = alive_scores(await self._distribution(ids, name, state), node, mask)
            self._masses.append(math.exp(log_mass))
        return -math.log(sum(1 / mass for mass in self._masses))

    async def _distribution(self, ids: list[int], name: int, state: Any) -> Distribution:
        """What can be drawn after a prefix, before anything is removed."""
        known = self._known.get(name)
        if known is not None:
            self._known.move_to_end(name)
            return known
        rule, filters = self._set.rule, self._set.filters
        if name in self._wide:
            filters = Filters(filters.divisor)
        log_normalizer = await self._log_normalizer(ids, name, state) if rule.sees >= Sees.LOGITS else None
        if filters.top_k is not None and rule.sees < Sees.ROW and not rule.warps:
            k = min(filters.top_k, len(self._set.llm.byte_vocab))
            best = await self._query(ids, name, state, TopK(k))
            token_ids, logprobs = best.token_ids.cpu().numpy(), best.logprobs.cpu().numpy()
            possible = int(np.count_nonzero(logprobs > -math.inf))
            dist = from_best(token_ids[:possible], logprobs[:possible], filters, log_normalizer)
        else:
            row = (await self._query(ids, name, state, Row())).cpu().numpy()
            scaled = scaled_row(row, filters)
            if rule.warps:
                scaled = rule.warp(state, scaled.copy() if scaled is row else scaled)
            dist = from_row(row, scaled, filters, log_normalizer, rule.sees >= Sees.ROW)
            if rule.reweighs:
                dist = reweighed(dist, row, lambda q: rule.reweigh(state, q))
        self._remember(name, dist)
        return dist

    async def _query(self, ids: list[int], name: int, state: Any, query: Query) -> Any:
        """The model's answer about a prefix; about a new one, what is likely to be asked next is asked along."""
        whole = [*self._set.prompt, *ids]
        guess = [] if name in self._asked else self._guess(whole, ids, state)
        self._asked.add(name)
        if not guess:
            return await self._set.llm.query(whole, query, self._set.adapter)
        for token_id in guess:
            name = self._name(name, token_id)
            self._asked.add(name)
        guesses = ([*whole, *guess[:n]] for n in range(1, len(guess) + 1))
        rows = (self._set.llm.query(known, Logprobs(()), self._set.adapter) for known in guesses)
        along = [asyncio.ensure_future(row) for row in rows]
        try:
            return await self._set.llm.query(whole, query, self._set.adapter)
        finally:
            for row in along:
                row.cancel()
            await asyncio.gather(*along, return_exceptions=True)  # what is wrong with a guess is told if it comes true

    def _guess(self, whole: list[int], ids: list[int], state: Any) -> list[int]:
        """Tokens that may follow: what a rule foresees, then what is looked up, more if guesses came true before."""
        most = self._set.speculate
        guess = list(self._set.rule.foreseen(state)[:_MOST_FORESEEN]) if self._set.mode == "mask" else []
        if most:
            start, last = self._guessed
            if last:
                pairs = zip(last, ids[start:], strict=False)
                n_true = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
                self._n_guess = min(most, 2 * n_true + 1)
            guess += looked_up([*whole, *guess], self._n_guess)
        guess = guess[: self._set.max_new_tokens - len(ids) - 1]
        guess = list(itertools.takewhile(lambda token_id: token_id not in self._set.eos, guess))
        self._guessed = len(ids), guess
        return guess

    async def _log_normalizer(self, ids: list[int], name: int, state: Any) -> float:
        try:
            value = float(await self._query(ids, name, state, LogNormalizer()))
        except (InvalidQuery, NotImplementedError):
            value = math.nan
        if not math.isnan(value):
            return value
        names = self._set.rule.names(lambda member: member.sees >= Sees.LOGITS)
        reason = "it does not tell the model's own logits (the query LogNormalizer); take a rule that looks at"
        raise RuleRefused(names, type(self._set.llm).__name__, f"{reason} probabilities, or an engine that tells them")

    def _remember(self, name: int, dist: Distribution) -> None:
        if self._set.rule.warps:
            return  # what a rule made of it may depend on more than the prefix
        n_kept = _SUPPORTS_KEPT if len(dist.log_q) <= 1024 and dist.row is None else _ROWS_KEPT
        self._known[name] = dist
        while len(self._known) > n_kept:
            self._known.popitem(last=False)

    async def _siblings(self, siblings: BoolRow | Sequence[int], fault: int) -> tree.Siblings:
        path = self._path
        n_vocab = len(self._set.llm.byte_vocab)
        mask = np.zeros(n_vocab, np.bool_)
        chosen = np.asarray(siblings)
        mask[chosen if chosen.dtype == np.bool_ else chosen.astype(np.int64)] = True
        ids = path.ids[: fault - 1]
        dist = await self._distribution(ids, path.names[fault - 1], path.states[fault - 1])
        node = tree.at(self._root, ids[self.n_final :])
        q = dist.probabilities
        return tree.Siblings(mask, tree.sibling_mass(node, mask, path.ids[fault - 1], dist.token_ids, q))

    @property
    def _is_plain(self) -> bool:
        """Whether a draw by the engine tells all that is needed."""
        rule, filters = self._set.rule, self._set.filters
        return not (filters.truncates or rule.warps or rule.chooses) and rule.sees == Sees.TOKEN

    @property
    def _restarts(self) -> bool:
        return self._set.mode == "exact" and not self._set.filters.is_greedy

    def _step(self, drawn: _Drawn, before: Sequence[int]) -> Step:
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

    def _name(self, parent: int, token_id: int) -> int:
        """A number for a prefix, the same whenever the walk is there."""
        return self._names.setdefault((parent, token_id), len(self._names) + 1)

    def _key(self) -> int:
        return sampling.draw_key(self._set.seed, self._set.lineage, self.n_draws, "walk")

    def _uniform(self) -> float:
        self._n_coins += 1
        return sampling.draw_key(self._set.seed, self._set.lineage, self._n_coins, "walk coin") / 2**64


async def _answer(outcome: Any) -> tuple[Any, Verdict]:
    """What `step` gave, awaited where it is a coroutine."""
    answer: tuple[Any, Verdict] = await outcome if inspect.isawaitable(outcome) else outcome
    return answer


def _objects(verdict: Verdict) -> bool:
    return isinstance(verdict, Undo | Splice)


def _muted(owner: Owned | None) -> tuple[int, ...]:
    """Where in the composition the rule is that writes."""
    return () if owner is None else (owner.place, *_muted(owner.state if isinstance(owner.state, Owned) else None))


def _prompt_ids(llm: AsyncLM, prompt: str | Sequence[int]) -> Sequence[int]:
    if not isinstance(prompt, str):
        return checked_ids(prompt, len(llm.byte_vocab), None)
    return checked_ids(llm.tokenizer.encode(prompt), len(llm.byte_vocab), None)


def _eos(llm: AsyncLM) -> Collection[int]:
    eos = getattr(llm.tokenizer, "eos_token_id", None)
    return () if eos is None else (eos,)
