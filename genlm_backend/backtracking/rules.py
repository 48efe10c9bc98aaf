"""Rule: what may object to a token, as pure functions on a state per prefix; verdicts, and composition.

A rule is a fold over the tokens of a walk. `init(prompt)` is the state at the prompt, and `step(state, step)` gives the
state one token later together with a verdict on that token:

    Keep(hold)              accepted; the last `hold` tokens, this one included, may still be taken back
    Undo(n)                 take back n tokens, this one included
    Splice(n, text)         take back n tokens (0 is none), then write this text
    Halt(reason, cut)       the text ends here; drop its last `cut` bytes

States belong to prefixes and are never changed in place, so nothing is ever undone: after a rollback the walk goes on
from the state that the shorter prefix had. A rule therefore cannot leak from one run, or one branch, into another.

    class NoShouting(Rule[int]):                      # at most three capitals in a row
        reach = 3
        def init(self, prompt):
            return 0
        def step(self, n, step):
            n = n + 1 if step.piece.isupper() else 0
            return n, Undo(3, why="shouting") if n > 3 else Keep(hold=n)

Everything else is optional, and costs nothing where it is not overridden:

    end(state)              verdict when the text ends for lack of room or by another rule's Halt, not by a token
    allowed(state)          (vocab,) bool: tokens outside would get an Undo(1); mode `mask` never draws them
    allows(state, token_id) whether `allowed` has this token, where that is told faster than the row is made
    warp(state, row)        reshape the log-probabilities, after temperature and before top-k, top-p and min-p
    reweigh(state, row)     reshape them after these filters
    choose(state, choices)  awaited instead of drawing: a person, a judge, a policy; gives a token, an Undo or a Splice

`step` may be a coroutine function too. `sees` says what of the distribution a rule looks at: the less, the faster.

What an Undo removes. Besides how far the cursor goes back, an Undo says which prefix is at fault: the one that ends
`late` tokens before the newest. `late=0` is the whole path, newest token included; `late=1` is the prefix from which
the newest token was drawn, for a position that is bad whatever is drawn there; in general the shortest prefix that is
certainly bad (a check that looks only at every tenth token finds the fault up to nine tokens late). Its probability is
removed from the tree (see `overlay`), so it is never drawn again. The mode of the walk may overrule n and `late`.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from enum import IntEnum
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from genlm_backend.backtracking.distribution import Distribution
from genlm_backend.tokenization import Token

S = TypeVar("S")
BoolRow = npt.NDArray[np.bool_]
FloatRow = npt.NDArray[np.float32]
EVERYTHING = 1 << 60
"""A reach or hold that no walk exceeds."""


class Keep(NamedTuple):
    """The token stays. `hold`: how many of the last tokens, this one included, may still be taken back."""

    hold: int = 0


class Undo(NamedTuple):
    """Take back tokens, and never come back to the prefix at fault.

    Attributes:
        n: How many, the newest included; more than there are takes back all that are not final.
        late: The prefix at fault ends so many tokens before the newest one.
        keep: The share of its probability that stays: 0 bans it; between, a penalty: the prefix is kept with that
            probability when it is met; 1 removes nothing, so the same may be drawn again.
        why: For the trace and the log.
        siblings: Tokens in the place of the last one at fault that are at fault with it, as ids or a (vocab,) bool
            mask: they are removed too. Only for `keep=0`.
        tail: How many of the text's last bytes come after the fault; None: it is about the newest token as a whole.
        otherwise: What holds if this is not applied: a penalty not exacted, a fault within what is final.
    """

    n: int = 1
    late: int = 0
    keep: float = 0.0
    why: str = ""
    siblings: BoolRow | Sequence[int] | None = None
    tail: int | None = None
    otherwise: Verdict = Keep()


class Splice(NamedTuple):
    """Take back tokens and write something in their place; a procedure, so there is no law in mode `exact`.

    Attributes:
        n: How many tokens to take back, the newest included; 0 is none.
        text: What to write; tokenised together with the token before it, if that one can still be taken back.
        token_ids: To write instead of `text`.
        state: The state of the rule itself after the splice. With None it is stepped through what is written like all
            other rules, and may object to it.
        why: For the trace and the log.
    """

    n: int
    text: bytes = b""
    token_ids: tuple[int, ...] = ()
    state: Any = None
    why: str = ""


class Halt(NamedTuple):
    """The text is complete. `cut`: how many of its last bytes are not part of it."""

    reason: str
    cut: int = 0


Verdict = Keep | Undo | Splice | Halt
KEEP = Keep()


class Owned(NamedTuple):
    """The state that the rule at this place of a composition wants to have after its splice; may be nested."""

    place: int
    state: Any


class Sees(IntEnum):
    """What of the distribution of a token a rule looks at, from the cheapest on."""

    TOKEN = 0
    """the token, its probability, and that under the model"""
    SUPPORT = 1
    """all tokens that could have been drawn: ranks, entropy, margins"""
    LOGITS = 2
    """also the model's own logits of those"""
    ROW = 3
    """the whole row of the model"""


class Prompt(NamedTuple):
    """What a walk continues.

    Attributes:
        token_ids: The prompt.
        byte_vocab: The bytes of every token of the model.
        eos: The tokens that end a text.
    """

    token_ids: tuple[int, ...]
    byte_vocab: Sequence[Token]
    eos: frozenset[int] = frozenset()

    def tail(self, n_bytes: int) -> bytes:
        """The last bytes of the prompt's text, up to its last special token."""
        pieces: list[bytes] = []
        missing = n_bytes
        for token_id in reversed(self.token_ids):
            piece = self.byte_vocab[token_id]
            if missing <= 0 or piece.is_special:
                break
            pieces.append(piece.byte_string)
            missing -= len(piece)
        return b"".join(reversed(pieces))[-n_bytes:] if n_bytes > 0 else b""


class Step(NamedTuple):
    """A token that was just drawn, or written by a splice.

    Attributes:
        token_id: The token.
        piece: Its bytes; of a special token, its name.
        path: The tokens after the prompt, this one last. The walk's own list: do not change or keep it.
        logprob: Of the token under the model, nats; NaN for a token that was written, not drawn.
        log_q: Under the filtered distribution, before anything was removed; NaN likewise.
        dist: What it was drawn from, before anything was removed; None for a token that was written, or where every
            rule `sees` only the token.
        is_special: The token is no text.
        is_end: The token ends the text.
        byte_vocab: The bytes of every token.
        muted: Where in a composition the rule is that writes this token, and is not asked about it.
    """

    token_id: int
    piece: bytes
    path: Sequence[int]
    logprob: float
    log_q: float
    dist: Distribution | None = None
    is_special: bool = False
    is_end: bool = False
    byte_vocab: Sequence[Token] = ()
    muted: tuple[int, ...] = ()

    @property
    def is_forced(self) -> bool:
        """Whether it was written by a splice."""
        return self.logprob != self.logprob


class Choices(NamedTuple):
    """What `choose` chooses from: the distribution with what was removed left out, and the path so far."""

    dist: Distribution
    path: Sequence[int]
    byte_vocab: Sequence[Token]


class Rule(ABC, Generic[S]):
    """May object to tokens; see the top of this file.

    Attributes:
        sees: What of the distribution `step` looks at.
        reach: The most tokens an Undo of this rule takes back; a walk that streams holds back one less. None: where
            `Keep.hold` says so token by token.
        is_procedure: It does more than forbid: what comes out is no conditional of the model, and mode `exact`
            refuses it.
        name: What messages call it; empty is the name of its class.
    """

    name: str = ""
    sees: Sees = Sees.TOKEN
    reach: int | None = None
    is_procedure: bool = False

    def init(self, prompt: Prompt) -> S:
        """The state at the prompt; None unless overridden."""
        return None  # type: ignore[return-value]

    @abstractmethod
    def step(self, state: S, step: Step) -> tuple[S, Verdict]:
        """The state one token later, and the verdict on that token; pure."""

    def end(self, state: S) -> Verdict:
        """The verdict when there is no room for another token; `n` counts from the last one.

        Also asked after a Keep where another rule halts; then only an Undo counts.
        """
        return KEEP

    def allowed(self, state: S) -> BoolRow | None:
        """(vocab,) bool: the tokens that `step` would not object to; None: ask it."""
        return None

    def allows(self, state: S, token_id: int) -> bool:
        """Whether a token is among those `allowed`; overridden where that is told faster than the row is made."""
        mask = self.allowed(state)
        return mask is None or bool(mask[token_id])

    def foreseen(self, state: S) -> Sequence[int]:
        """Tokens that probably come next because this rule leaves no other text; mode `mask` asks about all at once."""
        return ()

    def warp(self, state: S, row: FloatRow) -> FloatRow:
        """A new (vocab,) row of log-probabilities, nats, normalised or not, from one after temperature."""
        return row

    def reweigh(self, state: S, row: FloatRow) -> FloatRow:
        """A new (vocab,) row from one after top-k, top-p and min-p."""
        return row

    async def choose(self, state: S, choices: Choices) -> int | Undo | Splice:
        """The next token, or a step back (`n` counts tokens that are there)."""
        raise NotImplementedError

    @property
    def warps(self) -> bool:
        """Whether it reshapes rows; they are fetched whole then."""
        return type(self).warp is not Rule.warp or self.reweighs

    @property
    def reweighs(self) -> bool:
        """Whether it reshapes filtered rows."""
        return type(self).reweigh is not Rule.reweigh

    @property
    def chooses(self) -> bool:
        """Whether it chooses tokens itself."""
        return type(self).choose is not Rule.choose

    @property
    def masks(self) -> bool:
        """Whether it knows the tokens it allows."""
        return type(self).allowed is not Rule.allowed

    @property
    def tells(self) -> bool:
        """Whether it tells of one token faster than of all if it is allowed.

        A class that overrides `allowed` alone is asked for that: what it inherits as `allows` is about another row.
        """
        defines = [{"allows", "allowed"} & vars(cls).keys() for cls in type(self).__mro__ if cls is not Rule]
        return "allows" in next(filter(None, defines), ())

    @property
    def forbids(self) -> bool:
        """Whether it may take tokens back; a stop string only ends."""
        return True


class FunctionRule(Rule[Any]):
    """A plain function as a rule; see `rule`."""

    def __init__(self, function: Callable[..., Any], *, init: Any, sees: Sees, reach: int | None) -> None:
        self._function = function
        self.name = str(getattr(function, "__name__", type(function).__name__))
        self._init = init
        self._has_state = init is not None
        self.sees = sees
        self.reach = reach

    def init(self, prompt: Prompt) -> Any:
        return self._init(prompt) if callable(self._init) else self._init

    def step(self, state: Any, step: Step) -> Any:
        outcome = self._function(state, step) if self._has_state else self._function(step)
        return _awaited(self, state, outcome) if inspect.isawaitable(outcome) else self._read(state, outcome)

    def _read(self, state: Any, outcome: Any) -> tuple[Any, Verdict]:
        if self._has_state:
            state, outcome = outcome
        return state, as_verdict(outcome, self.reach)


async def _awaited(rule: FunctionRule, state: Any, outcome: Awaitable[Any]) -> tuple[Any, Verdict]:
    return rule._read(state, await outcome)


def rule(
    function: Callable[..., Any] | None = None,
    *,
    init: Any = None,
    sees: Sees = Sees.TOKEN,
    reach: int | None = EVERYTHING,
) -> Any:
    """A function as a rule: `function(step)`, or with an `init` `function(state, step) -> (state, verdict)`.

    Args:
        function: Gives a verdict, a number of tokens to take back, True for one, or None, 0 or False to keep; may be a
            coroutine function. Without it, this is a decorator.
        init: The state at the prompt, or a function of the prompt that gives it.
        sees: What the function looks at.
        reach: The most tokens it takes back; unless given, nothing is final before the end.
    """
    if function is None:
        return lambda wrapped: rule(wrapped, init=init, sees=sees, reach=reach)
    return FunctionRule(function, init=init, sees=sees, reach=reach)


def as_verdict(outcome: Any, reach: int | None = None) -> Verdict:
    """A verdict from what a function of a user's gave."""
    match outcome:
        case Keep() | Undo() | Splice() | Halt():
            return outcome
        case None | False:
            return Keep(0 if reach is None else reach - 1)
        case bool() | int() | np.integer() | np.bool_():
            n = int(outcome)
            return Undo(n) if n > 0 else Keep(0 if reach is None else reach - 1)
    raise TypeError(f"a rule gave {outcome!r}; expected a verdict, a number of tokens to take back, or None")


class AllOf(Rule[tuple[Any, ...]]):
    """Several rules as one: of the verdicts on one token, the one that reaches furthest back counts, ties by order.

    Positions compare, not lists: text that a Halt cuts off cannot be at fault, and a fault before the cut is undone.
    Where one halts, those that keep the token are asked for their `end`.

    Args:
        rules: The members, each with its own state.
        first_in_order: The first that objects counts, however far it reaches.
    """

    def __init__(self, rules: Sequence[Rule[Any]], *, first_in_order: bool = False) -> None:
        self.rules = tuple(as_rule(member) for member in rules)
        self.sees = max((member.sees for member in self.rules), default=Sees.TOKEN)
        self.is_procedure = any(member.is_procedure for member in self.rules)
        reaches = [member.reach for member in self.rules if member.reach is not None]
        self.reach = max(reaches, default=None)
        self._first_in_order = first_in_order
        self._warps = tuple(member.warps for member in self.rules)
        self._chooser = next((i for i, member in enumerate(self.rules) if member.chooses), None)
        self._masks = tuple(i for i, member in enumerate(self.rules) if member.masks)

    def init(self, prompt: Prompt) -> tuple[Any, ...]:
        return tuple(member.init(prompt) for member in self.rules)

    def step(self, state: tuple[Any, ...], step: Step) -> Any:
        asked = iter(self._outcomes(state, step))
        known: list[tuple[Any, Verdict]] = []
        for outcome in asked:
            if type(outcome) is not tuple and inspect.isawaitable(outcome):
                return self._awaited(known, outcome, asked, len(step.piece))
            known.append(outcome)
        return self._joined(known, len(step.piece))

    def _outcomes(self, state: tuple[Any, ...], step: Step) -> Iterable[Any]:
        """What each member says, asked one by one; one that writes the token is not asked, nor told."""
        if not step.muted:
            return (member.step(s, step) for member, s in zip(self.rules, state, strict=True))
        return (self._said(i, s, step) for i, s in enumerate(state))

    def _said(self, i: int, state: Any, step: Step) -> Any:
        """What member i says; where in the composition the writer is reaches only the member that holds it."""
        if not step.muted:
            return self.rules[i].step(state, step)
        place, *inner = step.muted
        if place == i and not inner:
            return state, KEEP
        return self.rules[i].step(state, step._replace(muted=tuple(inner) if place == i else ()))

    async def _awaited(
        self, known: list[tuple[Any, Verdict]], outcome: Awaitable[Any], asked: Iterator[Any], n_bytes: int
    ) -> tuple[tuple[Any, ...], Verdict]:
        """Waits for one and then asks the next, so that an error leaves no coroutine behind."""
        known.append(await outcome)
        for said in asked:
            known.append(await said if inspect.isawaitable(said) else said)
        return self._joined(known, n_bytes)

    def _joined(self, outcomes: list[tuple[Any, Verdict]], n_bytes: int) -> tuple[tuple[Any, ...], Verdict]:
        states = tuple([state for state, _ in outcomes])
        verdicts = [verdict for _, verdict in outcomes]
        if any(isinstance(verdict, Halt) for verdict in verdicts):
            verdicts = [self._at_halt(i, states[i], verdict) for i, verdict in enumerate(verdicts)]
        return states, self._decided(verdicts, n_bytes)

    def _at_halt(self, i: int, state: Any, verdict: Verdict) -> Verdict:
        """The verdict of member i on a token where another halts."""
        ended = self.rules[i].end(state) if isinstance(verdict, Keep) else KEEP
        return ended if isinstance(ended, Undo) else verdict

    def end(self, state: tuple[Any, ...]) -> Verdict:
        return self._decided([member.end(s) for member, s in zip(self.rules, state, strict=True)], 0)

    def _decided(self, verdicts: list[Verdict], n_bytes: int) -> Verdict:
        if all(isinstance(verdict, Keep) for verdict in verdicts):
            return Keep(max((v.hold for v in verdicts if isinstance(v, Keep)), default=0))
        i = first_objection(verdicts) if self._first_in_order else furthest_back(verdicts, n_bytes)
        verdict = verdicts[i]
        if isinstance(verdict, Undo):
            rest = [*verdicts[:i], verdict.otherwise, *verdicts[i + 1 :]]
            return verdict._replace(otherwise=self._decided(rest, n_bytes))
        if isinstance(verdict, Splice) and verdict.state is not None:
            return verdict._replace(state=Owned(i, verdict.state))
        return verdict

    def spliced(self, state: tuple[Any, ...], own: Owned) -> tuple[Any, ...]:
        """`state` with that of the rule that spliced replaced by its own."""
        i, member_state = own
        member = self.rules[i]
        if isinstance(member_state, Owned) and isinstance(member, AllOf):
            member_state = member.spliced(state[i], member_state)
        return (*state[:i], member_state, *state[i + 1 :])

    def allowed(self, state: tuple[Any, ...]) -> BoolRow | None:
        together: BoolRow | None = None
        for i in self._masks:
            mask = self.rules[i].allowed(state[i])
            if mask is not None:
                together = mask if together is None else together & mask
        return together

    def allows(self, state: tuple[Any, ...], token_id: int) -> bool:
        return all(self.rules[i].allows(state[i], token_id) for i in self._masks)

    def foreseen(self, state: tuple[Any, ...]) -> Sequence[int]:
        return next(filter(len, (member.foreseen(s) for member, s in zip(self.rules, state, strict=True))), ())

    def warp(self, state: tuple[Any, ...], row: FloatRow) -> FloatRow:
        for member, s, does in zip(self.rules, state, self._warps, strict=True):
            if does:
                row = member.warp(s, row)
        return row

    def reweigh(self, state: tuple[Any, ...], row: FloatRow) -> FloatRow:
        for member, s, does in zip(self.rules, state, self._warps, strict=True):
            if does:
                row = member.reweigh(s, row)
        return row

    async def choose(self, state: tuple[Any, ...], choices: Choices) -> int | Undo | Splice:
        assert self._chooser is not None
        return await self.rules[self._chooser].choose(state[self._chooser], choices)

    def names(self, chosen: Callable[[Rule[Any]], bool]) -> list[str]:
        """Of the members, theirs too, for which `chosen` is true."""
        found: list[str] = []
        for member in self.rules:
            if isinstance(member, AllOf):
                found += member.names(chosen)
            elif chosen(member):
                found.append(member.name or type(member).__name__)
        return found

    @property
    def warps(self) -> bool:
        return any(self._warps)

    @property
    def reweighs(self) -> bool:
        return any(member.reweighs for member in self.rules)

    @property
    def chooses(self) -> bool:
        return self._chooser is not None

    @property
    def masks(self) -> bool:
        return bool(self._masks)

    @property
    def tells(self) -> bool:
        return all(self.rules[i].tells for i in self._masks)

    @property
    def masks_all(self) -> bool:
        """Whether every member that forbids knows its allowed tokens."""
        return all(member.masks for member in self.rules if member.forbids)

    @property
    def forbids(self) -> bool:
        return any(member.forbids for member in self.rules)


def first_objection(verdicts: Sequence[Verdict]) -> int:
    """The index of the first verdict that is no Keep."""
    return next(i for i, verdict in enumerate(verdicts) if not isinstance(verdict, Keep))


def furthest_back(verdicts: Sequence[Verdict], n_bytes: int) -> int:
    """The index of the verdict that counts; one at least is no Keep.

    Bans and splices come before penalties, which count only where nothing else objects.

    Args:
        verdicts: Of several rules on one token.
        n_bytes: Length of that token.
    """
    halts = [(-verdict.cut, i) for i, verdict in enumerate(verdicts) if isinstance(verdict, Halt)]
    cut = -min(halts)[0] if halts else 0
    objections = [
        (verdict.keep > 0 if isinstance(verdict, Undo) else False, -verdict.n, i)
        for i, verdict in enumerate(verdicts)
        if (isinstance(verdict, Undo) and (n_bytes if verdict.tail is None else verdict.tail) >= cut)
        or (isinstance(verdict, Splice) and n_bytes >= cut)
    ]
    return min(objections)[2] if objections else min(halts)[1]


def all_of(*rules: Any) -> AllOf:
    """Several rules as one; the verdict that reaches furthest back counts, ties by order."""
    return AllOf([as_rule(member) for member in rules])


def as_rule(value: Any) -> Rule[Any]:
    """A rule from a rule or from a function of a `Step`.

    Raises:
        TypeError: It is neither.
    """
    if isinstance(value, Rule):
        return value
    if callable(value):
        return FunctionRule(value, init=None, sees=Sees.SUPPORT, reach=EVERYTHING)
    raise TypeError(f"{value!r} is no rule: expected a Rule or a function of a Step")
