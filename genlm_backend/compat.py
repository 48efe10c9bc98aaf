"""Programs written for genlm-backend run on this one: `import genlm_backend.compat` before they are imported.

genlm-control, genlm-bytes and llamppl import `genlm.backend` and its submodules. This module puts ours there, in
this process only: no file is written, and an installed genlm-backend is left as it is. The classes are the same objects
under both names, so `isinstance` holds.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import Self

from genlm_backend.errors import BackendUnavailable

MODULES = ("trie", "tokenization", "tokenization.token", "tokenization.vocabulary", "cache")


def install() -> None:
    """Make `genlm.backend` mean this package; does nothing the second time.

    Raises:
        RuntimeError: genlm-backend itself was imported before: its classes are in use already.
    """
    import genlm_backend

    there = sys.modules.get("genlm.backend")
    if there is not None:
        if getattr(there, "load_model_by_name", None) is genlm_backend.load_model_by_name:
            return
        raise RuntimeError("genlm.backend was imported before genlm_backend.compat; import genlm_backend.compat first")
    backend = types.ModuleType("genlm.backend", genlm_backend.__doc__)
    backend.__path__ = []
    vars(backend).update({name: getattr(genlm_backend, name) for name in genlm_backend.__all__})
    vars(_namespace())["backend"] = sys.modules["genlm.backend"] = backend
    modules = {name: importlib.import_module(f"genlm_backend.{name}") for name in MODULES}
    for name, module in (modules | {"llm": _llm_module(), "tokenization.bytes": _bytes_module()}).items():
        sys.modules[f"genlm.backend.{name}"] = module
        if "." not in name:
            vars(backend)[name] = module


def _namespace() -> types.ModuleType:
    """The namespace package `genlm`, whose other parts may be installed."""
    try:
        return importlib.import_module("genlm")
    except ModuleNotFoundError:
        module = sys.modules["genlm"] = types.ModuleType("genlm")
        module.__path__ = []
        return module


def _llm_module() -> types.ModuleType:
    """Our `llm` and the names of the engines that this package does not have, for imports and `isinstance`."""
    from genlm_backend import llm

    module = types.ModuleType("genlm.backend.llm", "The language models of genlm_backend, under genlm-backend's names.")
    vars(module).update({name: getattr(llm, name) for name in llm.__all__})
    for name in ("AsyncMlxLM", "AsyncSGLTransformer"):
        vars(module)[name] = type(name, (_Absent,), {})
    return module


class _Absent:
    """An engine of genlm-backend that this package does not have."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        raise BackendUnavailable(type(self).__name__, None, "AsyncTransformer")

    @classmethod
    def from_name(cls, *args: object, **kwargs: object) -> Self:
        """See the class."""
        return cls()


def _bytes_module() -> types.ModuleType:
    from genlm_backend.tokenization import get_byte_vocab

    module = types.ModuleType(
        "genlm.backend.tokenization.bytes", "Where older versions of genlm-bytes look for `get_byte_vocab`."
    )
    vars(module)["get_byte_vocab"] = get_byte_vocab
    return module


install()
