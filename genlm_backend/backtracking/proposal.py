"""Proposal: what a walk draws its next token from at a prefix, asked of the model and remembered; the draw itself."""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import numpy as np

from genlm_backend import sampling
from genlm_backend.backtracking import overlay as tree
from genlm_backend.backtracking.cursor import Drawn, Prefix
from genlm_backend.backtracking.distribution import (
    Distribution,
    Filters,
    Floats,
    alive_scores,
    draw,
    from_best,
    from_row,
    reweighed,
    scaled_row,
)
from genlm_backend.backtracking.guessing import Guesses, Siblings
from genlm_backend.backtracking.rules import BoolRow, Choices, Sees, Splice, Undo
from genlm_backend.backtracking.settings import Settings
from genlm_backend.errors import InvalidQuery, NoTokenAllowed, RuleRefused
from genlm_backend.llm.base import AsyncLM
from genlm_backend.llm.queries import Draw, LogNormalizer, Logprobs, Query, Row, TopK

_ROWS_KEPT = 2
_SUPPORTS_KEPT = 64
_LOG_GONE = math.log(tree.GONE)
_MOST_FORESEEN = 16  # tokens without an alternative that are asked about at once

_ASKED: WeakKeyDictionary[AsyncLM, int] = WeakKeyDictionary()
"""How often walks asked a model about a new prefix."""

_SIBLINGS: WeakKeyDictionary[AsyncLM, WeakValueDictionary[tuple[int, ...], Siblings]] = WeakKeyDictionary()
"""What walks of a model write, by their prompt, as long as one of them is there."""


def _siblings(llm: AsyncLM, prompt: tuple[int, ...]) -> Siblings:
    of_prompt = _SIBLINGS.setdefault(llm, WeakValueDictionary())
    siblings = of_prompt.get(prompt)
    if siblings is None:
        siblings = of_prompt[prompt] = Siblings()
    return siblings


class Proposal:
    """The distributions at the prefixes of one walk, after temperature, filters and rules that reshape them.

    Attributes:
        n_draws: How many tokens were drawn.
    """

    def __init__(self, settings: Settings) -> None:
        self._set = settings
        self.n_draws = 0
        self._names: dict[tuple[int, int], int] = {}
        self._asked: set[int] = set()  # names of prefixes, guesses among them
        self._reached: set[int] = set()  # without the guesses that the walk never came to
        self._wide: set[int] = set()  # names of prefixes at which the filters are lifted
        self._known: OrderedDict[int, Distribution] = OrderedDict()
        self._guesses = Guesses(settings.speculate, _siblings(settings.llm, tuple(settings.prompt)))
        self._last_asked: tuple[int, int] | None = None  # how often the model was asked then, and in how many batches
        self._n_refused = 0  # of the tokens that were drawn without a mask
        self._n_unmasked = 0

    @property
    def n_prefixes(self) -> int:
        """How many different prefixes were asked of the model, guesses included."""
        return len(self._asked)

    @property
    def n_reached(self) -> int:
        """How many different prefixes the walk itself asked about: the same, whatever was guessed."""
        return len(self._reached)

    def name(self, parent: int, token_id: int) -> int:
        """A number for a prefix, the same whenever the walk is there."""
        return self._names.setdefault((parent, token_id), len(self._names) + 1)

    def widen(self, name: int) -> bool:
        """Lift the filters at a prefix; whether that changes anything."""
        if not self._set.filters.truncates or name in self._wide:
            return False
        self._wide.add(name)
        self._known.pop(name, None)
        return True

    async def drawn(self, prefix: Prefix, node: tree.Node, is_masked: bool) -> Drawn | Undo | Splice | None:
        """A token after a prefix, or what a rule that chooses does instead; None if no token is left.

        Args:
            prefix: After which.
            node: What was removed below it.
            is_masked: Only tokens that the rules allow may be drawn.
        """
        if self._set.engine_draws and node.is_whole:
            return await self._drawn_by_engine(prefix, is_masked)
        dist = await self.distribution(prefix)
        scores, log_mass = alive_scores(dist, node, self._set.rule.allowed(prefix.state) if is_masked else None)
        # A rest that differences left may be their rounding error; what a mask alone leaves is exact, however little.
        if log_mass == -math.inf or (log_mass < _LOG_GONE and not node.is_whole):
            return None
        if self._set.rule.chooses:
            return await self._chosen(dist, scores, prefix)
        i = draw(dist, scores, None if self._set.filters.is_greedy else self._key(self.n_draws + 1))
        if i is None:
            return None
        self.n_draws += 1
        token_id = i if dist.token_ids is None else int(dist.token_ids[i])
        log_q = float(dist.log_q[i])
        return Drawn(token_id, float(dist.logprobs[i]), log_q, math.exp(log_q), dist, log_mass)

    async def distribution(self, prefix: Prefix) -> Distribution:
        """What can be drawn after a prefix, before anything is removed."""
        known = self._known.get(prefix.name)
        if known is not None:
            self._known.move_to_end(prefix.name)
            return known
        rule, filters = self._set.rule, self._set.filters
        if prefix.name in self._wide:
            filters = Filters(filters.divisor)
        log_normalizer = await self._log_normalizer(prefix) if rule.sees >= Sees.LOGITS else None
        if filters.top_k is not None and rule.sees < Sees.ROW and not rule.warps:
            best = await self._query(prefix, TopK(min(filters.top_k, len(self._set.llm.byte_vocab))))
            token_ids, logprobs = best.token_ids.cpu().numpy(), best.logprobs.cpu().numpy()
            if logprobs[-1] == -math.inf:  # fewer are possible
                possible = int(np.count_nonzero(logprobs > -math.inf))
                token_ids, logprobs = token_ids[:possible], logprobs[:possible]
            dist = from_best(token_ids, logprobs, filters, log_normalizer)
        else:
            row = (await self._query(prefix, Row())).cpu().numpy()
            scaled = scaled_row(row, filters)
            if rule.warps:
                scaled = rule.warp(prefix.state, scaled.copy() if scaled is row else scaled)
            dist = from_row(row, scaled, filters, log_normalizer, rule.sees >= Sees.ROW)
            if rule.reweighs:
                dist = reweighed(dist, row, lambda q: rule.reweigh(prefix.state, q))
        self._remember(prefix.name, dist)
        return dist

    # ---- drawing

    async def _drawn_by_engine(self, prefix: Prefix, is_masked: bool) -> Drawn | None:
        """The common case: no row leaves the engine, and a batch is drawn at once.

        The noise of a token is the same under a mask and without one, so a token that is drawn without and allowed is
        the one that is drawn under it. Where the rules tell that of one token, the mask is made only if it is not, or
        if most were not before. The first draw has its mask, so that a constraint that has none is refused at once.
        """
        rule, key = self._set.rule, self._key(self.n_draws + 1)
        drawn = None
        is_lazy = is_masked and rule.tells and not self._set.weigh and self.n_draws > 0
        if not is_masked or (is_lazy and 2 * self._n_refused <= self._n_unmasked):
            drawn = await self._asked_to_draw(prefix, key, None)
            if is_masked and drawn is not None:
                self._n_unmasked += 1
                if not rule.allows(prefix.state, drawn.token_id):
                    self._n_refused += 1
                    drawn = None
        if is_masked and drawn is None:
            drawn = await self._asked_to_draw(prefix, key, rule.allowed(prefix.state))
        self.n_draws += drawn is not None
        return drawn

    async def _asked_to_draw(self, prefix: Prefix, key: int, mask: BoolRow | None) -> Drawn | None:
        temperature, top_k, top_p, min_p = self._set.filters
        if prefix.name in self._wide:
            top_k = top_p = min_p = None
        elif top_k is not None:
            top_k = min(top_k, len(self._set.llm.byte_vocab))
        try:
            drawn = await self._query(prefix, Draw(key, temperature, mask, top_k, top_p, min_p))
        except NoTokenAllowed:
            return None
        log_q = drawn.logprob if self._set.filters.is_greedy else drawn.log_q + drawn.log_mass
        return Drawn(drawn.token_id, drawn.logprob, log_q, math.exp(log_q), None, drawn.log_mass)

    async def _chosen(self, dist: Distribution, scores: Floats, prefix: Prefix) -> Drawn | Undo | Splice:
        left = scores > -math.inf
        token_ids = np.flatnonzero(left) if dist.token_ids is None else dist.token_ids[left]
        order = np.argsort(-dist.log_q[left], kind="stable")
        shown = Distribution(token_ids[order], dist.logprobs[left][order], dist.log_q[left][order])
        choices = Choices(shown, prefix.ids, self._set.llm.byte_vocab)
        choice: Any = await self._set.rule.choose(prefix.state, choices)
        if isinstance(choice, Undo | Splice):
            return choice
        self.n_draws += 1
        i = dist.index(int(choice))
        logprob = math.nan if i is None else float(dist.logprobs[i])
        return Drawn(int(choice), -math.inf if math.isnan(logprob) else logprob, math.nan, 0.0, dist)

    def _key(self, n: int) -> int:
        return sampling.draw_key(self._set.seed, self._set.lineage, n, "walk")

    # ---- asking the model

    async def _query(self, prefix: Prefix, query: Query) -> Any:
        """The model's answer about a prefix; about a new one, what is likely to be asked next is asked along."""
        whole, name = [*self._set.prompt, *prefix.ids], prefix.name
        guess = [] if name in self._asked else self._guess(prefix)
        self._asked.add(name)
        self._reached.add(name)
        if not guess:
            return await self._set.llm.query(whole, query, self._set.adapter)
        for token_id in guess:
            name = self.name(name, token_id)
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

    def _guess(self, prefix: Prefix) -> list[int]:
        """Tokens that may follow and are worth asking about: what a rule foresees, then what is looked up."""
        llm = self._set.llm
        _ASKED[llm] = _ASKED.get(llm, 0) + 1
        is_masked = self._set.mode == "mask"
        foreseen = list(self._set.rule.foreseen(prefix.state)[:_MOST_FORESEEN]) if is_masked else []
        if not foreseen and not self._set.speculate:
            return []
        n_room = self._set.max_new_tokens - len(prefix.ids) - 1
        return self._guesses.after(self._set.prompt, prefix.ids, foreseen, self._set.eos, n_room, self._n_walks())

    def _n_walks(self) -> float:
        """How many walks share a forward pass of the model, as far as was seen since this one guessed last."""
        now = _ASKED[self._set.llm], self._set.llm.statistics().batches
        before, self._last_asked = self._last_asked or now, now
        return max(1.0, (now[0] - before[0]) / max(1, now[1] - before[1]))

    async def _log_normalizer(self, prefix: Prefix) -> float:
        try:
            value = float(await self._query(prefix, LogNormalizer()))
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
