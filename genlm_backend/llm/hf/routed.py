"""Contexts up to a length go to one engine, longer ones to another."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from genlm_backend.llm.service import Context, Engine, EngineCounts


class RoutedEngine(Engine):
    """For models whose positions mean something else in long contexts (dynamic and longrope rotary embeddings).

    Args:
        short: Serves contexts of at most `limit` tokens.
        long: Serves the others.
        limit: In tokens.
    """

    def __init__(self, short: Engine, long: Engine, limit: int) -> None:
        self.short = short
        self.long = long
        self.limit = limit

    def evaluate(self, contexts: Sequence[Context]) -> torch.Tensor:
        is_long = [len(context.token_ids) > self.limit for context in contexts]
        if not any(is_long):
            return self.short.evaluate(contexts)
        if all(is_long):
            return self.long.evaluate(contexts)
        order = [i for i, long in enumerate(is_long) if not long] + [i for i, long in enumerate(is_long) if long]
        n_short = is_long.count(False)
        some = [contexts[i] for i in order]
        logits = torch.cat((self.short.evaluate(some[:n_short]), self.long.evaluate(some[n_short:])))
        return logits[torch.tensor(order).argsort().to(logits.device)]

    def counts(self) -> EngineCounts:
        return EngineCounts(*map(sum, zip(self.short.counts(), self.long.counts(), strict=True)))

    def clear_kv(self) -> None:
        self.short.clear_kv()
        self.long.clear_kv()

    def close(self) -> None:
        self.short.close()
        self.long.close()
