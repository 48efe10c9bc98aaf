"""Token sequences, the usual program: draw symbols from a proposal until one is the end.

result = await smc(sequences(LanguageModel(llm, "The answer is") * grammar, max_tokens=30), 20)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from genlm_backend.errors import InvalidProgram
from genlm_backend.potentials.base import Potential, State
from genlm_backend.smc.context import Context
from genlm_backend.smc.programs import Done, Particle
from genlm_backend.smc.proposals import Direct, Proposal, byte_vocab_of

Boundary = Callable[[Sequence[int]], bool]
"""From the tokens so far to whether a step ends here: where the critic is asked and particles may be resampled."""


def every_token(token_ids: Sequence[int]) -> bool:
    """A boundary after each token."""
    return True


def after_tokens(n: int) -> Boundary:
    """A boundary after every n-th token."""
    return lambda token_ids: len(token_ids) % n == 0


def after_bytes(byte_vocab: Sequence[bytes], ends: bytes = b"\n") -> Boundary:
    """A boundary after each token that holds one of these bytes: with the default, after each line."""
    is_end = [not frozenset(ends).isdisjoint(token) for token in byte_vocab]
    return lambda token_ids: is_end[token_ids[-1]]


def sequences(
    proposal: Proposal | Potential,
    *,
    max_tokens: int,
    critic: Potential | None = None,
    boundary: Boundary = every_token,
    at_limit: Literal["end", "cut"] = "end",
) -> Particle:
    """A particle that writes a sequence; its value is the text if the potential has a language model, else the ids.

    The law of the values is `proposal.potential` times the critic, over sequences of at most `max_tokens` tokens.

    Args:
        proposal: What draws the symbols; a potential is drawn from directly.
        max_tokens: Most tokens, the end not counted.
        critic: A potential too costly to draw from; it twists the weights at each boundary by its `prefix`, and its
            `complete` weighs the end. It changes the law in the same way wherever it is asked.
        boundary: Where steps end; see `every_token`, `after_tokens`, `after_bytes`, or your own.
        at_limit: What happens after `max_tokens`: "end" weighs by the probability of ending there, so that the law is
            that of complete sequences; "cut" takes the beginning as it is, weighed as a beginning.

    Raises:
        InvalidProgram: `max_tokens` is below 1.
    """
    if max_tokens < 1:
        raise InvalidProgram(f"sequences of max_tokens={max_tokens}", "allow at least one token")
    drawn_by = proposal if isinstance(proposal, Proposal) else Direct(proposal)
    rules = _Rules(drawn_by, max_tokens, critic, boundary, at_limit == "cut", byte_vocab_of(drawn_by.potential))
    return _Writing(rules, drawn_by.start(), None if critic is None else critic.start(), ())


@dataclass(frozen=True)
class _Rules:
    proposal: Proposal
    max_tokens: int
    critic: Potential | None
    boundary: Boundary
    is_cut: bool
    byte_vocab: Sequence[bytes] | None


@dataclass(eq=False)  # not frozen: that takes four times as long to make
class _Writing(Particle):
    rules: _Rules
    state: State
    critic_state: State
    token_ids: tuple[int, ...]

    async def step(self, ctx: Context) -> Particle | Done:
        rules, now = self.rules, self
        while True:
            if len(now.token_ids) == rules.max_tokens:
                return await now._at_limit(ctx)
            symbol = await ctx.sample(rules.proposal, now.state)
            if symbol == rules.proposal.potential.end:
                return await now._ended(ctx)
            now = now._with(symbol)
            if rules.boundary(now.token_ids):
                if rules.critic is not None:
                    ctx.twist(await ctx.recorded(now._log_beginning))
                return now

    def _with(self, token_id: int) -> _Writing:
        critic = self.rules.critic
        return _Writing(
            self.rules,
            self.rules.proposal.extend(self.state, token_id),
            None if critic is None else critic.extend(self.critic_state, token_id),
            (*self.token_ids, token_id),
        )

    async def _at_limit(self, ctx: Context) -> Done:
        if not self.rules.is_cut:
            ctx.score(await ctx.recorded(lambda: self.rules.proposal.log_end(self.state)))
            return await self._ended(ctx)
        if self.rules.critic is not None:
            ctx.twist(0.0)
            ctx.score(await ctx.recorded(self._log_beginning))
        return Done(self._value())

    async def _ended(self, ctx: Context) -> Done:
        if self.rules.critic is not None:
            ctx.twist(0.0)
            ctx.score(await ctx.recorded(self._log_whole))
        return Done(self._value())

    async def _log_beginning(self) -> float:
        assert self.rules.critic is not None
        return await self.rules.critic.prefix(self.critic_state)

    async def _log_whole(self) -> float:
        assert self.rules.critic is not None
        return await self.rules.critic.complete(self.critic_state)

    def _value(self) -> Any:
        vocab = self.rules.byte_vocab
        if vocab is None:
            return self.token_ids
        # Not "replace": sequences of different bytes are different values.
        return b"".join(bytes(vocab[i]) for i in self.token_ids).decode("utf-8", "backslashreplace")
