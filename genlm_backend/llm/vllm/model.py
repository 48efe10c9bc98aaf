"""AsyncVirtualLM: the name that programs written for genlm-backend import; the engine itself is not in this version."""

from __future__ import annotations

from typing import Any, Self

from genlm_backend.errors import BackendUnavailable
from genlm_backend.llm.base import AsyncLM


class AsyncVirtualLM(AsyncLM):
    """A language model on vLLM. This version cannot make one; the name is here for imports and `isinstance`.

    Raises:
        BackendUnavailable: Always.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise BackendUnavailable("the vLLM engine", "a later version of genlm-backend; use AsyncTransformer until then")

    @classmethod
    def from_name(cls, model_name: str, engine_opts: dict[str, Any] | None = None, **kwargs: Any) -> Self:
        """See the class."""
        return cls()
