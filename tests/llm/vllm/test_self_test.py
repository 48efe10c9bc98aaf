"""Which transport serves: one that computes wrong rows, or more than it should, is found out and the next taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from genlm_backend.llm import AsyncVirtualLM
from genlm_backend.llm.vllm import runners, transports
from genlm_backend.llm.vllm.self_test import TRANSPORTS, choose_transport
from tests.llm.conftest import TINY_OPTIONS
from tests.llm.vllm.conftest import next_best_to_live

pytestmark = [pytest.mark.model]


@pytest.fixture(scope="module")
def tiny_bfloat16(needs_vllm: None, tiny_folder: Path) -> Iterator[AsyncVirtualLM]:
    """The small model in 16 bits, where the self-test compares rows only roughly."""
    llm = AsyncVirtualLM.from_name(str(tiny_folder), TINY_OPTIONS | {"dtype": "bfloat16"})
    yield llm
    llm.close()


@pytest.fixture(params=["tiny", "tiny_bfloat16"])
def either(request: pytest.FixtureRequest) -> Iterator[AsyncVirtualLM]:
    llm: AsyncVirtualLM = request.getfixturevalue(request.param)
    yield llm
    llm._engine.use(TRANSPORTS["live"])


@pytest.fixture(autouse=True)
def live_again(tiny: AsyncVirtualLM) -> Any:
    yield
    tiny._engine.use(TRANSPORTS["live"])


def wrong_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runner gets another token than the caller's."""
    write = runners.RunnerV1.write
    shifted = lambda self, feeds: write(  # noqa: E731
        self, [feed._replace(token_ids=[(token + 1) % 512 for token in feed.token_ids]) for feed in feeds]
    )
    monkeypatch.setattr(runners.RunnerV1, "write", shifted)


def shared_tail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forks write into the partial block of their source: no copy on write."""
    fork = transports.Live.fork

    def without_copy(self: Any, source: str, n_shared: int, name: str, *rest: Any) -> None:
        fork(self, source, n_shared, name, *rest)
        for manager in self._scheduler.kv_cache_manager.coordinator.single_type_managers:
            for original, copy in manager._pending_cow_copies:
                blocks = manager.req_to_blocks[name]
                blocks[:] = [original if block is copy else block for block in blocks]

    monkeypatch.setattr(transports.Live, "fork", without_copy)


def no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The private copy of a partial block stays empty."""
    monkeypatch.setattr("vllm.v1.worker.gpu_model_runner.copy_kv_cache_blocks_inplace", lambda *args: None)


def computes_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork that shares nothing: right rows, too many tokens."""
    monkeypatch.setattr(
        transports.Live, "fork", lambda self, source, n, name, ids, adapter: self.open(name, ids, adapter)
    )


def moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """A release of vLLM in which the scheduler's method has another name."""
    from vllm.v1.core.sched.scheduler import Scheduler

    monkeypatch.delattr(Scheduler, "_update_request_with_output")


def takes_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The request takes the token that vLLM sampled."""
    monkeypatch.setattr(
        transports.Live, "_drop_output", lambda self, *args, **kwargs: self._take_output(*args, **kwargs)
    )


def stale_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are found under the hash of a token that was sampled and dropped."""
    drop = transports.Live._drop_output

    def hashed(self: Any, request: Any, new_token_ids: list[int], *args: Any, **kwargs: Any) -> Any:
        if request.max_tokens == transports._NEVER and request.num_tokens % 32 == 31:
            request.append_output_token_ids(list(new_token_ids))
            del request._output_token_ids[-1], request._all_token_ids[-1]
        return drop(self, request, new_token_ids, *args, **kwargs)

    monkeypatch.setattr(transports.Live, "_drop_output", hashed)


@pytest.mark.parametrize(
    ("sabotage", "reason"),
    [
        (wrong_token, "differs from an uncached request"),
        (shared_tail, ""),
        (no_copy, "differs from an uncached request"),
        (computes_all, "forks of one request: computed"),
        (takes_sampled, ""),
        (stale_hash, "sampled and dropped: computed 1 tokens"),
    ],
)
def test_live_requests_that_are_wrong_are_not_used(
    either: AsyncVirtualLM, monkeypatch: pytest.MonkeyPatch, sabotage: Callable[[pytest.MonkeyPatch], None], reason: str
) -> None:
    sabotage(monkeypatch)
    name, reasons = choose_transport(either._engine)
    assert name == next_best_to_live()
    assert reasons[0].startswith("live: ") and reason in reasons[0], reasons


def test_all_three_ways_down(tiny: AsyncVirtualLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing but plain requests that read no cache, it still serves."""

    def fails(self: Any, *args: Any) -> None:
        raise AttributeError("moved")

    monkeypatch.setattr(transports.Live, "__init__", fails)
    monkeypatch.setattr(transports.Resumable, "extend", fails)
    assert choose_transport(tiny._engine)[0] == "fresh"
    name, reasons = choose_transport(tiny._engine, ("live", "resumable", "uncached"))
    assert name == "uncached" and "AttributeError('moved')" in reasons[0] and len(reasons) == 2


def test_a_sound_engine_has_no_reason(either: AsyncVirtualLM) -> None:
    assert choose_transport(either._engine) == ("live", [])
    assert choose_transport(either._engine, ("fresh", "uncached")) == ("fresh", [])
    assert either.statistics().tokens_computed == 0 and either.statistics().kv_tokens == 0


def test_a_resumable_request_that_vllm_names_wrongly_is_not_used(either: AsyncVirtualLM) -> None:
    name, reasons = choose_transport(either._engine, ("resumable", "fresh"))
    assert name == next_best_to_live()
    assert name == "resumable" or "sampled and dropped: computed 1 tokens" in reasons[0], reasons


async def test_the_tiny_model_tells_contexts_apart(tiny: AsyncVirtualLM) -> None:
    """Otherwise none of the comparisons above would mean anything."""
    ids = list(range(5, 40))
    row, other = await asyncio_rows(tiny, ids, [6, *ids[1:]])
    assert float((row - other).abs().max()) > 0.05


async def asyncio_rows(llm: AsyncVirtualLM, *contexts: list[int]) -> torch.Tensor:
    return await llm.batch_next_token_logprobs(contexts)
