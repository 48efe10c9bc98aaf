"""LazyRow: a row of log-probabilities that is asked for when it is first looked at.

A copy of a particle runs its program up to where it was copied. The draws on the way are on record, so most rows are
only passed along; those that the program does look at are fetched then, usually from the model's memo of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import numpy as np
import torch


class LazyRow(torch.Tensor):
    """A `(vocab,)` float32 tensor like any other; its first use blocks until the model has answered."""

    _fetch: Callable[[], torch.Tensor]
    _fetched: torch.Tensor | None

    @classmethod
    def of(cls, n_tokens: int, fetch: Callable[[], torch.Tensor]) -> Self:
        """The `(n_tokens,)` row that `fetch` gives, not asked for yet."""
        make = torch.Tensor._make_wrapper_subclass
        row: Self = make(cls, (n_tokens,), dtype=torch.float32)
        row._fetch, row._fetched = fetch, None
        return row

    def fetched(self) -> torch.Tensor:
        """The row as an ordinary tensor."""
        if self._fetched is None:
            self._fetched = self._fetch()
        return self._fetched

    def numpy(self, *, force: bool = False) -> np.ndarray[Any, Any]:
        return self.fetched().numpy(force=force)

    def tolist(self) -> Any:
        return self.fetched().tolist()

    def __array__(self, dtype: Any = None) -> np.ndarray[Any, Any]:
        return np.asarray(self.fetched().numpy(), dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return "LazyRow(not looked at)" if self._fetched is None else repr(self._fetched)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Any operation sees ordinary tensors; its result is one."""
        args, kwargs = torch.utils._pytree.tree_map_only(cls, cls.fetched, (args, kwargs or {}))
        return func(*args, **kwargs)
