"""Keys and values through transformers' own cache, for models that packed attention does not cover (ALiBi, for one).

The tree and the pool are the same as in the packed engine; each forward gets a fresh cache object filled from them, so
nothing a forward does to its cache can reach another one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from genlm_backend.cache.prefix_tree import Slots
from genlm_backend.errors import NonFiniteLogits
from genlm_backend.llm.hf.kv_pool import PLAN_TOKENS, KVCache
from genlm_backend.llm.hf.uncached import call_arguments
from genlm_backend.llm.service import Context, Engine, EngineCounts


class NotCroppable(Exception):
    """The model's cache is not one key and value per token, so it cannot be cut and copied."""


class CachedEngine(Engine):
    """Rows with equally long known and new parts share a forward, so there is no padding.

    Args:
        model: A causal language model that only this engine calls.
        kv_cache_bytes: Bound of the keys and values that are kept; a batch that runs may go beyond by one plan and the
            prefixes that it continues.
        rows: Most contexts in one forward.
        plan_tokens: Most new tokens planned at once, unless one context alone has more.

    Raises:
        NotCroppable: From `evaluate`.
    """

    def __init__(self, model: Any, kv_cache_bytes: int, rows: int = 64, *, plan_tokens: int = PLAN_TOKENS) -> None:
        self.model = model
        self.rows = rows
        self.plan_tokens = plan_tokens
        self.kv = KVCache(kv_cache_bytes)
        self._n_forwards = 0
        self._n_tokens = 0

    def evaluate(self, contexts: Sequence[Context]) -> torch.Tensor:
        kv = self.kv
        logits: list[torch.Tensor | None] = [None] * len(contexts)
        try:
            self._evaluate(kv, contexts, logits)
        finally:
            kv.make_room(0)
        return torch.stack([row for row in logits if row is not None])

    def _evaluate(self, kv: KVCache, contexts: Sequence[Context], logits: list[torch.Tensor | None]) -> None:
        """Put the logits of each context in its place."""
        kv.tick += 1
        n_new = [kv.n_new(context) for context in contexts]
        # What is held comes first, before it may be evicted; and prefixes before what continues them.
        waiting = sorted(range(len(contexts)), key=lambda i: (n_new[i], len(contexts[i].token_ids)))
        while waiting:
            kv.tick += 1
            n_planned = 0
            first_of: dict[object, int] = {}
            groups: dict[tuple[int, int], list[tuple[int, Slots]]] = defaultdict(list)
            for i in waiting:
                adapter, ids = contexts[i]
                match = kv.tree.match(adapter, ids, len(ids) - 1, kv.tick)
                n_missing = len(ids) - match.length
                if groups and n_planned + n_missing > self.plan_tokens:
                    break
                known = np.concatenate(match.parts) if match.parts else np.empty(0, np.int64)
                # Of contexts that go on with the same new token one is computed now; the others then know more.
                branch = (adapter, int(known[-1]) if len(known) else None, ids[match.length])
                if first_of.setdefault(branch, i) == i:
                    groups[match.length, n_missing].append((i, known))
                    n_planned += n_missing
            for (n_known, _), members in groups.items():
                for start in range(0, len(members), self.rows):
                    part = members[start : start + self.rows]
                    rows = self._forward(kv, [contexts[i] for i, _ in part], [known for _, known in part], n_known)
                    for (i, _), row in zip(part, rows, strict=True):
                        logits[i] = row
            chosen = set(first_of.values())
            waiting = [i for i in waiting if i not in chosen]

    def counts(self) -> EngineCounts:
        kv = self.kv
        return EngineCounts(self._n_forwards, self._n_tokens, kv.tree.n_tokens, kv.n_bytes, kv.n_evicted)

    def clear_kv(self) -> None:
        self.kv = self.kv.emptied()

    def reset(self) -> None:
        """Forget everything, the counts too."""
        self.kv = KVCache(self.kv.budget_bytes)
        self._n_forwards = self._n_tokens = 0

    def close(self) -> None:
        self.clear_kv()
        self.kv.pool.release()
        self.model = None

    def _forward(self, kv: KVCache, contexts: list[Context], known: list[Slots], n_known: int) -> torch.Tensor:
        from transformers import DynamicCache

        device = self.model.device
        ids = torch.tensor([context.token_ids[n_known:] for context in contexts], device=device)
        n_rows, n_new = ids.shape
        kv.make_room(n_rows * n_new)
        cache = DynamicCache()
        with torch.inference_mode():
            if n_known:
                index = torch.from_numpy(np.concatenate(known)).to(device)
                for layer in kv.pool.layers:
                    keys, values = kv.pool.read(layer, index)
                    cache.update(_rows(keys, n_rows), _rows(values, n_rows), layer)
            output = self.model(**call_arguments(self.model, ids, n_known), past_key_values=cache, use_cache=True)
            self._n_forwards += 1
            self._n_tokens += ids.numel()
            self._check(cache, n_known + n_new)
            logits: torch.Tensor = output.logits[:, -1]
            if logits[:, 0].isnan().any():
                raise NonFiniteLogits(n_known + n_new)
            slots = kv.pool.allocate(list(range(n_known, n_known + n_new)) * n_rows)
            try:
                at = torch.from_numpy(slots).to(device)
                held: Any
                for layer, held in enumerate(cache.layers):
                    new = [_packed(tensor[:, :, n_known:]) for tensor in (held.keys, held.values)]
                    kv.pool.write(layer, slots, at, *new)
            except BaseException:
                kv.pool.free(slots)
                raise
        for row, context in enumerate(contexts):
            of_row = slots[row * n_new : (row + 1) * n_new]
            held_already = kv.tree.insert(context.adapter, context.token_ids, n_known, of_row, kv.tick)
            kv.pool.free(of_row[: len(held_already)])
        return logits

    def _check(self, cache: Any, n_tokens: int) -> None:
        for layer in cache.layers:
            keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
            if not cache.is_croppable or keys is None or values is None or keys.shape[2] != n_tokens:
                raise NotCroppable(f"{type(layer).__name__} does not hold one key per token")
        if not cache.layers:
            raise NotCroppable("the model does not use the cache it is given")


def _rows(held: torch.Tensor, n_rows: int) -> torch.Tensor:
    """(heads, rows * known, head_dim) -> (rows, heads, known, head_dim)."""
    return held.view(held.shape[0], n_rows, -1, held.shape[2]).transpose(0, 1).contiguous()


def _packed(new: torch.Tensor) -> torch.Tensor:
    """(rows, heads, new, head_dim) -> (heads, rows * new, head_dim)."""
    return new.transpose(0, 1).reshape(new.shape[1], -1, new.shape[3])
