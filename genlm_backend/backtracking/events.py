"""What a walk tells: its events, one by one, and at the end its outcome."""

from __future__ import annotations

from typing import Any, NamedTuple


class Token(NamedTuple):
    """A token was drawn.

    Attributes:
        token_id: Which.
        piece: Its bytes; of a special token, its name.
        logprob: Under the model, nats.
        log_q: Under the filtered distribution, before anything was removed, nats; NaN where a rule chose.
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
        logprob: Of the tokens under the model, nats; None if some were written, not drawn.
        log_q: Under the filtered distribution, nats; None likewise, or if a rule chose some.
        log_weight: See the top of `walk`; None where there is none; -inf at a dead end.
        n_undos: How often tokens were taken back.
        n_draws: How many tokens were drawn, rejected ones included.
        n_prefixes: How many different prefixes were asked of the model, guesses included; these depend on what else
            runs.
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
