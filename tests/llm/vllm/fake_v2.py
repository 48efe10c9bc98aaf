"""What the `Live` transport uses of vLLM with its V2 runner, in plain Python: scheduler, blocks, request states.

Keys and values are the tokens themselves, in blocks, and a row is noise made from what a request reads through its
blocks: a token that was not fed, a block that was shared or not copied makes another row. As in `vllm.v1.worker.gpu`,
the input of a request whose prompt is computed is its entry in `last_sampled_tokens`, which each step overwrites.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from genlm_backend.llm.mock import MockEngine
from genlm_backend.llm.service import Context
from genlm_backend.llm.vllm.capture import Captured
from genlm_backend.llm.vllm.core import Step

N_IDS = 64


class Request:
    """`vllm.v1.request.Request`."""

    prefill_stats: Any = object()

    def __init__(self, name: str, token_ids: Sequence[int], max_tokens: int) -> None:
        self.name = name
        self.token_ids = list(token_ids)
        self.n_prompt = len(self.token_ids)
        self.max_tokens = max_tokens
        self.num_computed_tokens = 0

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    def append_output_token_ids(self, token_ids: list[int]) -> None:
        self.token_ids += token_ids


class Block:
    def __init__(self) -> None:
        self.ref_cnt = 0
        self.kv: dict[int, int] = {}


class Pool:
    def __init__(self, n_blocks: int) -> None:
        self.blocks = [Block() for _ in range(n_blocks)]

    def touch(self, blocks: Sequence[Block]) -> None:
        for block in blocks:
            block.ref_cnt += 1

    def get_new_blocks(self, n: int) -> list[Block]:
        found = [block for block in self.blocks if not block.ref_cnt][:n]
        assert len(found) == n, "no block is free"
        for block in found:
            block.ref_cnt, block.kv = 1, {}
        return found

    def free(self, blocks: Sequence[Block]) -> None:
        for block in blocks:
            block.ref_cnt -= 1
            assert block.ref_cnt >= 0, "freed twice"


class FullAttentionManager:
    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.req_to_blocks: dict[str, list[Block]] = {}
        self.num_cached_block: dict[str, int] = {}
        self._pending_cow_copies: list[tuple[Block, Block]] = []


class Scheduler:
    def __init__(self, n_blocks: int, block_size: int) -> None:
        self.requests: dict[str, Request] = {}
        self.manager = FullAttentionManager(block_size)
        self.pool = Pool(n_blocks)
        self.kv_cache_manager = SimpleNamespace(
            coordinator=SimpleNamespace(single_type_managers=[self.manager]),
            block_pool=self.pool,
            get_computed_blocks=lambda request: (None, 0),
        )

    def _enqueue_waiting_request(self, request: Request) -> None:
        assert request.name not in self.requests

    def _update_request_with_output(self, request: Request, new_token_ids: list[int]) -> tuple[list[int], bool]:
        request.append_output_token_ids(new_token_ids)
        return new_token_ids, request.num_tokens - request.n_prompt >= request.max_tokens


class RequestStates:
    """`vllm.v1.worker.gpu.states.RequestState`: arrays with a place for each request."""

    def __init__(self, n_places: int) -> None:
        self.last_sampled_tokens = torch.full((n_places, 1), -1)
        self.req_id_to_index: dict[str, int] = {}
        self.prompts: dict[str, list[int]] = {}

    def add(self, request: Request) -> None:
        if request.name not in self.req_id_to_index:
            taken = set(self.req_id_to_index.values())
            place = next(i for i in reversed(range(len(self.last_sampled_tokens))) if i not in taken)
            self.req_id_to_index[request.name] = place
            self.prompts[request.name] = list(request.token_ids)


class GPUModelRunner:
    __module__ = "vllm.v1.worker.gpu.model_runner"  # by which it is known

    def __init__(self, n_places: int) -> None:
        self.req_states = RequestStates(n_places)
        self._noise = MockEngine(N_IDS)

    def execute(self, request: Request, blocks: Sequence[Block], block_size: int) -> torch.Tensor:
        """The row of a request; whatever it has not computed comes from its prompt or from the last sampled token."""
        states, name = self.req_states, request.name
        prompt, place = states.prompts[name], states.req_id_to_index[name]
        for position in range(request.num_computed_tokens, request.num_tokens):
            token = prompt[position] if position < len(prompt) else int(states.last_sampled_tokens[place, 0])
            blocks[position // block_size].kv[position % block_size] = token
        seen = tuple(blocks[i // block_size].kv.get(i % block_size, -1) for i in range(request.num_tokens))
        row = self._noise.evaluate([Context(None, seen)])[0]
        states.last_sampled_tokens[place, 0] = row.argmax()
        return row


class CoreOnV2:
    """What `VirtualEngine` and `Live` use of `Core`.

    Attributes:
        copies: Whether the worker copies blocks that were shared in part.
    """

    device = torch.device("cpu")
    dtype = torch.float32
    bytes_per_block = 64
    max_model_len = 64
    has_prefix_cache = False
    n_ids = N_IDS

    def __init__(self, max_num_seqs: int = 8, n_blocks: int = 60, block_size: int = 8) -> None:
        self.max_num_seqs, self.n_blocks, self.block_size = max_num_seqs, n_blocks, block_size
        self.captured = Captured()
        self.scheduler = Scheduler(n_blocks, block_size)
        self.runner = GPUModelRunner(max_num_seqs)
        self.n_steps = self.n_computed = 0
        self.copies = True

    def n_free_blocks(self) -> int:
        return sum(not block.ref_cnt for block in self.scheduler.pool.blocks)

    def make_request(
        self, name: str, token_ids: Sequence[int], adapter: str | None, *, max_tokens: int, **options: Any
    ) -> Request:
        return Request(name, token_ids, max_tokens)

    def add(self, request: Request) -> None:
        self.scheduler.requests[request.name] = request
        self.scheduler.manager.req_to_blocks[request.name] = []

    def finish(self, names: Sequence[str]) -> None:
        for name in names:
            self.scheduler.requests.pop(name)
            self.scheduler.pool.free(self.scheduler.manager.req_to_blocks.pop(name))
            self.scheduler.manager.num_cached_block.pop(name, None)
            states = self.runner.req_states
            states.req_id_to_index.pop(name, None)

    def step(self) -> Step:
        self.captured.clear()
        scheduler, manager = self.scheduler, self.scheduler.manager
        scheduled = [r for r in scheduler.requests.values() if r.num_tokens > r.num_computed_tokens]
        for request in scheduled:
            held = manager.req_to_blocks[request.name]
            held += scheduler.pool.get_new_blocks(-(-request.num_tokens // self.block_size) - len(held))
        for original, copy in manager._pending_cow_copies:
            if self.copies:
                copy.kv = dict(original.kv)
            scheduler.pool.free([original, copy])
        manager._pending_cow_copies = []
        n_scheduled, rows, ended = 0, {}, []
        for request in scheduled:
            self.runner.req_states.add(request)
            rows[request.name] = self.runner.execute(request, manager.req_to_blocks[request.name], self.block_size)
            n_scheduled += request.num_tokens - request.num_computed_tokens
            request.num_computed_tokens = request.num_tokens
            sampled = int(rows[request.name].argmax())
            new, is_over = scheduler._update_request_with_output(request, [sampled])
            ended += [(request.name, bool(new), is_over)]
        self.finish([name for name, _, is_over in ended if is_over])
        if rows:
            order = sorted(rows, reverse=True)  # not the order in which they were asked
            self.captured.logits = torch.stack([rows[name] for name in order])
            self.captured.rows = {name: i for i, name in enumerate(order)}
        self.n_steps += n_scheduled > 0
        self.n_computed += n_scheduled
        return Step(n_scheduled, frozenset(), frozenset(name for name, has_new, _ in ended if has_new))

    def forget(self) -> None:
        self.finish(list(self.scheduler.requests))
        self.step()

    def close(self) -> None:
        self.forget()
