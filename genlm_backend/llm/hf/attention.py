"""Packed tree attention: the attention and mask functions that transformers calls during a packed forward.

All new tokens of a batch are one row. Their keys and values go to slots of the pool; each query sees the slots of its
own ancestors and itself. Which of those a layer may see (a sliding window, a chunk) is what transformers hands to the
registered mask function, evaluated on positions instead of indices; so there is nothing per architecture here.

The cost of a layer is queries x columns, while copying columns is cheap. So the queries can be dealt into groups that
each see only the columns they need: the shared trunk is read once per group, and nobody pays for other groups' tails.
"""

from __future__ import annotations

import contextvars
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from genlm_backend.llm.hf.kv_pool import KVPool

IMPLEMENTATION = "genlm_tree"
IMPLEMENTATION_LIKE_SDPA = "genlm_tree_sdpa"
FOLDED_QUERIES = 16
LISTED = (torch.float32, torch.bfloat16)  # types of keys and values that can be read by lists


class NotPackable(Exception):
    """The model does something during a forward that packed attention does not cover."""


class Step(ABC):
    """What one packed forward needs; lives for that forward only.

    Args:
        pool: Where keys and values are kept.
        slots: Slots of the new tokens, (n,) increasing; and the same on the device.
        index: The same on the model's device.

    Attributes:
        layers_seen: Numbers of the layers whose attention was computed.
        can_be_lists: Whether none of them asked for more than lists can do: soft-capped scores, sinks, other types.
    """

    def __init__(self, pool: KVPool, slots: Any, index: torch.Tensor) -> None:
        self.pool = pool
        self.slots = slots
        self.index = index
        self.layers_seen: list[int] = []
        self.can_be_lists = True

    @abstractmethod
    def mask(self, mask_function: Callable[..., Any], is_causal: bool, dtype: torch.dtype) -> torch.Tensor:
        """What stands for the mask of layers whose own rule is `mask_function`."""

    @abstractmethod
    def has_made(self, mask: object) -> bool:
        """Whether this step made a mask: a layer that uses another has a rule that we do not see."""

    @abstractmethod
    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor,
        scaling: float | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention of one layer: (1, n, heads, value_dim).

        Args:
            query: (1, heads, n, key_dim).
            keys: (kv_heads, capacity, key_dim), the pool's.
            values: (kv_heads, capacity, value_dim).
            mask: One that `mask` made.
            scaling: Of the scores; None is 1 / sqrt(key_dim).
            softcap: None for none.
            sinks: None for none.
        """


class TreeStep(Step):
    """Queries in groups, each with the columns that it needs.

    Args:
        pool: As in `Step`.
        slots: As in `Step`.
        index: As in `Step`.
        columns: Slots each group of queries sees: (groups, columns) on the device, or None for the slice of the pool
            that starts at `first_column`.
        n_columns: Number of columns.
        first_column: Start of the slice.
        visible: (groups, queries, columns) bool on the device; groups x queries >= n, the rest is padding.
        query_positions: (groups, queries) int64 on the device.
        column_positions: (groups, columns) int64 on the device.
    """

    def __init__(
        self,
        pool: KVPool,
        slots: Any,
        index: torch.Tensor,
        columns: torch.Tensor | None,
        n_columns: int,
        first_column: int,
        visible: torch.Tensor,
        query_positions: torch.Tensor,
        column_positions: torch.Tensor,
    ) -> None:
        super().__init__(pool, slots, index)
        self.columns = columns
        self.n_columns = n_columns
        self.first_column = first_column
        self.visible = visible
        self.query_positions = query_positions
        self.column_positions = column_positions
        self._masks: dict[int, torch.Tensor] = {}
        self._folded: dict[tuple[int, int], torch.Tensor] = {}

    def mask(self, mask_function: Callable[..., Any], is_causal: bool, dtype: torch.dtype) -> torch.Tensor:
        """Additive: (groups, 1, queries, columns)."""
        visible = self.visible[:, None]
        if not is_causal:
            zero = torch.zeros((), dtype=torch.int64, device=visible.device)
            allowed = mask_function(
                zero, zero, self.query_positions[:, None, :, None], self.column_positions[:, None, None, :]
            )
            visible = visible & allowed
        mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)
        self._masks[id(mask)] = mask
        return mask

    def has_made(self, mask: object) -> bool:
        return id(mask) in self._masks

    def folded(self, mask: torch.Tensor, n_repeats: int) -> torch.Tensor:
        """A mask of this step for queries of `n_repeats` heads in one: (groups, 1, n_repeats * queries, columns)."""
        folded = self._folded.get((id(mask), n_repeats))
        if folded is None:
            folded = self._folded[id(mask), n_repeats] = mask.repeat(1, 1, n_repeats, 1)
        return folded

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor,
        scaling: float | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        if self.columns is None:
            span = slice(self.first_column, self.first_column + self.n_columns)
            keys, values = keys[None, :, span], values[None, :, span]
        else:
            keys, values = _gather(keys, self.columns), _gather(values, self.columns)
        n_groups, _, n_queries, _ = mask.shape
        queries = _deal(query[0], n_groups, n_queries)
        n_heads, n_kv_heads = queries.shape[1], keys.shape[1]
        if softcap is None and sinks is None:
            if n_heads != n_kv_heads and n_queries <= FOLDED_QUERIES:
                # Heads that share keys are more queries of one head: fewer and larger products.
                mask = self.folded(mask, n_heads // n_kv_heads)
                queries = queries.reshape(n_groups, n_kv_heads, -1, queries.shape[3])
            out = F.scaled_dot_product_attention(
                queries,
                keys,
                values,
                attn_mask=_as(mask, queries.dtype),
                scale=scaling,
                enable_gqa=queries.shape[1] != n_kv_heads,
            ).reshape(n_groups, n_heads, n_queries, -1)
        else:
            out = _plain_attention(queries, keys, values, _as(mask, queries.dtype), scaling, softcap, sinks)
        out = out.transpose(1, 2).reshape(1, n_groups * n_queries, out.shape[1], out.shape[3])
        return out[:, : query.shape[2]]


_step: contextvars.ContextVar[Step] = contextvars.ContextVar("genlm_step")


def register() -> None:
    """Make the functions known to transformers; does nothing the second time."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, tree_attention)
    AttentionInterface.register(IMPLEMENTATION_LIKE_SDPA, tree_attention_like_sdpa)
    AttentionMaskInterface.register(IMPLEMENTATION, tree_mask)
    AttentionMaskInterface.register(IMPLEMENTATION_LIKE_SDPA, tree_mask)


def implementation_for(own: str) -> str:
    """The packed attention that computes what a model's own attention implementation does."""
    return IMPLEMENTATION_LIKE_SDPA if own == "sdpa" else IMPLEMENTATION


def run_step(step: Step, forward: Callable[[], Any]) -> Any:
    """Run a forward whose attention is `step`."""
    token = _step.set(step)
    try:
        return forward()
    finally:
        _step.reset(token)


def tree_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    use_vmap: bool = False,
    **kwargs: Any,
) -> torch.Tensor:
    """Called by transformers once per kind of layer: what its queries may see, and are ancestors."""
    from transformers.masking_utils import causal_mask_function

    step = _step.get()
    if use_vmap or mask_function is None:
        raise NotPackable("the model changes the causal mask by indices, not by positions")
    return step.mask(mask_function, mask_function is causal_mask_function, dtype)


def tree_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Called by transformers in each layer: query (1, heads, n, head_dim), key and value (1, kv_heads, n, head_dim)."""
    step = _step.get()
    if attention_mask is None or not step.has_made(attention_mask):
        raise NotPackable("a layer does not use the mask that transformers' mask functions made")
    layer = getattr(module, "layer_idx", None)
    if layer is None or layer in step.layers_seen:
        raise NotPackable("attention layers are not told apart by layer_idx")
    step.layers_seen.append(layer)
    keys, values = step.pool.write(layer, step.slots, step.index, key[0], value[0])
    is_listed = key.dtype == value.dtype and key.dtype in LISTED
    step.can_be_lists &= is_listed and softcap is None and s_aux is None
    return step.attend(query, keys, values, attention_mask, scaling, softcap, s_aux), None


def tree_attention_like_sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers' "sdpa": soft-capping and sinks, which it has no argument for, are passed over in silence."""
    return tree_attention(module, query, key, value, attention_mask, scaling)


def _as(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return mask if mask.dtype == dtype else mask.to(dtype)


def _gather(held: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """(kv_heads, capacity, head_dim) at (groups, columns) -> (groups, kv_heads, columns, head_dim)."""
    n_groups, n_columns = columns.shape
    return held.index_select(1, columns.view(-1)).view(held.shape[0], n_groups, n_columns, -1).transpose(0, 1)


def _deal(query: torch.Tensor, n_groups: int, n_queries: int) -> torch.Tensor:
    """(heads, n, head_dim) -> (groups, heads, queries, head_dim), padded with zeros."""
    if n_groups == 1:
        return query[None]
    n_padding = n_groups * n_queries - query.shape[1]
    if n_padding:
        query = F.pad(query, (0, 0, 0, n_padding))
    return query.reshape(query.shape[0], n_groups, n_queries, -1).transpose(0, 1)


def _plain_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention with what `scaled_dot_product_attention` lacks: soft-capped scores (Gemma 2), sinks (gpt-oss)."""
    n_repeats = queries.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(n_repeats, 1), values.repeat_interleave(n_repeats, 1)
    scores = queries @ keys.transpose(-1, -2) * (queries.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = (scores + mask).float()
    if sinks is not None:
        sink = sinks.float().view(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        return torch.cat((scores, sink), -1).softmax(-1)[..., :-1].to(values.dtype) @ values
    return scores.softmax(-1).to(values.dtype) @ values
