"""How a token chosen by the caller reaches vLLM's model runner: one small class for each of its two runners.

vLLM's runner takes the token it sampled itself as the next input of a running request. Both classes put the caller's
token in that place. These are internals of vLLM; the self-test at load decides whether they are as they are here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch


class Feed(NamedTuple):
    """Tokens that follow the `n_before` tokens a running request holds."""

    name: str
    n_before: int
    token_ids: Sequence[int]


class Runner(ABC):
    """The model runner's side of feeding.

    Attributes:
        longest_feed: Most tokens that one feed may have; None if there is no bound.
    """

    longest_feed: int | None = None

    def __init__(self, runner: Any) -> None:
        self._runner = runner

    @abstractmethod
    def write(self, feeds: Sequence[Feed]) -> None:
        """Make these tokens the next inputs of their requests."""


class RunnerV1(Runner):
    """The persistent batch of `vllm.v1.worker.gpu_model_runner`, also of CPU builds: token ids lie in host memory."""

    def write(self, feeds: Sequence[Feed]) -> None:
        """See `Runner`. A request that was not in the last step has no row; its own list of tokens is enough then."""
        batch, states = self._runner.input_batch, self._runner.requests
        for name, n_before, token_ids in feeds:
            state = states[name]
            output_ids = state.output_token_ids
            del output_ids[n_before - state.num_prompt_tokens :]  # what vLLM sampled
            output_ids.extend(token_ids)
            row = batch.req_id_to_index.get(name)
            if row is not None:
                end = n_before + len(token_ids)
                batch.token_ids_cpu[row, n_before:end] = token_ids
                batch.is_token_ids[row, n_before:end] = True
                batch.num_tokens_no_spec[row] = end


class RunnerV2(Runner):
    """`vllm.v1.worker.gpu`: the next input of a running request is its last sampled token, which lies on the device.

    Only that one token is read, so a longer extension is a fork of the request instead. Not run on a GPU yet.
    """

    longest_feed = 1

    def write(self, feeds: Sequence[Feed]) -> None:
        """See `Runner`; one copy to the device for all."""
        states = self._runner.req_states
        last = states.last_sampled_tokens
        places = torch.tensor([states.req_id_to_index[feed.name] for feed in feeds], device=last.device)
        tokens = torch.tensor([feed.token_ids[0] for feed in feeds], dtype=last.dtype, device=last.device)
        last[places, 0] = tokens


def runner_for(runner: Any) -> Runner:
    """The class that fits vLLM's runner, by what it keeps its requests in.

    Raises:
        TypeError: It is neither.
    """
    kinds = {name.__module__ for name in type(runner).__mro__}
    if "vllm.v1.worker.gpu.model_runner" in kinds:
        return RunnerV2(runner)
    if "vllm.v1.worker.gpu_model_runner" in kinds:
        return RunnerV1(runner)
    raise TypeError(f"no way is known to feed {type(runner).__module__}.{type(runner).__qualname__}")
