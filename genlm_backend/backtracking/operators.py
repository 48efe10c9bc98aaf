"""Operators: the rules of backtracking-llm, with its names, arguments, defaults and meaning; and any callable as one.

An operator looks at each drawn token and says how many tokens to take back, that one included; 0 keeps it. Its form is

    operator(logits, probabilities, position, token) -> int

with the temperature-scaled logits and the renormalised probabilities of the top-k tokens, (k,), most probable first,
the rank of the token among them, and the token as text. One that remembers may have `backtrack(n)`, which is told
that n tokens are gone. Any callable of this form can be given to `Generator.generate(operator=...)`, or as a rule:
`operator_rule(f)`.

The operators here judge a prefix by a pure function (`judge`), so as rules they have nothing to rewind and one object
serves any number of generations at once. Called as above they keep the states of the tokens they have seen.

What differs from backtracking-llm 0.3.1, on purpose: what was taken back is not drawn again (mode `local`), so an
operator that always objects comes to an end; for `EntropyThreshold` and `ProbabilityMargin`, which judge the place and
not the token, what is not returned to is that place. `ProbabilityDrop` compares with the last token that stayed,
`NGramOverlap` remembers what was there before, tokens are told apart by their bytes, and where they are asked at every
n-th token only, those that remember have followed the others too.
"""

from __future__ import annotations

import copy
import logging
import math
import threading
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch

from genlm_backend.backtracking.distribution import Distribution
from genlm_backend.backtracking.rules import EVERYTHING, Keep, Prompt, Rule, Sees, Step, Undo, Verdict

logger = logging.getLogger(__name__)

User = TypeVar("User")


@runtime_checkable
class Operator(Protocol):
    """How many tokens to take back after each one; see the top of this file."""

    def __call__(self, logits: torch.Tensor, probabilities: torch.Tensor, position: int, token: str) -> int:
        """0 keeps the token; n takes back n tokens, this one included."""

    def backtrack(self, n_tokens: int) -> None:
        """So many tokens are gone."""


class View(NamedTuple):
    """What an operator looks at; `probabilities` are those of all tokens it was drawn from, empty if not asked for."""

    probability: float
    logit: float
    token: Any
    probabilities: Any = ()

    @property
    def entropy(self) -> float:
        p = np.asarray(self.probabilities, np.float64)
        return float(-(p * np.log(np.maximum(p, 1e-300))).sum())

    @property
    def margin(self) -> float:
        """Of the best token over the second; infinite if there is no second."""
        p = np.sort(np.asarray(self.probabilities, np.float64))
        return float(p[-1] - p[-2]) if len(p) > 1 else math.inf


class FoldOperator:
    """An operator that is a pure function of a state per prefix."""

    sees: ClassVar[Sees] = Sees.TOKEN
    late: ClassVar[int] = 0

    @property
    @abstractmethod
    def most(self) -> int:
        """The most tokens it takes back."""

    def start(self) -> Any:
        """The state before the first token."""
        return None

    @abstractmethod
    def judge(self, state: Any, view: View) -> tuple[Any, int]:
        """The state one token later, and how many tokens to take back."""

    def __call__(self, logits: torch.Tensor, probabilities: torch.Tensor, position: int, token: str) -> int:
        history = self._seen()
        p = np.atleast_1d(probabilities.detach().cpu().float().numpy())
        logit = float(logits.reshape(-1)[position])
        state, n = self.judge(history[-1], View(float(p[position]), logit, token, p))
        history.append(state)
        return n

    def backtrack(self, n_tokens: int) -> None:
        """Go back to the state before the last n tokens."""
        history = self._seen()
        del history[max(1, len(history) - n_tokens) :]

    def _seen(self) -> list[Any]:
        history: list[Any] = self.__dict__.setdefault("_history", [self.start()])
        return history


@dataclass(unsafe_hash=True)
class Never(FoldOperator):
    """Keeps everything."""

    @property
    def most(self) -> int:
        return 1

    def judge(self, state: Any, view: View) -> tuple[Any, int]:
        return None, 0


@dataclass(unsafe_hash=True)
class ProbabilityThreshold(FoldOperator):
    """Objects to a token less probable than `min_probability`."""

    min_probability: float = 0.05
    backtrack_count: int = 1

    def __post_init__(self) -> None:
        _check("min_probability", self.min_probability, 0 < self.min_probability < 1, "above 0 and below 1")
        _check_count(self.backtrack_count)

    @property
    def most(self) -> int:
        return self.backtrack_count

    def judge(self, state: Any, view: View) -> tuple[Any, int]:
        return None, self.backtrack_count if view.probability < self.min_probability else 0


@dataclass(unsafe_hash=True)
class EntropyThreshold(FoldOperator):
    """Objects to a place where the entropy of the top-k probabilities is above `max_entropy` nats."""

    sees: ClassVar[Sees] = Sees.SUPPORT
    late: ClassVar[int] = 1
    max_entropy: float = 0.2
    backtrack_count: int = 2

    def __post_init__(self) -> None:
        _check("max_entropy", self.max_entropy, self.max_entropy >= 0, "0 or more")
        _check_count(self.backtrack_count)

    @property
    def most(self) -> int:
        return max(self.backtrack_count, 2)

    def judge(self, state: Any, view: View) -> tuple[Any, int]:
        return None, self.backtrack_count if view.entropy > self.max_entropy else 0


@dataclass(unsafe_hash=True)
class ProbabilityMargin(FoldOperator):
    """Objects to a place where the best token is less than `min_margin` more probable than the second."""

    sees: ClassVar[Sees] = Sees.SUPPORT
    late: ClassVar[int] = 1
    min_margin: float = 0.05
    backtrack_count: int = 1

    def __post_init__(self) -> None:
        _check("min_margin", self.min_margin, 0 <= self.min_margin <= 1, "0 to 1")
        _check_count(self.backtrack_count)

    @property
    def most(self) -> int:
        return max(self.backtrack_count, 2)

    def judge(self, state: Any, view: View) -> tuple[Any, int]:
        return None, self.backtrack_count if view.margin < self.min_margin else 0


@dataclass(unsafe_hash=True)
class ProbabilityDrop(FoldOperator):
    """Objects to a token whose probability is less than `1 - max_drop` of that of the token before it."""

    max_drop: float = 0.8
    backtrack_count: int = 1

    def __post_init__(self) -> None:
        _check("max_drop", self.max_drop, 0 <= self.max_drop <= 1, "0 to 1")
        _check_count(self.backtrack_count)

    @property
    def most(self) -> int:
        return self.backtrack_count

    def judge(self, state: float | None, view: View) -> tuple[float, int]:
        falls = state is not None and view.probability < state * (1 - self.max_drop)
        return view.probability, self.backtrack_count if falls else 0


@dataclass(unsafe_hash=True)
class ProbabilityTrend(FoldOperator):
    """Objects to a token less probable than `drop_threshold` times the mean of the last `window_size`."""

    window_size: int = 10
    drop_threshold: float = 0.5
    backtrack_count: int = 1

    def __post_init__(self) -> None:
        _check("window_size", self.window_size, self.window_size >= 2, "2 or more")
        _check("drop_threshold", self.drop_threshold, 0 < self.drop_threshold < 1, "above 0 and below 1")
        _check_count(self.backtrack_count)

    @property
    def most(self) -> int:
        return self.backtrack_count

    def start(self) -> tuple[float, ...]:
        return ()

    def judge(self, state: tuple[float, ...], view: View) -> tuple[tuple[float, ...], int]:
        knows = len(state) >= self.window_size // 2
        falls = knows and view.probability < sum(state) / len(state) * self.drop_threshold
        window = (*state, view.probability)[-self.window_size :]
        return window, self.backtrack_count if falls else 0


@dataclass(unsafe_hash=True)
class Repetition(FoldOperator):
    """Objects when a token comes more than `max_repetitions` times in a row, to all of the run."""

    max_repetitions: int = 3

    def __post_init__(self) -> None:
        _check("max_repetitions", self.max_repetitions, self.max_repetitions >= 1, "1 or more")

    @property
    def most(self) -> int:
        return self.max_repetitions + 1

    def start(self) -> tuple[Any, int]:
        return None, 0

    def judge(self, state: tuple[Any, int], view: View) -> tuple[tuple[Any, int], int]:
        token, n = state
        n = n + 1 if token == view.token else 1
        return (view.token, n), n if n > self.max_repetitions else 0


@dataclass(unsafe_hash=True)
class NGramOverlap(FoldOperator):
    """Objects to a token that ends a sequence of `ngram_size` tokens that was there before."""

    ngram_size: int = 4
    backtrack_count: int = 1

    def __post_init__(self) -> None:
        _check("ngram_size", self.ngram_size, self.ngram_size >= 2, "2 or more")
        _check_count(self.backtrack_count)

    @property
    def most(self) -> int:
        return self.backtrack_count

    def start(self) -> tuple[tuple[Any, ...], frozenset[tuple[Any, ...]]]:
        return (), frozenset()

    def judge(self, state: Any, view: View) -> tuple[Any, int]:
        window, seen = state
        window = (*window, view.token)[-self.ngram_size :]
        if len(window) < self.ngram_size:
            return (window, seen), 0
        return (window, seen | {window}), self.backtrack_count if window in seen else 0


@dataclass(unsafe_hash=True)
class LogitThreshold(FoldOperator):
    """Objects to a token whose logit, divided by the temperature, is below `min_logit`."""

    sees: ClassVar[Sees] = Sees.LOGITS
    min_logit: float = -20.0
    backtrack_count: int = 1

    def __post_init__(self) -> None:
        _check("min_logit", self.min_logit, math.isfinite(self.min_logit), "a finite number")
        _check_count(self.backtrack_count)

    @property
    def most(self) -> int:
        return self.backtrack_count

    def judge(self, state: Any, view: View) -> tuple[Any, int]:
        return None, self.backtrack_count if view.logit < self.min_logit else 0


OPERATORS: dict[str, type[FoldOperator]] = {
    "probability_threshold": ProbabilityThreshold,
    "entropy_threshold": EntropyThreshold,
    "probability_margin": ProbabilityMargin,
    "probability_drop": ProbabilityDrop,
    "probability_trend": ProbabilityTrend,
    "repetition": Repetition,
    "ngram_overlap": NGramOverlap,
    "logit_threshold": LogitThreshold,
    "never": Never,
}
"""By backtracking-llm's names on the command line."""


class FoldRule(Rule[Any]):
    """One of the operators of this file as a rule: it follows all tokens, and may object at every n-th."""

    def __init__(self, operator: FoldOperator, every_n: int = 1) -> None:
        self.operator, self._every_n = operator, _checked_every_n(every_n)
        self.name = type(operator).__name__
        self.sees = operator.sees
        self.reach = operator.most

    @property
    def forbids(self) -> bool:
        return not isinstance(self.operator, Never)

    def init(self, prompt: Prompt) -> Any:
        return self.operator.start()

    def step(self, state: Any, step: Step) -> tuple[Any, Verdict]:
        if step.is_forced:
            return state, Keep()
        state, n = self.operator.judge(state, self._view(step))
        if not n or len(step.path) % self._every_n:
            return state, Keep()
        return state, Undo(n, late=self.operator.late, why=repr(self.operator))

    def _view(self, step: Step) -> View:
        dist = step.dist
        p = math.exp(step.log_q) if step.log_q == step.log_q else 1.0
        if dist is None or self.sees == Sees.TOKEN:
            return View(p, math.nan, step.piece)
        i = dist.index(step.token_id)
        logit = float(dist.log_tempered[i]) if self.sees >= Sees.LOGITS and i is not None else math.nan
        return View(p, logit, step.piece, dist.probabilities)


class CallableRule(Rule[int]):
    """An operator of a user's as a rule. Its state is how many tokens the operator has seen at a prefix.

    What the operator remembers is its own; before it is called at a prefix that is shorter than what it has seen, its
    `backtrack` is told. One object serves one walk at a time.
    """

    sees = Sees.LOGITS
    reach = EVERYTHING

    def __init__(self, operator: Callable[..., int], decode: Callable[[int], str], every_n: int = 1) -> None:
        self._operator, self._decode, self._every_n = operator, decode, _checked_every_n(every_n)
        self.name = str(getattr(operator, "__name__", type(operator).__name__))
        self._n_seen = 0

    def init(self, prompt: Prompt) -> int:
        return 0

    def step(self, state: int, step: Step) -> tuple[int, Verdict]:
        self.rewind(state)
        self._n_seen = state + 1
        dist = step.dist
        if len(step.path) % self._every_n or dist is None:
            return state + 1, Keep()
        n = int(self._operator(*_tensors(dist), dist.rank(step.token_id), self._decode(step.token_id)))
        return state + 1, Undo(n, why=self.name) if n > 0 else Keep()

    def rewind(self, n_tokens: int) -> None:
        """Tell the operator that only so many tokens are left."""
        n_gone, self._n_seen = self._n_seen - n_tokens, min(self._n_seen, n_tokens)
        _tell_gone(self._operator, n_gone)

    def take(self) -> None:
        """Use the operator for one text; while another text uses it, a copy that has seen nothing of that text.

        The copy is made between two tokens of the other text, unless that one runs in another thread.
        """
        other = IN_USE.take([self._operator], self)
        if other is not None:
            self._operator = other._copied()
            IN_USE.take([self._operator], self)

    def give_back(self) -> None:
        """The text is over: leave the operator as it was before."""
        try:
            self.rewind(0)
        finally:
            IN_USE.give_back(self)

    def _copied(self) -> Any:
        n_seen, operator = self._n_seen, copy.deepcopy(self._operator)
        if operator is not self._operator:  # a function is its own copy
            _tell_gone(operator, n_seen)
        return operator


def _tell_gone(operator: Any, n_tokens: int) -> None:
    backtrack = getattr(operator, "backtrack", None)
    if n_tokens > 0 and backtrack is not None:
        backtrack(n_tokens)


class InUse(Generic[User]):
    """Objects that remember, and so serve one text at a time, each with its user; for all threads.

    They are held, so that no other object gets the id of one that is gone.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a stream that is collected while one is held gives back too
        self._users: dict[int, User] = {}
        self._taken: dict[int, list[Any]] = {}

    def take(self, objects: Sequence[Any], user: User) -> User | None:
        """Take them all, or none where one is in use; whose that one is, None if they were taken."""
        with self._lock:
            for value in objects:
                if id(value) in self._users:
                    return self._users[id(value)]
            self._users |= {id(value): user for value in objects}
            self._taken[id(user)] = list(objects)
        return None

    def give_back(self, user: User) -> None:
        """What a user took may be taken again."""
        with self._lock:
            for value in self._taken.pop(id(user), ()):
                self._users.pop(id(value), None)


IN_USE: InUse[CallableRule] = InUse()


def is_pure(operator: object) -> bool:
    """Whether it is one of the operators of this file, and a subclass changes at most what `judge` says."""
    if not isinstance(operator, FoldOperator):
        return False
    kind = type(operator)
    return kind.__call__ is FoldOperator.__call__ and kind.backtrack is FoldOperator.backtrack


def operator_rule(operator: Any, decode: Callable[[int], str] = str, every_n: int = 1) -> Rule[Any]:
    """An operator as a rule.

    Args:
        operator: One of this file, or any callable of its form.
        decode: From a token id to the text that a callable is told.
        every_n: It is asked at every n-th token only; one of this file follows the others too.

    Raises:
        TypeError: It is not callable.
        ValueError: `every_n` is below 1.
    """
    if is_pure(operator):
        return FoldRule(operator, every_n)
    if not callable(operator):
        raise TypeError(
            f"operator is {operator!r}; expected None or a callable (logits, probabilities, position, token)"
        )
    return CallableRule(operator, decode, every_n)


def _tensors(dist: Distribution) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and probabilities, (k,), most probable first."""
    order: Any = slice(None) if dist.token_ids is not None else np.argsort(-dist.log_q, kind="stable")
    logits = torch.from_numpy(np.array(dist.log_tempered[order], np.float32))
    return logits, torch.from_numpy(np.array(dist.probabilities[order], np.float32))


def _checked_every_n(every_n: int) -> int:
    if every_n < 1:
        raise ValueError(f"backtrack_every_n is {every_n!r}; expected 1 or more")
    return every_n


def _check(name: str, value: float, is_good: bool, expected: str) -> None:
    if not is_good:
        raise ValueError(f"{name} is {value!r}; expected {expected}")


def _check_count(count: int) -> None:
    _check("backtrack_count", count, count >= 1, "1 or more")


def rules_of(rules: Any) -> Sequence[Any]:
    """One rule or several as a list."""
    return list(rules) if isinstance(rules, list | tuple) else [rules]
