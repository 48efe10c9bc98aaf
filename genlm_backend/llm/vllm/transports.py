"""Three ways to get the row of a context out of vLLM's engine; from the fastest to the one that every release serves.

    live       A request stays in the scheduler's running list. The token that vLLM samples is dropped, so the request
               waits there until it is fed the caller's token: one token computed, nothing looked up, nothing copied.
               A fork shares the full blocks of its source and gets a private copy of the partial one, through the
               copy-on-write that vLLM's scheduler does for partial prefix-cache hits.
    resumable  vLLM's own sessions (streaming input): a request stops after each token and keeps its blocks; adding
               tokens under its name drops the sampled token. A fork is a new request.
    fresh      A new request each time, on top of the prefix cache: up to one block is computed again.
    uncached   `fresh`, without reading the prefix cache.

`live` uses internals of vLLM, the others its request interface. `self_test.py` decides which one serves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import Any

from genlm_backend.llm.vllm.core import Core, Step
from genlm_backend.llm.vllm.runners import Feed, Runner, runner_for

_NEVER = 1 << 30  # tokens after which a live request would end


class Transport(ABC):
    """Turns sessions into requests of one core.

    Attributes:
        name: "live", "resumable", "fresh" or "uncached".
        keeps_sessions: Whether a request stays after its row was read.
        can_fork: Whether `fork` works; otherwise a fork is `open`.
        longest_extension: Most tokens that `extend` takes; None if there is no bound.
    """

    name: str
    keeps_sessions = True
    can_fork = False
    longest_extension: int | None = None

    def __init__(self, core: Core) -> None:
        self._core = core

    @abstractmethod
    def open(self, name: str, token_ids: Sequence[int], adapter: str | None) -> None:
        """Start a request for all these tokens; what the prefix cache holds of them is not computed."""

    def extend(self, name: str, n_before: int, token_ids: Sequence[int]) -> None:
        """Append tokens to a request that holds `n_before`."""
        raise NotImplementedError(self.name)

    def fork(self, source: str, n_shared: int, name: str, token_ids: Sequence[int], adapter: str | None) -> None:
        """Start a request for all these tokens, whose first `n_shared` are those of `source`."""
        raise NotImplementedError(self.name)

    def flush(self) -> None:
        """Called once before each step, after everything above."""

    def forget(self) -> None:
        """Drop what was to be given with the next step; its requests are ended."""

    def completed(self, names: Collection[str], step: Step) -> list[str]:
        """Which of these requests have the row of their last token now."""
        return [name for name in names if name in step.answered]

    def close(self) -> None:
        """Undo what this transport changed in the core; no request is left then."""


class Fresh(Transport):
    """One request for each row."""

    keeps_sessions = False

    def __init__(self, core: Core, *, reads_cache: bool = True) -> None:
        super().__init__(core)
        self.name = "fresh" if reads_cache else "uncached"
        self._reads_cache = reads_cache

    def open(self, name: str, token_ids: Sequence[int], adapter: str | None) -> None:
        """See `Transport`."""
        request = self._core.make_request(name, token_ids, adapter, max_tokens=1, reads_cache=self._reads_cache)
        self._core.add(request)


class Resumable(Transport):
    """vLLM's streaming input."""

    name = "resumable"

    def open(self, name: str, token_ids: Sequence[int], adapter: str | None) -> None:
        """See `Transport`."""
        self._core.add(self._core.make_request(name, token_ids, adapter, max_tokens=1, is_resumable=True))

    def extend(self, name: str, n_before: int, token_ids: Sequence[int]) -> None:
        """See `Transport`; vLLM drops the token it sampled itself."""
        self._core.add(self._core.make_request(name, token_ids, None, max_tokens=1, is_resumable=True))


class Live(Transport):
    """Requests that stay in the running list; see the top of this file.

    Raises:
        TypeError: This runner, or the way this model keeps keys and values, is not one of those known.
        AttributeError: This release of vLLM has moved what is used here.
    """

    name = "live"

    def __init__(self, core: Core, *, runner: Runner | None = None) -> None:
        super().__init__(core)
        self._scheduler = core.scheduler
        self._runner = runner or runner_for(core.runner)
        self.longest_extension = self._runner.longest_feed
        self.can_fork = _has_plain_blocks(self._scheduler)
        self._feeds: list[Feed] = []
        self._take_output = self._scheduler._update_request_with_output
        self._scheduler._update_request_with_output = self._drop_output

    def open(self, name: str, token_ids: Sequence[int], adapter: str | None) -> None:
        """See `Transport`."""
        self._core.add(self._core.make_request(name, token_ids, adapter, max_tokens=_NEVER))

    def extend(self, name: str, n_before: int, token_ids: Sequence[int]) -> None:
        """See `Transport`."""
        request = self._scheduler.requests[name]
        assert request.num_tokens == request.num_computed_tokens == n_before
        request.append_output_token_ids(list(token_ids))
        self._feeds.append(Feed(name, n_before, token_ids))

    def fork(self, source: str, n_shared: int, name: str, token_ids: Sequence[int], adapter: str | None) -> None:
        """See `Transport`. Takes one block from the pool at once, if `n_shared` is not a whole number of blocks."""
        request = self._core.make_request(name, token_ids, adapter, max_tokens=_NEVER)
        manager_of_all = self._scheduler.kv_cache_manager
        if len(token_ids) - n_shared > self._core.block_size:
            _, n_cached, *_ = manager_of_all.get_computed_blocks(request)
            if n_cached > n_shared:  # the prefix cache remembers more of it than any session holds
                self._core.add(request)
                return
        pool = manager_of_all.block_pool
        for manager in manager_of_all.coordinator.single_type_managers:
            n_full, n_partial = divmod(n_shared, manager.block_size)
            held = manager.req_to_blocks[source]
            blocks = list(held[:n_full])
            pool.touch(blocks)
            if n_partial:
                # Both ends stay referenced until the worker has copied; the scheduler lets go of them then.
                original, (copy,) = held[n_full], pool.get_new_blocks(1)
                pool.touch([original])
                copy.ref_cnt += 1
                manager._pending_cow_copies.append((original, copy))
                blocks.append(copy)
            manager.req_to_blocks[name] = blocks
            manager.num_cached_block[name] = min(n_full, manager.num_cached_block.get(source, 0))
        request.num_computed_tokens = n_shared
        request.prefill_stats = None  # counts of a prefill that does not happen
        self._scheduler._enqueue_waiting_request(request)
        self._scheduler.requests[name] = request

    def flush(self) -> None:
        """See `Transport`."""
        if self._feeds:
            feeds, self._feeds = self._feeds, []
            self._runner.write(feeds)

    def forget(self) -> None:
        """See `Transport`."""
        self._feeds = []

    def completed(self, names: Collection[str], step: Step) -> list[str]:
        """See `Transport`. A prompt that is computed in chunks has rows before its last token; they are passed over."""
        requests = self._scheduler.requests
        rows = self._core.captured.rows
        return [name for name in names if name in rows and _is_computed(requests[name])]

    def close(self) -> None:
        """See `Transport`; a second call does nothing."""
        self._scheduler.__dict__.pop("_update_request_with_output", None)

    def _drop_output(self, request: Any, new_token_ids: list[int], *args: Any, **kwargs: Any) -> Any:
        """In place of the scheduler's method: a live request does not take the token that vLLM sampled."""
        if request.max_tokens == _NEVER:
            return [], False
        return self._take_output(request, new_token_ids, *args, **kwargs)


def _is_computed(request: Any) -> bool:
    return bool(request.num_computed_tokens == request.num_tokens)


def _has_plain_blocks(scheduler: Any) -> bool:
    """Whether every layer keeps all its keys and values, in blocks that any position can be read from."""
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    return len(managers) == 1 and type(managers[0]).__name__ == "FullAttentionManager"
