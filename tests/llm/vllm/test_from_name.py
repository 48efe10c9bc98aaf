"""Loading and closing: several engines in one process, what is refused, and what is as before afterwards."""

from __future__ import annotations

import asyncio
import gc
import io
import os
import random
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from genlm_backend.cli import app
from genlm_backend.errors import (
    BackendUnavailable,
    InvalidEngineOption,
    ModelNotFound,
    SlowPathWarning,
    UnknownAdapter,
    UnsafeWeights,
    UnsupportedModel,
)
from genlm_backend.llm import AsyncLM, AsyncVirtualLM, load_model_by_name
from genlm_backend.llm.vllm import core, transports
from genlm_backend.llm.vllm.capture import Captured
from tests.llm.conftest import TINY_OPTIONS
from tests.llm.vllm.conftest import next_best_to_live


def threads() -> set[threading.Thread]:
    """All but those that the event loop keeps for `asyncio.to_thread`."""
    return {thread for thread in threading.enumerate() if not thread.name.startswith("asyncio_")}


def test_without_vllm_construction_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tiny_model_folder: Path
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(BackendUnavailable, match="install it with: pip install vllm"):
        AsyncVirtualLM.from_name(str(tiny_model_folder))


@pytest.mark.model  # another Python that imports torch takes seconds
def test_importing_the_name_imports_no_vllm_and_sets_no_variable() -> None:
    code = (
        "import os, sys, torch, transformers; before = dict(os.environ)\n"
        "from genlm_backend.llm import AsyncVirtualLM\n"
        "import genlm_backend.llm.vllm.self_test\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'vllm'] and dict(os.environ) == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=110)


def test_a_model_that_is_not_there() -> None:
    with pytest.raises(ModelNotFound):
        AsyncVirtualLM.from_name("./no/such/folder")


@pytest.mark.parametrize(
    ("raised", "kind", "told"),
    [
        (io.UnsupportedOperation("fileno"), UnsupportedModel, "UnsupportedOperation: fileno; .*a file descriptor"),
        (PermissionError(13, "Permission denied", "/x"), UnsupportedModel, "PermissionError: .*Permission denied"),
        (ValueError("no such dtype"), UnsupportedModel, "ValueError: no such dtype"),
        (OSError("some/model is not a local folder"), ModelNotFound, "is not a local folder"),
        (FileNotFoundError(2, "No such file", "/x"), ModelNotFound, "No such file"),
    ],
)
def test_what_vllm_raises_while_it_starts_is_told_as_it_was(raised: Exception, kind: type, told: str) -> None:
    error = core._explained("some/model", raised)
    assert type(error) is kind
    with pytest.raises(kind, match=told):
        raise error


def test_what_vllm_froze_is_unfrozen_and_what_the_program_froze_is_not() -> None:
    gc.unfreeze()
    try:
        with core._process_state_kept():
            gc.freeze()
        assert gc.get_freeze_count() == 0
        gc.freeze()
        n_frozen = gc.get_freeze_count()
        with core._process_state_kept():
            pass
        assert gc.get_freeze_count() > n_frozen // 2, "a few may have died meanwhile, in other threads"
    finally:
        gc.unfreeze()


@pytest.mark.thorough
def test_an_engine_that_is_dropped_is_not_counted_as_open() -> None:
    gc.collect()
    before = len(core._open)
    dropped, engine = (core.Core(MagicMock(), Captured()) for _ in range(2))
    core._open.update((dropped, engine))
    assert len(core._open) == before + 2
    last, kept = engine.engine.shutdown, weakref.ref(dropped)
    del dropped
    gc.collect()
    assert kept() is None and len(core._open) == before + 1
    engine.close()
    engine.close()
    assert len(core._open) == before and last.call_count == (not before)


@pytest.mark.model
class TestWithVllm:
    """Needs the real one."""

    @pytest.fixture(autouse=True)
    def installed(self, needs_vllm: None) -> None:
        pass

    async def test_two_engines_in_one_process_and_one_after_another(
        self, tiny: AsyncVirtualLM, tiny_folder: Path
    ) -> None:
        """Closing one harms no other; nothing that vLLM changes for the process stays."""
        ids = [5, 6, 7]
        row = await tiny.next_token_logprobs(ids)
        gc.collect()  # what earlier tests left ends before, or meanwhile
        before, shared, environment = threads(), set(os.listdir("/dev/shm")), dict(os.environ)
        states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
        set_num_threads = torch.set_num_threads
        for _ in range(2):
            async with load_model_by_name(str(tiny_folder), "vllm", {"engine_opts": TINY_OPTIONS}) as other:
                assert isinstance(other, AsyncVirtualLM) and isinstance(other, AsyncLM)
                assert other.transport == "live" and other.device.type == "cpu"
                assert torch.allclose(await other.next_token_logprobs(ids), row, atol=1e-5)
                core = other._engine.core
            assert core.engine is None
            assert (await tiny.next_token_logprobs([*ids, 8])).shape == row.shape
        assert not threads() - before and not set(os.listdir("/dev/shm")) - shared
        assert dict(os.environ) == environment
        assert random.getstate() == states[0]
        assert np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002
        assert torch.equal(torch.get_rng_state(), states[2])
        assert torch.set_num_threads is set_num_threads

    async def test_a_closed_engine_is_freed(self, tiny_folder: Path) -> None:
        llm = AsyncVirtualLM.from_name(str(tiny_folder), TINY_OPTIONS)
        await llm.next_token_logprobs([1, 2])
        model = weakref.ref(llm._engine.core.runner.model)
        await llm.aclose()
        await llm.aclose()
        gc.collect()
        assert model() is None

    @pytest.mark.timeout(300)
    def test_an_engine_that_is_dropped_without_close_is_freed(self, tiny_folder: Path) -> None:
        """Also the first one of a process, whose frames vLLM's modules would keep with the imports that failed."""
        code = (
            "import gc, threading, weakref\n"
            "from genlm_backend.llm import AsyncVirtualLM\n"
            "from genlm_backend.llm.vllm import core\n"
            f"llm = AsyncVirtualLM.from_name({str(tiny_folder)!r}, {TINY_OPTIONS!r})\n"
            "assert gc.get_freeze_count() == 0 and len(core._open) == 1\n"
            "llm.next_token_logprobs_sync([1, 2])\n"
            "model = weakref.ref(llm._engine.core.runner.model)\n"
            "(thread,) = (thread for thread in threading.enumerate() if thread.name == 'genlm-engine')\n"
            "del llm\n"
            "for _ in range(100):\n"
            "    gc.collect()\n"
            "    thread.join(0.1)\n"
            "    if not thread.is_alive():\n"
            "        break\n"
            "gc.collect()\n"
            "assert model() is None and not len(core._open)\n"
        )
        subprocess.run([sys.executable, "-c", code], check=True, timeout=280)

    async def test_a_slower_transport_warns_with_the_reason(
        self, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fails(self: Any, *args: Any) -> None:
            raise AttributeError("the scheduler has no such method")

        monkeypatch.setattr(transports.Live, "__init__", fails)
        with pytest.warns(SlowPathWarning, match=f"'{next_best_to_live()}' requests of vLLM.*no such method"):
            llm = AsyncVirtualLM.from_name(str(tiny_folder), TINY_OPTIONS, batch_size=4)
        async with llm:
            assert llm.transport == next_best_to_live()
            rows = await asyncio.gather(*(llm.next_token_logprobs([1, 2, i]) for i in range(9)))
            assert llm.statistics().batches == 3
            assert torch.allclose(rows[3], await llm.next_token_logprobs_uncached([1, 2, 3]), atol=1e-4)

    def test_an_option_that_vllm_does_not_know(self, tiny_folder: Path) -> None:
        with pytest.raises(InvalidEngineOption, match="no_such_option=1: vLLM's EngineArgs has no such option"):
            AsyncVirtualLM.from_name(str(tiny_folder), {"no_such_option": 1})
        with pytest.raises(InvalidEngineOption, match="tensor_parallel_size=2"):
            AsyncVirtualLM.from_name(str(tiny_folder), {"tensor_parallel_size": 2})

    def test_pickled_weights_are_refused(self, tiny_folder: Path, tmp_path: Path) -> None:
        for file in tiny_folder.iterdir():
            if file.suffix != ".safetensors":
                (tmp_path / file.name).write_bytes(file.read_bytes())
        (tmp_path / "pytorch_model.bin").write_bytes(b"")
        with pytest.raises(UnsafeWeights):
            AsyncVirtualLM.from_name(str(tmp_path), TINY_OPTIONS)

    async def test_an_unknown_adapter(self, tiny: AsyncVirtualLM) -> None:
        with pytest.raises(UnknownAdapter):
            await tiny.next_token_logprobs([1, 2], lora_name="x")

    async def test_rows_are_as_wide_as_the_vocabulary(self, tiny: AsyncVirtualLM) -> None:
        row = await tiny.next_token_logprobs([1, 2])
        assert row.shape == (len(tiny.byte_vocab),) and row.dtype == torch.float32 and row.device == tiny.device
        row.zero_()  # the caller's own
        assert float((await tiny.next_token_logprobs([1, 2])).exp().sum()) == pytest.approx(1, abs=1e-4)

    def test_the_command_sis(self, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        options = ["--particles", "3", "--max-tokens", "4", "--model", str(tiny_folder), "--backend", "vllm"]
        done = CliRunner().invoke(app, ["sis", "ab", *options])
        assert done.exit_code == 0, done.output
        assert "log-evidence" in done.output and "tokens computed" in done.output
