"""ListStep: a packed forward whose queries each read the slots of their own list; on a CPU, by compiled code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from genlm_backend.llm.hf.attention import NotPackable, Step
from genlm_backend.llm.hf.kv_pool import KVPool
from genlm_backend.llm.hf.layout import Lists

# Of one query against one slot, in the units of `layout` and for each thread: groups have all threads, a list has one.
# Measured on two cores (docs/decisions.md): 1.0 to 1.4 in bfloat16, 1.3 to 2.3 in float32.
LIST_COST = 1.7

# How to see the bits of a type: in torch, in numpy, and how far they are shifted to be those of a float32.
_BITS = {torch.float32: (torch.int32, np.uint32, 0), torch.bfloat16: (torch.int16, np.uint16, 16)}


def list_cost(device: torch.device) -> float:
    """Of one query against one slot, in the units of `layout`; infinite where lists cannot be read."""
    if device.type != "cpu":
        return np.inf
    import numba

    return np.inf if numba.config.DISABLE_JIT else LIST_COST * torch.get_num_threads()


class _Seen(NamedTuple):
    """What the layers of one rule see; `stand_in` is what they are given as their mask."""

    stand_in: torch.Tensor
    starts: npt.NDArray[np.int64]
    slots: npt.NDArray[np.uint64]


class ListStep(Step):
    """Each query with a list of the slots that it sees.

    Args:
        pool: As in `Step`.
        slots: As in `Step`.
        index: As in `Step`.
        lists: What each new token sees by its place in the tree.
        positions: (n,) of the new tokens.
    """

    def __init__(
        self, pool: KVPool, slots: Any, index: torch.Tensor, lists: Lists, positions: npt.NDArray[np.int64]
    ) -> None:
        super().__init__(pool, slots, index)
        self._lists = lists
        self._positions = positions
        self._seen: dict[int, _Seen] = {}

    def mask(self, mask_function: Callable[..., Any], is_causal: bool, dtype: torch.dtype) -> torch.Tensor:
        lists = self._lists
        if not is_causal:
            zero = torch.zeros((), dtype=torch.int64)
            queries = torch.from_numpy(self._positions[lists.query_of_slot()])
            columns = torch.from_numpy(self.pool.positions(lists.slots))
            allowed = torch.as_tensor(mask_function(zero, zero, queries, columns)).expand(len(lists.slots))
            lists = lists.only(allowed.numpy())
        stand_in = torch.zeros(1, 1, len(self._positions), 1, dtype=dtype)
        self._seen[id(stand_in)] = _Seen(stand_in, lists.starts, lists.slots.astype(np.uint64))
        return stand_in

    def has_made(self, mask: object) -> bool:
        return id(mask) in self._seen

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
        from genlm_backend.llm.hf.list_kernel import attend  # imports numba

        if softcap is not None or sinks is not None:
            raise NotPackable("soft-capped scores and sinks, which the model did not ask for before")
        _, starts, slots = self._seen[id(mask)]
        _, n_heads, n_queries, key_dim = query.shape
        out = torch.empty(n_queries, n_heads, values.shape[2], dtype=torch.float32)
        attend(
            query[0].transpose(0, 1).float().contiguous().numpy().reshape(-1),
            _bits(keys),
            _bits(values),
            np.uint32(_BITS[keys.dtype][2]),
            starts,
            slots,
            (n_heads, keys.shape[0], keys.shape[1], key_dim, values.shape[2]),
            np.float32(key_dim**-0.5 if scaling is None else scaling),
            out.numpy().reshape(-1),
        )
        return out.to(query.dtype)[None]


def _bits(held: torch.Tensor) -> npt.NDArray[Any]:
    as_torch, as_numpy, _ = _BITS[held.dtype]
    return held.view(as_torch).numpy().view(as_numpy).reshape(-1)
