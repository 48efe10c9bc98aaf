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

# Of one query against one slot, in the units of `layout`. Measured on two cores (docs/decisions.md): lists cost as much
# as groups at 1.5 with 128 queries of a trunk of 1,000 tokens in bfloat16, at more than 2 with fewer or shorter ones.
LIST_COST = 1.2


def list_cost(device: torch.device) -> float:
    """Of one query against one slot, in the units of `layout`; infinite where lists cannot be read."""
    if device.type != "cpu":
        return np.inf
    import numba

    if numba.config.DISABLE_JIT:
        return np.inf
    from genlm_backend.team import has_team  # imports numba

    return LIST_COST if has_team() else LIST_COST * torch.get_num_threads()


class _Seen(NamedTuple):
    """What the layers of one rule see; `stand_in` is what they are given as their mask."""

    stand_in: torch.Tensor
    starts: torch.Tensor
    slots: torch.Tensor
    most: int  # slots of one query


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
        most = int(np.diff(lists.starts).max())
        self._seen[id(stand_in)] = _Seen(stand_in, torch.from_numpy(lists.starts), torch.from_numpy(lists.slots), most)
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
        _, starts, slots, most = self._seen[id(mask)]
        _, n_heads, n, key_dim = query.shape
        query = query.contiguous()
        n_kv_heads, capacity, value_dim = values.shape
        out = torch.empty(1, n, n_heads, value_dim, dtype=query.dtype)
        scale = np.float32(key_dim**-0.5 if scaling is None else scaling).view(np.uint32)
        attend(
            (
                *(tensor.data_ptr() for tensor in (query, keys, values)),
                *(starts.data_ptr(), slots.data_ptr(), out.data_ptr()),
                *(query.element_size(), n, n_heads, n_kv_heads, capacity, key_dim, value_dim, most, int(scale)),
            ),
            torch.get_num_threads(),
        )
        return out
