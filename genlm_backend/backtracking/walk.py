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
model itself: a proper weight, so that a walk can be the proposal of a particle. Texts that top-k, top-p or min-p leave
out are missing from the sum; one with penalties counts with the product of their shares. It is there without rules; in
modes `exact` and `mask` with `weigh=True`, which goes on after the accepted text (or token) until a second one is
accepted. If b_0 ... b_m are the masses left after 0 ... m objections, 1 / (1/b_0 + ... + 1/b_m) is an unbiased
estimate of the mass of C, independent of the text (docs/backtracking/modes.md derives it). Elsewhere it is None.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Generator, Sequence
from typing import Any

from genlm_backend import sampling
from genlm_backend.backtracking.distribution import Distribution, Filters
from genlm_backend.backtracking.events import End, Event, Forced, Outcome, Retract, Token
from genlm_backend.backtracking.loop import Loop
from genlm_backend.backtracking.overlay import Overlay
from genlm_backend.backtracking.rules import EVERYTHING, AllOf, as_rule
from genlm_backend.backtracking.settings import MODES, WHEN_EXHAUSTED, Budget, Settings
from genlm_backend.backtracking.stopping import StopStrings
from genlm_backend.backtracking.writing import bytes_of, text_of, whole_characters
from genlm_backend.errors import InvalidQuery
from genlm_backend.llm.base import AsyncLM
from genlm_backend.llm.contexts import checked_ids

__all__ = [
    "MODES",
    "WHEN_EXHAUSTED",
    "Budget",
    "End",
    "Event",
    "Forced",
    "Outcome",
    "Overlay",
    "Retract",
    "Token",
    "Walk",
    "walk",
]

logger = logging.getLogger(__name__)


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
        stop: Strings before which the text ends; also in the names of special tokens.
        eos: Tokens that end the text; None takes the tokenizer's.
        budget: What may be spent; None is `Budget()`.
        when_exhausted: With the budget spent, or nothing left to draw: "stop" ends with the longest text that the rules
            accepted; "raise" raises; "accept" goes on without hearing objections (not with `weigh`).
        mode: What is sampled; see the top of this file.
        seed: Equal seeds give equal texts, whatever else runs; None takes a fresh one.
        lineage: Tells walks with one seed apart.
        overlay: Shared with other walks, in mode `exact`; None has its own. What they must have in common: `Overlay`.
        weigh: Estimate an importance weight, in modes `exact` and `mask`; see the top of this file. In `mask`, rules
            must object at the token that is at fault.
        hold: Most tokens that may be taken back at any time: a reader waits for no more, and rollbacks end there. None
            is as many as the rules can reach, one rollback after another; that is all of them for most rules that take
            back more than one token, and the length of the partial match for phrases.
        speculate: With each new prefix, ask also for up to so many of its continuations, as they stood in the text or
            prompt before; what a grammar forces is asked along without this. The text stays the same; where it repeats
            itself, forward passes are saved. Good on an engine that computes a batch as one tree (`AsyncTransformer`).
            Of many walks each asks only for what is almost sure to come.
        state: Of the rules at the prompt: the `state` of an outcome that this walk continues.
        encode: From the text of a splice to tokens; None takes the tokenizer.
        lora_name: The adapter.

    Returns:
        A walk that has not begun. Closing its iterator early, or cancelling, leaves nothing behind.

    Raises:
        InvalidQuery: An argument is out of its range.
        RuleRefused: A rule is a procedure, which mode `exact` cannot condition on; while it runs, a rule looks at
            logits and the model does not tell them, or with `weigh` it writes, or objects too late in mode `mask`.
        EmptyPrompt, TokenIdError, ContextTooLong: While it runs; see `AsyncLM`.
        WalkExhausted: While it runs, with `when_exhausted="raise"`.
    """
    if overlay is not None and mode != "exact":
        raise InvalidQuery("an overlay is shared in mode 'exact' only: elsewhere it belongs to the kept prefix")
    members = list(rules) if isinstance(rules, list | tuple) else [rules]
    strings = [stop] if isinstance(stop, str) else list(stop)
    if strings:
        members.append(StopStrings(strings))
    settings = Settings(
        llm=llm,
        prompt=tuple(_prompt_ids(llm, prompt)),
        eos=frozenset(_eos(llm) if eos is None else eos),
        rule=AllOf([as_rule(member) for member in members]),
        filters=Filters(temperature, top_k, top_p, min_p).check(),
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
    return Walk(settings.check(), Overlay() if overlay is None else overlay)


class Walk:
    """A walk, made by `walk`; runs once, when it is iterated or awaited."""

    def __init__(self, settings: Settings, overlay: Overlay) -> None:
        self._set = settings
        self._loop = Loop(settings, overlay)
        self._events: list[Event] = []

    @property
    def token_ids(self) -> list[int]:
        """The tokens so far; the first `n_final` of them are final."""
        return list(self._loop.cursor.path.ids)

    @property
    def n_final(self) -> int:
        """How many of the tokens are final."""
        return self._loop.cursor.n_final

    @property
    def n_draws(self) -> int:
        """How many tokens were drawn, rejected ones included."""
        return self._loop.proposal.n_draws

    @property
    def n_undos(self) -> int:
        """How often tokens were taken back."""
        return self._loop.cursor.n_undos

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """The tokens that it continues."""
        return self._set.prompt

    def __aiter__(self) -> AsyncGenerator[Event, None]:
        return self._stream()

    async def _stream(self) -> AsyncGenerator[Event, None]:
        while self._loop.end is None:
            for event in await self.advance():
                yield event

    def __await__(self) -> Generator[Any, None, Outcome]:
        return self.finish().__await__()

    async def finish(self) -> Outcome:
        """Walk to the end, from wherever it is.

        Raises:
            GenlmError: As `walk`.
        """
        while self._loop.end is None:
            await self.advance()
        return self.outcome()

    async def advance(self) -> list[Event]:
        """Draw one token, or go one step back; nothing at the end. Not to be used again once it was cancelled.

        Raises:
            GenlmError: As `walk`.
        """
        if self._loop.end is not None:
            return []
        told = await self._loop.step()
        self._tell(told)
        return told

    def take_back(self, n: int, why: str = "asked to") -> int:
        """Take back tokens on behalf of a caller, also after the end; how many there were that were not final."""
        told = self._loop.take_back(n, why)
        self._tell(told)
        return sum(event.n for event in told)

    @property
    def is_done(self) -> bool:
        """Whether the text is complete."""
        return self._loop.end is not None

    @property
    def last(self) -> Distribution | None:
        """What the last token was drawn from, before anything was removed; None unless a rule sees it."""
        return self._loop.last

    def outcome(self) -> Outcome:
        """What the walk came to, or where it is: `reason` is "unfinished" then."""
        path, end = self._loop.cursor.path, self._loop.end
        return Outcome(
            text=text_of(self._set.llm, path.ids, self._set.eos, end.cut if end else 0),
            token_ids=list(path.ids),
            reason=end.reason if end else "unfinished",
            logprob=_sum(path.logprobs),
            log_q=_sum(path.log_qs),
            log_weight=self._loop.log_weight,
            n_undos=self.n_undos,
            n_draws=self.n_draws,
            n_prefixes=self._loop.proposal.n_prefixes,
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
            final = bytes_of(self._set.llm, self._loop.cursor.path.ids[: event.n_final], self._set.eos, cut)
            whole = len(final) if isinstance(event, End) else whole_characters(final)
            if whole > len(written):
                piece, written = final[len(written) : whole], final[:whole]
                yield piece.decode("utf-8", "replace")

    def _tell(self, told: Sequence[Event]) -> None:
        for event in told:
            if isinstance(event, Retract):
                logger.info("took back %d tokens at %d: %s", event.n, event.length + event.n, event.why)
        self._events += told


def _sum(values: Sequence[float]) -> float | None:
    total = math.fsum(values)
    return None if math.isnan(total) else total


def _prompt_ids(llm: AsyncLM, prompt: str | Sequence[int]) -> Sequence[int]:
    if not isinstance(prompt, str):
        return checked_ids(prompt, len(llm.byte_vocab), None)
    return checked_ids(llm.tokenizer.encode(prompt), len(llm.byte_vocab), None)


def _eos(llm: AsyncLM) -> Collection[int]:
    eos = getattr(llm.tokenizer, "eos_token_id", None)
    return () if eos is None else (eos,)
