"""The packed engine: all new tokens of a batch as one row of one forward, keys and values in our own pool."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from genlm_backend.cache.prefix_tree import Slots
from genlm_backend.errors import NonFiniteLogits
from genlm_backend.llm.hf.attention import Step, TreeStep, run_step
from genlm_backend.llm.hf.kv_pool import PLAN_TOKENS, KVCache, KVPool
from genlm_backend.llm.hf.layout import Layout, Lists, make_layout
from genlm_backend.llm.hf.lists import ListStep, list_cost
from genlm_backend.llm.hf.plan import ANCHORED, Plan, make_plan, make_view
from genlm_backend.llm.service import Context, Engine, EngineCounts

STEP_TOKENS = 1024  # new tokens in one forward: bounds the mask, and how long closing the model can take


class PackedEngine(Engine):
    """Packed tree attention on a Hugging Face model.

    Args:
        model: A causal language model whose attention implementation is one of `attention`'s; only this engine
            calls it.
        kv_cache_bytes: Bound of the keys and values that are kept; a batch that runs may go beyond by one plan and the
            prefixes that it continues.
        step_tokens: Most new tokens in one forward.
        plan_tokens: Most new tokens planned at once, unless one context alone has more.
        is_fused: Whether layers may be computed by `FusedLayer`, for which a self-test must speak.
        list_cost: For tests: what reading lists costs, instead of what was measured.

    Attributes:
        n_fused: Layers that are.
    """

    def __init__(
        self,
        model: Any,
        kv_cache_bytes: int,
        *,
        step_tokens: int = STEP_TOKENS,
        plan_tokens: int = PLAN_TOKENS,
        is_fused: bool = True,
        list_cost: float | None = None,
    ) -> None:
        from genlm_backend.llm.hf.fused import fuse  # imports numba

        self.model = model
        self.n_fused = fuse(model) if is_fused else 0
        self.step_tokens = step_tokens
        self.plan_tokens = plan_tokens
        self.kv = KVCache(kv_cache_bytes)
        self.last_layers: list[int] = []
        self.last_layout = (0, 0, 0)  # groups, queries, columns of the last forward; no groups: lists
        self._list_cost = list_cost
        self._listed: torch.dtype | None = None  # the model's type when a forward showed that lists can compute it
        self._n_forwards = 0
        self._n_tokens = 0

    def evaluate(self, contexts: Sequence[Context]) -> torch.Tensor:
        kv = self.kv  # `clear_kv` puts another one there; what runs goes on with this one
        # Neighbours in sorted order share prefixes, so groups of queries share columns.
        order = sorted(range(len(contexts)), key=lambda i: (contexts[i].adapter or "", contexts[i].token_ids))
        done: list[int] = []
        logits: list[torch.Tensor] = []
        try:
            while len(done) < len(order):
                kv.tick += 1  # what only earlier plans of this batch used may be evicted
                rest = order[len(done) :]
                plan = make_plan(kv.tree, [contexts[i] for i in rest], self.plan_tokens, kv.tick)
                if not done and len(plan.targets) < len(rest):  # what is held comes first, before it may be evicted
                    n_new = [kv.n_new(context) for context in contexts]
                    order.sort(key=lambda i: n_new[i] > 1)
                    rest = order
                    plan = make_plan(kv.tree, [contexts[i] for i in rest], self.plan_tokens, kv.tick)
                planned = rest[: len(plan.targets)]
                logits.append(self._compute(kv, plan, [contexts[i] for i in planned], np.argsort(planned)))
                done += sorted(planned)
        finally:
            kv.make_room(0)
        if len(logits) == 1:
            return logits[0]
        return torch.cat(logits)[torch.from_numpy(np.argsort(done)).to(logits[0].device)]

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

    def _compute(self, kv: KVCache, plan: Plan, contexts: list[Context], order: np.ndarray[Any, Any]) -> torch.Tensor:
        """Logits for the contexts of a plan, in the given order of them; records what was computed."""
        n = len(plan.tokens)
        kv.make_room(n)
        slots = kv.pool.allocate(plan.positions)
        logits: list[torch.Tensor] = []
        targets = np.array(plan.targets)[order]
        row_of = np.empty(len(targets), np.int64)  # where each target's row is among the computed rows
        try:
            n_rows = 0
            for start in range(0, n, self.step_tokens):
                end = min(start + self.step_tokens, n)
                wanted = np.flatnonzero((targets >= start) & (targets < end))
                row_of[wanted] = np.arange(n_rows, n_rows + len(wanted))
                n_rows += len(wanted)
                step = self._forward(kv.pool, plan, slots, start, end, (targets[wanted] - start).tolist())
                if len(wanted):
                    # All tokens of a batch read the same columns, so NaN in one context reaches the others' rows.
                    if step[:, 0].isnan().any():
                        raise NonFiniteLogits(max(len(context.token_ids) for context in contexts))
                    logits.append(step)
        except BaseException:
            kv.pool.wipe(slots)
            kv.pool.free(slots)
            raise
        self._record(kv, plan, contexts, slots)
        if len(logits) == 1:
            return logits[0]
        return torch.cat(logits)[torch.from_numpy(row_of).to(logits[0].device)]

    def _forward(self, pool: KVPool, plan: Plan, slots: Slots, start: int, end: int, keep: list[int]) -> torch.Tensor:
        """One forward over the new tokens `start` to `end`: logits of those in `keep`, (len(keep), n_logits)."""
        device = self.model.device
        layout = make_layout(make_view(plan, slots, start, end), self._cost_of_lists())
        own = slots[start:end]
        index = torch.from_numpy(own).to(device)
        step: Step
        if isinstance(layout, Lists):
            step = ListStep(pool, own, index, layout, np.array(plan.positions[start:end]))
            self.last_layout = (0, end - start, len(layout.slots))
        else:
            step = self._tree_step(pool, layout, own, index, plan.positions[start:end])
            self.last_layout = layout.visible.shape
        # A mask of ones keeps transformers from reading our positions as several packed sequences.
        inputs = {
            "input_ids": torch.tensor([plan.tokens[start:end]], device=device),
            "position_ids": torch.tensor([plan.positions[start:end]], device=device),
            "attention_mask": torch.ones(1, end - start, dtype=torch.int64, device=device),
            "use_cache": False,
            "logits_to_keep": torch.tensor(keep or [0], device=device),
        }
        with torch.inference_mode():
            logits: torch.Tensor = run_step(step, lambda: self.model(**inputs).logits)[0]
        self.last_layers = step.layers_seen
        self._listed = self.model.dtype if step.can_be_lists else None
        self._n_forwards += 1
        self._n_tokens += end - start
        return logits

    def _cost_of_lists(self) -> float:
        if self._listed != self.model.dtype:  # not known yet, or changed by the model's owner
            return math.inf
        return list_cost(self.model.device) if self._list_cost is None else self._list_cost

    def _tree_step(
        self, pool: KVPool, layout: Layout, own: Slots, index: torch.Tensor, its_positions: list[int]
    ) -> TreeStep:
        n_groups, n_queries, n_columns = layout.visible.shape
        device = self.model.device
        columns = None if layout.columns is None else torch.from_numpy(layout.columns)
        span = np.arange(layout.first, layout.first + n_columns)[None] if layout.columns is None else layout.columns
        positions = np.zeros(n_groups * n_queries, np.int64)
        positions[: len(own)] = its_positions
        return TreeStep(
            pool=pool,
            slots=own,
            index=index,
            columns=None if columns is None else columns.to(device),
            n_columns=n_columns,
            first_column=layout.first,
            visible=torch.from_numpy(layout.visible).to(device),
            query_positions=torch.from_numpy(positions.reshape(n_groups, n_queries)).to(device),
            column_positions=torch.from_numpy(pool.positions(span)).to(device),
        )

    def _record(self, kv: KVCache, plan: Plan, contexts: list[Context], slots: Slots) -> None:
        """Put what was computed into the tree; slots of tokens that it held already are free again."""
        is_kept = np.zeros(len(slots), np.bool_)
        for context, first, target in zip(contexts, plan.n_known, plan.targets, strict=True):
            path = []
            at = target
            while at != ANCHORED:
                path.append(at)
                at = plan.parents[at]
            path.reverse()
            held = kv.tree.insert(context.adapter, context.token_ids, first, slots[path], kv.tick)
            is_kept[path[len(held) :]] = True
        kv.pool.free(slots[~is_kept])
