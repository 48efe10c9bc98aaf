"""Plain forwards: every context from its first token. The oracle of the other engines, and the last resort."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from genlm_backend.llm.hf.replica import reset_rope
from genlm_backend.llm.service import Context, Engine, EngineCounts


class UncachedEngine(Engine):
    """Contexts of equal length share a forward, so there is no padding.

    Args:
        model: A causal language model that only this engine calls.
        rows: Most contexts in one forward.
    """

    def __init__(self, model: Any, rows: int = 16) -> None:
        self.model = model
        self.rows = rows
        self._n_forwards = 0
        self._n_tokens = 0

    def evaluate(self, contexts: Sequence[Context]) -> torch.Tensor:
        by_length: dict[int, list[int]] = defaultdict(list)
        for i, context in enumerate(contexts):
            by_length[len(context.token_ids)].append(i)
        logits: list[torch.Tensor] = []
        done: list[int] = []
        for same in by_length.values():
            for start in range(0, len(same), self.rows):
                group = same[start : start + self.rows]
                logits.append(self._forward([contexts[i].token_ids for i in group]))
                done += group
        back = torch.empty(len(done), dtype=torch.int64)
        back[done] = torch.arange(len(done))
        return torch.cat(logits)[back.to(logits[0].device)] if len(logits) > 1 else logits[0]

    def counts(self) -> EngineCounts:
        return EngineCounts(forwards=self._n_forwards, tokens_computed=self._n_tokens)

    def close(self) -> None:
        self.model = None

    def _forward(self, rows: list[tuple[int, ...]]) -> torch.Tensor:
        reset_rope(self.model)
        ids = torch.tensor(rows, device=self.model.device)
        inputs = call_arguments(self.model, ids, first=0)
        with torch.inference_mode():
            logits: torch.Tensor = self.model(**inputs, use_cache=False).logits[:, -1]
        self._n_forwards += 1
        self._n_tokens += ids.numel()
        return logits


def call_arguments(model: Any, ids: torch.Tensor, first: int) -> dict[str, Any]:
    """Arguments of a plain forward over the last tokens of rows of equal length, as far as this model takes them.

    Args:
        model: The model.
        ids: (rows, new) token ids.
        first: Number of tokens before them.
    """
    n_rows, n_new = ids.shape
    positions = torch.arange(first, first + n_new, device=ids.device).expand(n_rows, -1)
    possible = {
        "attention_mask": torch.ones(n_rows, first + n_new, dtype=torch.int64, device=ids.device),
        "position_ids": positions,
        "logits_to_keep": 1,
    }
    known = inspect.signature(type(model).forward).parameters
    return {"input_ids": ids} | {name: value for name, value in possible.items() if name in known}
