"""Options of the engine: refused, defaulted, passed on."""

from __future__ import annotations

from typing import Any

import pytest

from genlm_backend.errors import InvalidEngineOption
from genlm_backend.llm.vllm.options import checked_options


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("tensor_parallel_size", 2, "run one engine per device"),
        ("pipeline_parallel_size", 2, "one device"),
        ("data_parallel_size", 4, "run one engine per device"),
        ("distributed_executor_backend", "ray", "leave it out"),
        ("async_scheduling", True, "the caller chooses each token"),
        ("speculative_config", {"method": "ngram"}, "speculative"),
        ("logits_processors", ["a:B"], "queries and masks"),
        ("scheduler_cls", "a.B", "own scheduler"),
        ("model", "x", "first argument"),
        ("tokenizer", "x", "tokenizer"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(name: str, value: Any, reason: str) -> None:
    with pytest.raises(InvalidEngineOption, match=reason) as caught:
        checked_options({name: value}, is_cpu=True)
    assert f"{name}={value!r}" in str(caught.value)


def test_one_device_is_no_parallelism() -> None:
    options = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "async_scheduling": False}
    assert checked_options(options, is_cpu=True)["tensor_parallel_size"] == 1


def test_what_is_given_wins_over_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    defaults = checked_options({}, is_cpu=True)
    assert defaults["block_size"] == 32 and defaults["enforce_eager"] and defaults["kv_cache_memory_bytes"] > 2**20
    given = checked_options({"block_size": 64, "enforce_eager": False, "gpu_memory_utilization": 0.3}, is_cpu=True)
    assert given["block_size"] == 64 and not given["enforce_eager"]
    assert "kv_cache_memory_bytes" not in given
    on_gpu = checked_options({}, is_cpu=False)
    assert not {"block_size", "enforce_eager", "kv_cache_memory_bytes"} & set(on_gpu)
    assert on_gpu["async_scheduling"] is False and on_gpu["load_format"] == "safetensors"


def test_the_memory_that_vllms_own_variable_sets_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    assert "kv_cache_memory_bytes" not in checked_options({}, is_cpu=True)
