"""What is written into vLLM's model runners, on structures of the same names; V2's has not run on a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from genlm_backend.llm.vllm.capture import SLOT, Captured, _Processor
from genlm_backend.llm.vllm.runners import Feed, RunnerV1, RunnerV2, runner_for


def v1_runner() -> Any:
    """Request "a" (prompt 1 2, held 1 2 3, sampled 99) is in row 1; "b" (prompt 5, sampled 98) has no row now."""
    token_ids = np.zeros((2, 8), np.int32)
    token_ids[1, :4] = 1, 2, 3, 99
    return SimpleNamespace(
        input_batch=SimpleNamespace(
            token_ids_cpu=token_ids,
            is_token_ids=torch.zeros(2, 8, dtype=torch.bool),
            num_tokens_no_spec=np.array([0, 4]),
            req_id_to_index={"a": 1},
        ),
        requests={
            "a": SimpleNamespace(num_prompt_tokens=2, output_token_ids=[3, 99]),
            "b": SimpleNamespace(num_prompt_tokens=1, output_token_ids=[98]),
        },
    )


def test_v1_takes_the_callers_tokens_in_place_of_the_sampled_one() -> None:
    runner = v1_runner()
    RunnerV1(runner).write([Feed("a", 3, (7, 8)), Feed("b", 1, (9,))])
    assert runner.requests["a"].output_token_ids == [3, 7, 8]
    assert runner.requests["b"].output_token_ids == [9]
    assert runner.input_batch.token_ids_cpu[1].tolist() == [1, 2, 3, 7, 8, 0, 0, 0]
    assert runner.input_batch.num_tokens_no_spec.tolist() == [0, 5]
    assert runner.input_batch.is_token_ids[1].tolist() == [False] * 3 + [True] * 2 + [False] * 3
    assert not runner.input_batch.token_ids_cpu[0].any()


def test_v2_takes_the_callers_token_as_the_last_sampled_one() -> None:
    last = torch.full((4, 1), -1)
    runner = SimpleNamespace(
        req_states=SimpleNamespace(last_sampled_tokens=last, req_id_to_index={"a": 2, "b": 0, "c": 1})
    )
    fed = RunnerV2(runner)
    fed.write([Feed("a", 3, (7,)), Feed("b", 5, (8,))])
    assert last[:, 0].tolist() == [8, -1, 7, -1]
    assert fed.longest_feed == 1


def test_the_runner_is_told_by_its_module() -> None:
    kinds = [("vllm.v1.worker.gpu_model_runner", RunnerV1), ("vllm.v1.worker.gpu.model_runner", RunnerV2)]
    for module, expected in kinds:
        base = type("GPUModelRunner", (), {"__module__": module})
        of_cpu = type("CPUModelRunner", (base,), {"__module__": "vllm.v1.worker.cpu_model_runner"})
        assert isinstance(runner_for(base()), expected)
        assert isinstance(runner_for(of_cpu()), expected)
    with pytest.raises(TypeError, match="no way is known to feed"):
        runner_for(object())


# ---- which row belongs to which request


def processor() -> tuple[_Processor, Captured]:
    captured = Captured()
    kind = type("Processor", (_Processor,), {"captured": captured})
    return kind(None), captured


def params(name: str) -> Any:
    return SimpleNamespace(extra_args={SLOT: name})


def update(
    removed: tuple[int, ...] = (),
    added: tuple[tuple[int, str], ...] = (),
    moved: tuple[tuple[int, int, str], ...] = (),
) -> Any:
    return SimpleNamespace(
        removed=removed,
        added=[(row, params(name), [], []) for row, name in added],
        moved=[(a, b, SimpleNamespace(name=direction)) for a, b, direction in moved],
    )


def test_v1_rows_follow_what_the_batch_does() -> None:
    lp, captured = processor()
    logits = torch.arange(12.0).reshape(3, 4)
    lp.update_state(update(added=((0, "a"), (1, "b"), (2, "c"))))
    for_sampler = lp.apply(logits)
    assert captured.rows == {"a": 0, "b": 1, "c": 2} and captured.logits is logits
    assert for_sampler.shape == (3, 1) and torch.equal(logits, torch.arange(12.0).reshape(3, 4))
    lp.update_state(update(moved=((0, 2, "SWAP"),)))
    lp.apply(logits)
    assert captured.rows == {"c": 0, "b": 1, "a": 2}
    lp.update_state(update(removed=(0,), moved=((2, 0, "UNIDIRECTIONAL"),)))
    lp.apply(logits[:2])
    assert captured.rows == {"a": 0, "b": 1}
    lp.update_state(update(removed=(1,), added=((1, "d"),)))
    lp.update_state(None)
    lp.apply(logits[:2])
    assert captured.rows == {"a": 0, "d": 1}
    assert not lp.is_argmax_invariant()


def test_v2_rows_are_found_by_the_place_of_the_request() -> None:
    lp, captured = processor()
    assert lp.add_request(5, params("a")) and lp.add_request(2, params("b"))
    lp.apply_staged_writes()
    logits = torch.arange(8.0).reshape(2, 4)
    for_sampler = lp.apply(logits, SimpleNamespace(idx_mapping_np=np.array([2, 5])))
    assert captured.rows == {"b": 0, "a": 1}
    assert for_sampler is logits and captured.logits is not logits
    logits.zero_()  # the sampler goes on to change them
    assert captured.logits is not None and captured.logits[1, 3] == 7
    captured.clear()
    assert captured.logits is None and not captured.rows
