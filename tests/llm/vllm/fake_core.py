"""A core of plain Python in place of vLLM's: slots, blocks, a token budget, preemption; rows are noise."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from genlm_backend.llm.mock import MockEngine
from genlm_backend.llm.service import Context
from genlm_backend.llm.vllm.capture import Captured
from genlm_backend.llm.vllm.core import Step
from genlm_backend.llm.vllm.engine import VirtualEngine
from genlm_backend.llm.vllm.transports import Transport

N_LOGITS = 16


class Request:
    def __init__(self, token_ids: Sequence[int], n_computed: int, is_kept: bool) -> None:
        self.token_ids = list(token_ids)
        self.n_computed = n_computed
        self.is_kept = is_kept
        self.is_placed = False


class FakeCore:
    """What `VirtualEngine` uses of `Core`.

    Attributes:
        fail_on: token id -> what a step raises that computes it.
        stalled_steps: So many steps schedule nothing.
        preempt_next: Names of requests that the next step preempts.
        most_requests: Requests that are ever held at once.
        n_forgotten: How often everything was forgotten.
    """

    device = torch.device("cpu")
    dtype = torch.float32
    bytes_per_block = 64
    max_model_len = 64
    has_prefix_cache = True

    def __init__(self, max_num_seqs: int = 8, n_blocks: int = 100, block_size: int = 4, budget: int = 1000) -> None:
        self.max_num_seqs, self.n_blocks, self.block_size, self.budget = max_num_seqs, n_blocks, block_size, budget
        self.n_ids = N_LOGITS
        self.captured = Captured()
        self.requests: dict[str, Request] = {}
        self.n_steps = self.n_computed = 0
        self.fail_on: dict[int, BaseException] = {}
        self.preempt_next: set[str] = set()
        self.stalled_steps = 0
        self.most_requests = self.n_forgotten = 0
        self.is_dead = self.is_closed = False
        self._noise = MockEngine(N_LOGITS)

    def row(self, token_ids: Sequence[int]) -> torch.Tensor:
        return self._noise.evaluate([Context(None, tuple(token_ids))])[0]

    def n_free_blocks(self) -> int:
        return self.n_blocks - sum(
            -(-len(request.token_ids) // self.block_size) for request in self.requests.values() if request.is_placed
        )

    def put(self, name: str, token_ids: Sequence[int], n_computed: int, is_kept: bool) -> None:
        assert name not in self.requests
        self.requests[name] = Request(token_ids, n_computed, is_kept)
        self.most_requests = max(self.most_requests, len(self.requests))

    def finish(self, names: Sequence[str]) -> None:
        for name in names:
            self.requests.pop(name, None)

    def step(self) -> Step:
        if self.is_dead:
            raise RuntimeError("the engine is dead")
        self.captured.clear()
        if self.stalled_steps:
            self.stalled_steps -= 1
            return Step(0, frozenset(), frozenset())
        preempted = frozenset(self.preempt_next & set(self.requests))
        for name in preempted:
            self.requests[name].n_computed, self.requests[name].is_placed = 0, False
        self.preempt_next = set()
        n_left, rows, answered = self.budget, {}, []
        for i, (name, request) in enumerate(list(self.requests.items())):
            n_new = min(len(request.token_ids) - request.n_computed, n_left)
            if not n_new or i >= self.max_num_seqs:
                continue
            if not request.is_placed:
                if -(-len(request.token_ids) // self.block_size) > self.n_free_blocks():
                    continue
                request.is_placed = True
            for token in request.token_ids[request.n_computed : request.n_computed + n_new]:
                if token in self.fail_on:
                    raise self.fail_on[token]
            request.n_computed += n_new
            n_left -= n_new
            rows[name] = self.row(request.token_ids[: request.n_computed])
            if request.n_computed == len(request.token_ids):
                answered.append(name)
        if rows:
            order = sorted(rows, reverse=True)  # not the order in which they were asked
            self.captured.logits = torch.stack([rows[name] for name in order])
            self.captured.rows = {name: i for i, name in enumerate(order)}
        n_scheduled = self.budget - n_left
        self.n_steps += n_scheduled > 0
        self.n_computed += n_scheduled
        for name in answered:
            if not self.requests[name].is_kept:
                del self.requests[name]
        return Step(n_scheduled, preempted, frozenset(answered))

    def forget(self) -> None:
        self.requests.clear()
        self.n_forgotten += 1
        self.step()

    def close(self) -> None:
        self.is_closed = True

    # what `Fresh` uses

    def make_request(self, name: str, token_ids: Sequence[int], adapter: str | None, **options: Any) -> Any:
        return name, token_ids

    def add(self, request: Any) -> None:
        self.put(*request, n_computed=0, is_kept=False)


class FakeLive(Transport):
    """Sessions and forks on a `FakeCore`; `longest` as in the runner V2."""

    name = "live"

    def __init__(self, core: Any, *, can_fork: bool = True, longest: int | None = None) -> None:
        super().__init__(core)
        self.can_fork = can_fork
        self.longest_extension = longest
        self.core: FakeCore = core

    def open(self, name: str, token_ids: Sequence[int], adapter: str | None) -> None:
        self.core.put(name, token_ids, 0, is_kept=True)

    def extend(self, name: str, n_before: int, token_ids: Sequence[int]) -> None:
        request = self.core.requests[name]
        assert len(request.token_ids) == request.n_computed == n_before
        assert self.longest_extension is None or len(token_ids) <= self.longest_extension
        request.token_ids += token_ids

    def fork(self, source: str, n_shared: int, name: str, token_ids: Sequence[int], adapter: str | None) -> None:
        held = self.core.requests[source]
        assert self.can_fork and held.n_computed >= n_shared
        assert list(token_ids[:n_shared]) == held.token_ids[:n_shared]
        self.core.put(name, token_ids, n_shared, is_kept=True)

    def completed(self, names: Collection[str], step: Step) -> list[str]:
        return [name for name in names if name in step.answered]


def make_engine(transport: Any = FakeLive, **sizes: int) -> tuple[VirtualEngine, list[FakeCore]]:
    """An engine on a fake core, and every core it ever made."""
    cores: list[FakeCore] = []

    def make_core() -> Any:
        cores.append(FakeCore(**sizes))
        return cores[-1]

    engine = VirtualEngine(make_core(), make_core, transport)
    engine.remember_health()
    engine.reset()
    cores[0].n_forgotten = 0
    return engine, cores
