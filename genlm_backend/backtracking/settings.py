"""Settings: what a walk is asked to do, checked, and what it may spend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from genlm_backend.backtracking.distribution import Filters
from genlm_backend.backtracking.rules import AllOf, Sees
from genlm_backend.errors import InvalidQuery, RuleRefused
from genlm_backend.llm.base import AsyncLM

MODES = ("exact", "local", "first", "mask", "none")
WHEN_EXHAUSTED = ("stop", "raise", "accept")


class Budget(NamedTuple):
    """What a walk may spend; None is without bound. It ends when a number is above its bound: that is by one, at most.

    Attributes:
        undos: Times that tokens are taken back.
        draws: Tokens drawn in all, rejected ones included.
        prefixes: Different prefixes that the walk asked the model about, each at most one token computed; guesses,
            which depend on what else runs, do not count.
    """

    undos: int | None = 1000
    draws: int | None = None
    prefixes: int | None = None

    def is_spent(self, undos: int, draws: int, prefixes: int) -> bool:
        """Whether one of the three is above its bound."""
        spent = zip(self, (undos, draws, prefixes), strict=True)
        return any(bound is not None and n > bound for bound, n in spent)


@dataclass(frozen=True, slots=True)
class Settings:
    """The arguments of `walk`, with what they leave open filled in."""

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

    def check(self) -> Settings:
        """Itself.

        Raises:
            InvalidQuery: A value is out of its range, or the mode does not go with it.
            RuleRefused: A rule is a procedure, which mode `exact` cannot condition on.
        """
        if self.mode not in MODES:
            raise InvalidQuery(f"mode is {self.mode!r}; expected one of {', '.join(MODES)}")
        if self.when_exhausted not in WHEN_EXHAUSTED:
            expected = ", ".join(WHEN_EXHAUSTED)
            raise InvalidQuery(f"when_exhausted is {self.when_exhausted!r}; expected one of {expected}")
        for name in ("max_new_tokens", "speculate", "hold"):
            if getattr(self, name) < 0:
                or_none = ", or None" if name == "hold" else ""
                raise InvalidQuery(f"{name} is {getattr(self, name)!r}; expected 0 or more{or_none}")
        rule = self.rule
        only_forbids = not (rule.chooses or rule.is_procedure)
        if self.weigh and (self.mode not in ("exact", "mask") or self.filters.is_greedy or not only_forbids):
            raise InvalidQuery("weigh=True is for modes 'exact' and 'mask', with draws, and rules that only forbid")
        if self.weigh and self.when_exhausted == "accept":
            raise InvalidQuery("weigh=True does not go with when_exhausted='accept': what is then kept has no weight")
        if self.mode == "exact" and rule.is_procedure:
            names = rule.names(lambda member: member.is_procedure)
            why = "it writes or reshapes text, which is no condition; use mode='local'"
            raise RuleRefused(names, "mode 'exact'", why)
        return self

    @property
    def restarts(self) -> bool:
        """Whether the cursor goes back to the prompt after each objection, and nothing is final before the end."""
        return self.mode == "exact" and not self.filters.is_greedy

    @property
    def weighs_tokens(self) -> bool:
        """Whether each token that is accepted gets a weight of its own."""
        return self.weigh and self.mode == "mask"

    @property
    def engine_draws(self) -> bool:
        """Whether a draw by the engine tells all that the rules look at."""
        rule = self.rule
        if rule.warps or rule.chooses or rule.sees > Sees.TOKEN:
            return False
        return not (self.filters.is_greedy and self.filters.truncates)  # its log_q would be of what the engine keeps
