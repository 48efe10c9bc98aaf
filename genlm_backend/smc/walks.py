"""WalkProposal: a whole piece of text by a backtracking walk, as one draw with its weight.

The walk draws from the model under rules and takes back what they object to; its weight makes the draw exact for the
model's texts that no rule objects to (`backtracking.walk`, with `weigh=True`). So a particle can write a line or a
value by a walk, where masks or single tokens cannot say what is allowed.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from genlm_backend.backtracking import walk
from genlm_backend.backtracking.distribution import Filters
from genlm_backend.errors import InvalidProgram
from genlm_backend.llm.base import AsyncLM
from genlm_backend.smc.proposals import Proposal, Proposed


class WalkProposal(Proposal):
    """Draws the tokens of a piece of text: `ids = await ctx.sample(WalkProposal(llm, rules), prompt_ids)`.

    The law: the model's continuations of the prompt to which no rule objects, weighed by their probability. The answer
    is a tuple of token ids. A walk that its budget cut short, or that found nothing, kills the particle.

    Args:
        llm: The model.
        rules: As for `walk`.
        max_new_tokens: Most tokens of the piece.
        mode: "exact" or "mask": the modes that have a weight.
        options: For `walk`, such as `stop` or `temperature`; no filters, which leave texts out.

    Raises:
        InvalidProgram: The mode has no weight, or top-k, top-p or min-p leave out texts that the law has.
        InvalidQuery: A filter is out of its range.
    """

    def __init__(
        self, llm: AsyncLM, rules: Any = (), *, max_new_tokens: int = 32, mode: str = "exact", **options: Any
    ) -> None:
        if mode not in ("exact", "mask"):
            raise InvalidProgram(f"a walk in mode {mode!r} has no weight", "use mode 'exact' or 'mask'")
        if Filters(1.0, *(options.get(name) for name in ("top_k", "top_p", "min_p"))).check().truncates:
            why = "a walk with top_k, top_p or min_p never draws some of the model's texts, which no weight can mend"
            raise InvalidProgram(why, "leave them out; a temperature below 1 also makes likely texts likelier")
        self.llm, self.rules = llm, rules
        self.options = {"max_new_tokens": max_new_tokens, "mode": mode, **options}

    async def propose(self, state: Any, key: int) -> Proposed:
        outcome = await walk(self.llm, state, self.rules, seed=key, weigh=True, **self.options)
        if outcome.log_weight is None or not outcome.is_complete:
            return Proposed((), -math.inf)
        return Proposed(tuple(outcome.token_ids), outcome.log_weight)

    async def target_row(self, state: Any) -> torch.Tensor:
        raise InvalidProgram("the texts of a walk cannot be ranked", "do not use it with beam search or enumeration")

    def piece(self, symbol: Any) -> bytes:
        return b"".join(bytes(self.llm.byte_vocab[token_id]) for token_id in symbol)
