"""Strategies: backtrack_sampler's names and arguments, each one rule of a walk; and strategies of users.

A strategy here is a description: `rule()` makes the rule. `BaseStrategy` is backtrack_sampler's interface, for
strategies of users, which run unchanged; one of ours can be asked through it too, so that a user's may build on it.
"""

from __future__ import annotations

import asyncio
import math
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from genlm_backend.backtracking.distribution import Distribution
from genlm_backend.backtracking.menu import choose_in_terminal
from genlm_backend.backtracking.phrases import Phrases
from genlm_backend.backtracking.procedures import AdaptiveTemperature, Ask, Creative, Human, Replace, Tell
from genlm_backend.backtracking.providers import TextProvider
from genlm_backend.backtracking.rules import (
    EVERYTHING,
    AllOf,
    FloatRow,
    Keep,
    Prompt,
    Rule,
    Sees,
    Splice,
    Step,
    Undo,
    Verdict,
)


class BaseStrategy(ABC):
    """How backtrack_sampler changes and takes back tokens; tensors are `(1, vocab)`."""

    @abstractmethod
    def get_keep_index(self) -> int:
        """How many tokens of the text are final."""

    @abstractmethod
    def on_logits(self, logits: torch.Tensor, continuation_tokens: list[int]) -> torch.Tensor:
        """Logits after temperature, before the filters."""

    @abstractmethod
    def on_probs(self, probs: torch.Tensor, continuation_tokens: list[int]) -> torch.Tensor:
        """Probabilities after the filters; need not be normalised."""

    @abstractmethod
    def on_next_token(self, continuation_tokens: list[int], probs: torch.Tensor) -> None:
        """A token was drawn; it is the last of the list."""

    @abstractmethod
    def backtrack(self, continuation_tokens: list[int]) -> list[int]:
        """The tokens that stay."""

    @abstractmethod
    def reset(self) -> None:
        """Forget everything: a new text begins."""


class RuleStrategy(BaseStrategy):
    """A strategy that is a rule. The sampler uses the rule; these methods are for strategies of users that build on it.

    They ban what the rule takes back for the prefix where it was taken back. A rule that chooses tokens itself (a
    person) needs the sampler.
    """

    _states: list[Any]

    @abstractmethod
    def rule(self) -> Rule[Any]:
        """A rule of a walk."""

    def reset(self) -> None:
        """Forget everything: a new text begins."""
        self._rule = self.rule()
        provider = getattr(self, "provider", None)
        eos = None if provider is None else provider.get_eos_token_id()
        vocab: Any = getattr(provider, "byte_vocab", None) or getattr(getattr(provider, "llm", None), "byte_vocab", ())
        self._vocab = vocab
        self._eos = frozenset(() if eos is None else (eos,))
        self._states = [self._rule.init(Prompt((), vocab, self._eos))]
        self._banned: dict[tuple[int, ...], set[int]] = {}
        self._pending: list[int] = []
        self._verdict: Verdict = Keep()
        self._keep_index = 0

    def get_keep_index(self) -> int:
        return self._keep_index

    def on_logits(self, logits: torch.Tensor, continuation_tokens: list[int]) -> torch.Tensor:
        self._begin(continuation_tokens)
        logits = logits.clone()
        if self._pending:
            forced = torch.full_like(logits, -math.inf)
            forced[:, self._pending[0]] = 0.0
            return forced
        for token_id in self._banned.get(tuple(continuation_tokens), ()):
            logits[:, token_id] = -math.inf
        if self._rule.warps:
            row = self._rule.warp(self._states[-1], logits[0].float().cpu().numpy())
            logits = torch.from_numpy(np.ascontiguousarray(row))[None].to(logits.device)
        return logits

    def on_probs(self, probs: torch.Tensor, continuation_tokens: list[int]) -> torch.Tensor:
        if self._pending or not self._rule.reweighs:
            return probs
        row = self._rule.reweigh(self._states[-1], probs[0].float().log().cpu().numpy())
        return torch.from_numpy(np.exp(row))[None].to(probs.device)

    def on_next_token(self, continuation_tokens: list[int], probs: torch.Tensor) -> None:
        self._begin(continuation_tokens[:-1])
        token_id = continuation_tokens[-1]
        if self._pending:
            self._pending.pop(0)
            self._states.append(self._states[-1])
            self._verdict = Keep(EVERYTHING if self._pending else 0)
        else:
            state, self._verdict = self._rule.step(self._states[-1], self._step(token_id, continuation_tokens, probs))
            self._states.append(state)
        hold = self._verdict.hold if isinstance(self._verdict, Keep) else EVERYTHING
        self._keep_index = max(self._keep_index, len(continuation_tokens) - hold)

    def backtrack(self, continuation_tokens: list[int]) -> list[int]:
        verdict, self._verdict = self._verdict, Keep()
        if isinstance(verdict, Keep) or not isinstance(verdict, Undo | Splice):
            return continuation_tokens
        n = min(verdict.n, len(continuation_tokens))
        kept = continuation_tokens[: len(continuation_tokens) - n]
        self._begin(kept)
        if isinstance(verdict, Undo):
            self._banned.setdefault(tuple(kept), set()).add(continuation_tokens[len(kept)])
        else:
            provider: Any = getattr(self, "provider", None)
            self._pending = list(verdict.token_ids) or provider.encode(verdict.text.decode(), add_special_tokens=False)
            if verdict.state is not None:
                self._states[-1] = verdict.state
        return kept

    def _begin(self, tokens: Sequence[int]) -> None:
        """Be at a prefix, also when another strategy took tokens back; text that was to be written is dropped then."""
        if len(self._states) > len(tokens) + 1:
            del self._states[len(tokens) + 1 :]
            self._pending = []

    def _step(self, token_id: int, tokens: list[int], probs: torch.Tensor) -> Step:
        q = probs[0].float().cpu().numpy()
        log_q = np.log(np.maximum(q / q.sum(), 0.0), where=q > 0, out=np.full(len(q), -math.inf, np.float32))
        order = np.argsort(-log_q, kind="stable")[: int((q > 0).sum())]
        dist = Distribution(order.astype(np.int64), log_q[order], log_q[order])
        piece = bytes(self._vocab[token_id]) if self._vocab else _provider_text(self, token_id)
        is_special = bool(self._vocab) and self._vocab[token_id].is_special
        value = float(log_q[token_id])
        return Step(
            token_id, piece, tokens, value, value, dist, is_special, token_id in self._eos, byte_vocab=self._vocab
        )


def _provider_text(strategy: Any, token_id: int) -> bytes:
    if not hasattr(strategy, "provider"):  # it looks at rows only
        return b""
    text: str = strategy.provider.decode([token_id])
    return text.encode()


class AntiSlopStrategy(RuleStrategy):
    """Takes back phrases to their start.

    Args:
        provider: Not needed any more; kept for programs that give it.
        slops: Phrases; one string is one phrase.
        keep_index_buffer: Kept for programs that give it; text is held back exactly while a phrase can still match.
        with_variants: In any case; text is found across tokens and spaces either way.
        skip_tokens: The first tokens are not searched.
    """

    def __init__(
        self,
        provider: TextProvider | None,
        slops: str | Sequence[str],
        keep_index_buffer: int = 5,
        with_variants: bool = True,
        skip_tokens: int = 0,
    ) -> None:
        self.provider, self.slops, self.keep_index_buffer = provider, slops, keep_index_buffer
        self.with_variants, self.skip_tokens = with_variants, skip_tokens
        self.reset()

    def rule(self) -> Rule[Any]:
        return Phrases(self.slops, fold=self.with_variants, skip_tokens=self.skip_tokens)


class ReplaceStrategy(RuleStrategy):
    """Writes a text in the place of others.

    Args:
        provider: Turns text into tokens.
        find: Phrases; one string is one phrase.
        replace: What to write instead; it is not searched again by this strategy.
        max_replacements: At most so many in one text.
        max_new_tokens_for_replace: Only in the first so many tokens.
        skip_tokens: Not in the first so many.
        max_prob: Only where the first token of what was found had at most this probability.
    """

    def __init__(
        self,
        provider: TextProvider | None,
        find: str | Sequence[str],
        replace: str,
        max_replacements: int = sys.maxsize,
        max_new_tokens_for_replace: int = sys.maxsize,
        skip_tokens: int = 0,
        max_prob: float = 1,
    ) -> None:
        self.provider, self.find, self.replace = provider, find, replace
        self.max_replacements, self.max_new_tokens_for_replace = max_replacements, max_new_tokens_for_replace
        self.skip_tokens, self.max_prob = skip_tokens, max_prob
        self.reset()

    def rule(self) -> Rule[Any]:
        return Replace(
            self.find,
            self.replace,
            max_replacements=self.max_replacements,
            before=self.max_new_tokens_for_replace,
            skip_tokens=self.skip_tokens,
            max_prob=self.max_prob,
        )


class CreativeWritingStrategy(RuleStrategy):
    """Never the most probable token, unless that leads to a flat distribution; arguments as `procedures.Creative`."""

    def __init__(
        self,
        provider: TextProvider | None,
        top_p_flat: float = 0.65,
        top_k_threshold_flat: int = 9,
        eos_penalty: float = 0.8,
    ) -> None:
        self.provider, self.top_p_flat = provider, top_p_flat
        self.top_k_threshold_flat, self.eos_penalty = top_k_threshold_flat, eos_penalty
        self.reset()

    def rule(self) -> Rule[Any]:
        return Creative(self.top_p_flat, self.top_k_threshold_flat, self.eos_penalty)


class AdaptiveTemperatureStrategy(RuleStrategy):
    """Sharpens rows by a polynomial of their entropy.

    Args:
        poly_coeffs: From the highest power down; a tensor or numbers.
    """

    def __init__(self, poly_coeffs: Any = (-0.037, 0.481, -2.3, 4.917, -1.791)) -> None:
        self.poly_coeffs = poly_coeffs
        self.reset()

    def rule(self) -> Rule[Any]:
        return AdaptiveTemperature([float(c) for c in self.poly_coeffs])


class DebugStrategy(RuleStrategy):
    """Prints the two best tokens at each draw.

    Args:
        provider: Turns tokens into text.
    """

    def __init__(self, provider: TextProvider) -> None:
        self.provider = provider
        self.reset()

    def rule(self) -> Rule[Any]:
        return Tell(self._tell)

    def _tell(self, best: list[tuple[int, float]]) -> None:
        text = self.provider.decode([token_id for token_id, _ in best])
        sys.stdout.write(f"\nTop 2 chars: {text}, top 2 probs: {[p for _, p in best]}. Selected:\n")


class HumanGuidanceStrategy(RuleStrategy):
    """A person chooses each token.

    Args:
        provider: Turns tokens into text.
        top_k: So many best tokens are offered, and to go back.
        min_autopass: A token at least so probable is taken without asking.
        ask: Who is asked; None is a menu in the terminal.
    """

    def __init__(
        self, provider: TextProvider, top_k: int = 3, min_autopass: float = 1.0, ask: Ask | None = None
    ) -> None:
        self.provider, self.top_k, self.min_autopass, self.ask = provider, top_k, min_autopass, ask
        self.reset()

    def rule(self) -> Rule[Any]:
        return Human(self.ask or _ask_in_terminal, self.provider.decode, self.top_k, self.min_autopass)


async def _ask_in_terminal(options: list[tuple[str, float | None]], text: str) -> int:
    given_up = threading.Event()
    try:
        return await asyncio.to_thread(choose_in_terminal, options, text, given_up)
    finally:
        given_up.set()  # a cancelled wait does not end the thread, and the end of the event loop waits for it


class ChainStrategy(BaseStrategy):
    """Several strategies; when several object to one token, only the first in the list acts.

    The others are not asked then (`backtrack`), so what they would write is dropped. A strategy of a user's that is in
    the midst of writing through `on_logits` when another takes tokens back learns of it as in backtrack_sampler: the
    next list of tokens is shorter.

    Args:
        strategies: Of this file, or of users.
    """

    def __init__(self, strategies: Sequence[BaseStrategy]) -> None:
        self.strategies = list(strategies)

    def get_keep_index(self) -> int:
        return min((strategy.get_keep_index() for strategy in self.strategies), default=0)

    def on_logits(self, logits: torch.Tensor, continuation_tokens: list[int]) -> torch.Tensor:
        for strategy in self.strategies:
            logits = strategy.on_logits(logits, continuation_tokens)
        return logits

    def on_probs(self, probs: torch.Tensor, continuation_tokens: list[int]) -> torch.Tensor:
        for strategy in self.strategies:
            probs = strategy.on_probs(probs, continuation_tokens)
        return probs

    def on_next_token(self, continuation_tokens: list[int], probs: torch.Tensor) -> None:
        for strategy in self.strategies:
            strategy.on_next_token(continuation_tokens, probs)

    def backtrack(self, continuation_tokens: list[int]) -> list[int]:
        for strategy in self.strategies:
            kept = strategy.backtrack(list(continuation_tokens))
            if kept != continuation_tokens:
                return kept
        return continuation_tokens

    def reset(self) -> None:
        for strategy in self.strategies:
            strategy.reset()


class StrategyRule(Rule[tuple[int, ...]]):
    """A strategy of a user's as a rule. What it remembers is its own; it serves one walk at a time."""

    sees = Sees.ROW
    is_procedure = True

    def __init__(self, strategy: BaseStrategy) -> None:
        self._strategy = strategy
        self._probs: torch.Tensor | None = None

    def init(self, prompt: Prompt) -> tuple[int, ...]:
        return ()

    def warp(self, state: tuple[int, ...], row: FloatRow) -> FloatRow:
        logits = self._strategy.on_logits(torch.from_numpy(row.astype(np.float32))[None], list(state))
        warped: FloatRow = logits[0].detach().cpu().float().numpy()
        return warped

    def reweigh(self, state: tuple[int, ...], row: FloatRow) -> FloatRow:
        self._probs = self._strategy.on_probs(torch.from_numpy(np.exp(row))[None], list(state))
        q = self._probs[0].detach().cpu().float().numpy()
        log_q: FloatRow = np.log(q, where=q > 0, out=np.full(len(q), -math.inf, np.float32))
        return log_q

    def step(self, state: tuple[int, ...], step: Step) -> tuple[tuple[int, ...], Verdict]:
        path = self._told(state, step)
        kept = list(self._strategy.backtrack(list(path)))
        if kept == path:
            return tuple(path), self._keep(path)
        common = 0
        while common < min(len(kept), len(path)) and kept[common] == path[common]:
            common += 1
        n, why = len(path) - common, type(self._strategy).__name__
        if common == len(kept):
            return tuple(path), Undo(n, keep=1.0, why=why)
        return tuple(path), Splice(n, token_ids=tuple(kept[common:]), why=why)

    def follow(self, state: tuple[int, ...], step: Step) -> tuple[tuple[int, ...], Verdict]:
        """`step` where another one acts: told of the token, not asked what stays."""
        path = self._told(state, step)
        return tuple(path), self._keep(path)

    def _told(self, state: tuple[int, ...], step: Step) -> list[int]:
        path = [*state, step.token_id]
        probs = self._probs
        if step.is_forced or probs is None:
            probs = torch.zeros(1, max(len(step.byte_vocab), step.token_id + 1))
            probs[0, step.token_id] = 1.0
        self._strategy.on_next_token(list(path), probs)
        return path

    def _keep(self, path: list[int]) -> Keep:
        return Keep(max(0, len(path) - self._strategy.get_keep_index()))


class Chain(AllOf):
    """Rules of which the first in order that objects to a token acts; strategies of users after it are not asked."""

    def __init__(self, rules: Sequence[Rule[Any]]) -> None:
        super().__init__(rules, first_in_order=True)

    def follow(self, state: tuple[Any, ...], step: Step) -> tuple[tuple[Any, ...], Verdict]:
        """`step` where a member of an outer chain acts."""
        joined: tuple[tuple[Any, ...], Verdict] = self._joined(self._outcomes(state, step, True), len(step.piece))
        return joined

    def _outcomes(self, state: tuple[Any, ...], step: Step, one_acts: bool = False) -> list[Any]:
        outcomes: list[Any] = []
        for i, (member, s) in enumerate(zip(self.rules, state, strict=True)):
            if one_acts and isinstance(member, StrategyRule | Chain):
                outcomes.append(member.follow(s, step._replace(muted=())))
            else:
                outcomes.append(self._said(i, s, step))
            is_known = isinstance(outcomes[-1], tuple)  # not a coroutine
            one_acts = one_acts or (is_known and not isinstance(outcomes[-1][1], Keep))
        return outcomes


def rule_of(strategy: BaseStrategy) -> Rule[Any]:
    """A strategy as a rule of a walk: the rule of one of ours, else what it does through its methods.

    Raises:
        TypeError: It is no strategy.
    """
    if isinstance(strategy, ChainStrategy) and not _is_changed(strategy):
        return Chain([rule_of(member) for member in strategy.strategies])
    if isinstance(strategy, RuleStrategy) and not _is_changed(strategy):
        return strategy.rule()
    if isinstance(strategy, BaseStrategy):
        return StrategyRule(strategy)
    raise TypeError(f"{strategy!r} is no strategy; expected a BaseStrategy")


def remembering(strategy: BaseStrategy, is_asked: bool = False) -> list[BaseStrategy]:
    """Which objects, of it and its members, change while it is used, so that they serve one text at a time.

    Args:
        strategy: One of ours or of a user's.
        is_asked: It is used through its methods, not as a rule.
    """
    if isinstance(strategy, ChainStrategy):
        is_asked = is_asked or _is_changed(strategy)
        members = [part for member in strategy.strategies for part in remembering(member, is_asked)]
        return [strategy, *members] if is_asked or _is_reset(strategy) else members
    is_rule = isinstance(strategy, RuleStrategy) and not _is_changed(strategy) and not _is_reset(strategy)
    return [] if is_rule and not is_asked else [strategy]


def _is_changed(strategy: ChainStrategy | RuleStrategy) -> bool:
    """Whether a subclass changes what one of ours does, so that it has to be used through its methods."""
    names = ("get_keep_index", "on_logits", "on_probs", "on_next_token", "backtrack")
    return any(getattr(type(strategy), name) is not getattr(_ours(strategy), name) for name in names)


def _is_reset(strategy: ChainStrategy | RuleStrategy) -> bool:
    """Whether a subclass has something of its own to forget; its rule stays ours."""
    return type(strategy).reset is not _ours(strategy).reset


def _ours(strategy: ChainStrategy | RuleStrategy) -> Any:
    return ChainStrategy if isinstance(strategy, ChainStrategy) else RuleStrategy
