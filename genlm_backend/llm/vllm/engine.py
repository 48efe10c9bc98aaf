"""From contexts to rows: waves of requests, room for them, and what happens when vLLM fails or stands still.

One call of `evaluate` is a number of waves; a wave is a set of requests that are computed together, usually in one step
of vLLM. There is one wave where each context continues a session and all fit. There are more where contexts have new
tokens in common (these are computed first), are prefixes of one another, or are more than there are slots.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from genlm_backend.errors import EngineStalled
from genlm_backend.llm.service import Context, Engine, EngineCounts
from genlm_backend.llm.vllm.core import Core
from genlm_backend.llm.vllm.ledger import Ledger, Session
from genlm_backend.llm.vllm.plan import Target, next_wave
from genlm_backend.llm.vllm.transports import Fresh, Transport

MOST_IDLE_STEPS = 3  # steps in a row that schedule nothing before something is evicted; vLLM may skip one, not more
_logger = logging.getLogger(__name__)


class Tally(NamedTuple):
    """What the engine did besides computing; for tests and for `AsyncVirtualLM.sessions`.

    Attributes:
        extended: Requests continued.
        forked: Requests forked with copy-on-write.
        opened: New requests.
        evicted: Sessions ended for room.
        preempted: Requests whose blocks vLLM took.
        restarted: Times the core was made anew after a failure.
    """

    extended: int = 0
    forked: int = 0
    opened: int = 0
    evicted: int = 0
    preempted: int = 0
    restarted: int = 0


class VirtualEngine(Engine):
    """vLLM behind `Engine`.

    Args:
        core: A running core; the engine closes it.
        make_core: Makes another one, when this one is beyond repair.
        transport: Makes the transport for a core.
    """

    def __init__(
        self, core: Core, make_core: Callable[[], Core], transport: Callable[[Core], Transport] = Fresh
    ) -> None:
        self.core = core
        self.tally = Tally()
        self._make_core = make_core
        self._make_transport = transport
        self.transport = transport(core)
        self._ledger = Ledger()
        self._names = (f"genlm-{i}" for i in itertools.count())
        self._lock = threading.Lock()  # the core is used from the engine thread, and for the oracle
        self._n_evicted_tokens = 0
        self._counted = EngineCounts()
        self._is_to_forget = False
        self._is_dead = False  # another core is to be made, and was not yet
        self._healthy_row: torch.Tensor | None = None

    # ---- Engine

    def evaluate(self, contexts: Sequence[Context]) -> torch.Tensor:
        """See `Engine`.

        Raises:
            EngineStalled: vLLM schedules nothing although all other sessions are ended.
            Exception: Whatever the forward raises; all sessions are ended then, and the core made anew if need be.
        """
        with self._serving():
            if self._is_to_forget:
                self._forget()
            return self._sound(self._evaluate(contexts))

    def uncached(self, contexts: Sequence[Context]) -> torch.Tensor:
        """Rows of requests of their own that read no cache: the oracle. Shape and errors as in `evaluate`; any thread.

        vLLM names their blocks for the prefix cache, too, before they are computed: a failure leaves none of them.
        """
        with self._serving():
            return self._sound(self._uncached(contexts))

    def counts(self) -> EngineCounts:
        """See `Engine`."""
        core, before = self.core, self._counted
        n_held = 0 if self._is_to_forget else self._ledger.n_tokens
        n_blocks = -(-n_held // core.block_size)
        return EngineCounts(
            forwards=before.forwards + core.n_steps,
            tokens_computed=before.tokens_computed + core.n_computed,
            kv_tokens=n_held,
            kv_bytes=n_blocks * core.bytes_per_block if n_held else 0,
            evictions=self._n_evicted_tokens,
        )

    def clear_kv(self) -> None:
        """See `Engine`; takes effect before the next batch."""
        self._is_to_forget = True

    def reset(self) -> None:
        """See `Engine`."""
        with self._lock:
            self._forget()
            self.tally, self._n_evicted_tokens = Tally(), 0
            self._counted = EngineCounts()
            self.core.n_steps = self.core.n_computed = 0

    def close(self) -> None:
        """See `Engine`."""
        with self._lock:
            self._ledger.clear()
            if not self._is_dead:
                self.core.close()

    # ---- choosing a transport

    def use(self, transport: Callable[[Core], Transport]) -> None:
        """End all sessions and go on with another transport."""
        with self._lock:
            _prepare_thread(self.core.device)
            self._forget()
            self.transport.close()
            self._make_transport = transport
            self.transport = transport(self.core)

    def end_sessions(self) -> None:
        """End all sessions; what they computed stays in vLLM's prefix cache, in whole blocks."""
        with self._lock:
            names = self._ledger.names()
            self._ledger.clear()
            self.core.finish(names)

    def remember_health(self) -> None:
        """Keep one row that a repaired core must be able to compute again."""
        self._healthy_row = self.uncached([self._probe()])

    # ---- waves

    def _evaluate(self, contexts: Sequence[Context]) -> torch.Tensor:
        rows = _Rows()
        pending = list(contexts)
        while pending:
            if self.transport.keeps_sessions:
                wave = next_wave(self._ledger, pending)
            else:  # vLLM itself lets requests of one step share the blocks of a prompt
                wave = [Target(context, None, 0, is_extension=False) for context in pending]
            self._compute(self.transport, self._submit(self._admitted(wave)), rows)
            pending = [context for context in pending if context not in rows]
        return rows.in_order(contexts)

    def _admitted(self, wave: Sequence[Target]) -> list[Target]:
        """As many requests of a wave as there is room for, at least one; idle sessions are ended for them."""
        in_use = {target.source.name for target in wave if target.source is not None}
        admitted: list[Target] = []
        n_slots = len(self._ledger)
        n_taken = 0
        for target in wave:
            target = self._servable(target)
            n_blocks = target.n_blocks(self.core.block_size)
            is_new = not target.is_extension
            while n_slots + is_new > self.core.max_num_seqs or n_taken + n_blocks > self.core.n_free_blocks():
                victim = self._ledger.idlest(besides=in_use)
                if victim is None and not admitted:
                    victim = self._ledger.idlest(besides=() if target.source is None else (target.source.name,))
                if victim is None and not admitted and target.source is not None:
                    victim, target = target.source, _anew(target)  # it takes all the room there is
                    is_new, n_blocks = True, target.n_blocks(self.core.block_size)
                if victim is None:
                    break
                self._evict(victim)
                n_slots -= 1
            else:
                admitted.append(target)
                n_slots += is_new
                n_taken += n_blocks
                continue
            if admitted:
                break
            raise EngineStalled(len(target.context.token_ids), self._holds())
        return admitted

    def _servable(self, target: Target) -> Target:
        """The same target in the best way that this transport has, and that its source still allows."""
        if target.source is None or target.source.name not in self._ledger:
            return _anew(target)  # its source was ended for an earlier request of this wave
        if target.is_extension:
            longest = self.transport.longest_extension
            if longest is None or len(target.context.token_ids) - target.n_shared <= longest:
                return target
        return target._replace(is_extension=False) if self.transport.can_fork else _anew(target)

    def _compute(self, transport: Transport, waiting: dict[str, Target], rows: _Rows) -> None:
        """Step until each of these requests has its row."""
        n_idle = 0
        while waiting:
            transport.flush()
            step = self.core.step()
            if step.preempted:
                self._drop_preempted(step.preempted, waiting)
            captured = self.core.captured
            done = transport.completed(waiting, step)
            if done:
                assert captured.logits is not None
                contexts = [waiting.pop(name).context for name in done]
                rows.add(contexts, captured.logits, [captured.rows[name] for name in done])
            n_idle = 0 if step.n_scheduled or done else n_idle + 1
            if waiting and n_idle >= MOST_IDLE_STEPS:
                self._wake(waiting)
                n_idle = 0
        self.core.captured.clear()

    def _submit(self, wave: Sequence[Target]) -> dict[str, Target]:
        """Give a wave to the transport; its requests by name. Forks come before anything their sources compute."""
        waiting: dict[str, Target] = {}
        n_extended = n_forked = n_opened = 0
        for target in wave:
            adapter, ids = target.context
            source, n_shared = target.source, target.n_shared
            if target.is_extension:
                assert source is not None
                self.transport.extend(source.name, n_shared, ids[n_shared:])
                waiting[source.name] = target
                n_extended += 1
                continue
            name = next(self._names)
            waiting[name] = target
            if source is not None:
                self.transport.fork(source.name, n_shared, name, ids, adapter)
                n_forked += 1
            else:
                self.transport.open(name, ids, adapter)
                n_opened += 1
        self._count(extended=n_extended, forked=n_forked, opened=n_opened)
        self._hold(waiting)
        return waiting

    def _hold(self, waiting: dict[str, Target]) -> None:
        """Enter the requests of a wave into the ledger as what they are when it is done."""
        if not self.transport.keeps_sessions:
            return
        replaced = []
        for name, target in waiting.items():
            adapter, ids = target.context
            if target.is_extension:
                assert target.source is not None
                replaced.append(self._ledger.extend(target.source, ids))
            else:
                replaced.append(self._ledger.add(Session(name, adapter), ids))
        self.core.finish([session.name for session in replaced if session is not None])

    def _drop_preempted(self, preempted: frozenset[str], waiting: dict[str, Target]) -> None:
        """Preempted requests would be computed again by vLLM; those nobody waits for are ended instead."""
        self._count(preempted=len(preempted))
        idle = [self._ledger.get(name) for name in preempted if name not in waiting]
        for session in idle:
            if session is not None:
                self._evict(session)

    def _wake(self, waiting: dict[str, Target]) -> None:
        """Where vLLM stands still: end an idle session, so that its slot and blocks are free.

        Raises:
            EngineStalled: There is no idle session.
        """
        victim = self._ledger.idlest(besides=waiting)
        if victim is None:
            target = next(iter(waiting.values()))
            raise EngineStalled(len(target.context.token_ids), self._holds())
        _logger.warning("vLLM schedules nothing (%s): ending an idle request", self._holds())
        self._evict(victim)

    def _evict(self, session: Session) -> None:
        self._n_evicted_tokens += self._ledger.remove(session)
        self._count(evicted=1)
        self.core.finish([session.name])

    def _holds(self) -> str:
        core = self.core
        return (
            f"{len(self._ledger)} of {core.max_num_seqs} requests, "
            f"{core.n_blocks - core.n_free_blocks()} of {core.n_blocks} blocks of {core.block_size} tokens in use"
        )

    def _count(self, **more: int) -> None:
        self.tally = self.tally._replace(**{name: getattr(self.tally, name) + n for name, n in more.items()})

    # ---- failures

    @contextlib.contextmanager
    def _serving(self) -> Iterator[None]:
        """One call at a time, on a core that runs; whatever it raises leaves nothing half computed."""
        with self._lock, torch.inference_mode():
            if self._is_dead:
                self._restart()
            _prepare_thread(self.core.device)
            try:
                yield
            except EngineStalled:
                self._forget()
                raise
            except BaseException:
                self._repair()
                raise

    def _sound(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows; where one is not finite everything is forgotten, as the keys and values it left may be NaN."""
        first = rows[:, 0].isfinite()
        if not first.all() and not rows[~first].amax(-1).isfinite().all():
            self._forget()
        return rows

    def _forget(self) -> None:
        self._is_to_forget = False
        self._ledger.clear()
        self.transport.forget()
        self.core.forget()

    def _repair(self) -> None:
        """After a failed step: its requests are half computed, and so may be blocks that the prefix cache knows.

        Everything is ended and forgotten. If the core cannot do that, or does not compute the row it computed when it
        was loaded, another one is made.
        """
        try:
            self._forget()
            if self._healthy_row is not None:
                row = self._uncached([self._probe()])
                if not torch.allclose(row, self._healthy_row.to(row.device), atol=0.1):
                    raise RuntimeError("vLLM does not compute the row it computed when it was loaded")
        except Exception:
            _logger.warning("vLLM cannot go on after a failed step: making another engine", exc_info=True)
            self._restart()

    def _restart(self) -> None:
        """Make another core; where that fails, the next batch tries again."""
        if not self._is_dead:
            core, self._is_dead = self.core, True
            self._counted = self._counted._replace(
                forwards=self._counted.forwards + core.n_steps,
                tokens_computed=self._counted.tokens_computed + core.n_computed,
            )
            core.n_steps = core.n_computed = 0
            self._ledger.clear()
            core.close()
        self.core = self._make_core()
        self.transport = self._make_transport(self.core)
        self._is_dead = False
        self._count(restarted=1)

    def _probe(self) -> Context:
        return Context(None, tuple(i % self.core.n_ids for i in (1, 2, 3)))

    def _uncached(self, contexts: Sequence[Context]) -> torch.Tensor:
        oracle, rows = Fresh(self.core, reads_cache=False), _Rows()
        wave = [Target(context, None, 0, is_extension=False) for context in contexts]
        while wave:
            admitted = {next(self._names): target for target in self._admitted(wave)}
            for name, target in admitted.items():
                oracle.open(name, target.context.token_ids, target.context.adapter)
            wave = wave[len(admitted) :]
            self._compute(oracle, admitted, rows)
        return rows.in_order(contexts)


def _prepare_thread(device: torch.device) -> None:
    """Give this thread what vLLM set up in the one that loaded the model."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # torch sets a thread's number of OpenMP threads at its first operation in it. vLLM's attention plans with the
    # number before that, and then finds another one ("Check failed: thread_num == thread_num").
    torch.get_num_threads()


def _anew(target: Target) -> Target:
    return target._replace(source=None, n_shared=0, is_extension=False)


class _Rows:
    """Logits of contexts, in the tensors of the steps that computed them."""

    def __init__(self) -> None:
        self._blocks: list[torch.Tensor] = []
        self._places: dict[Context, int] = {}
        self._n = 0

    def __contains__(self, context: Context) -> bool:
        return context in self._places

    def add(self, contexts: Sequence[Context], logits: torch.Tensor, rows: Sequence[int]) -> None:
        for context, row in zip(contexts, rows, strict=True):
            self._places[context] = self._n + row
        self._blocks.append(logits)
        self._n += len(logits)

    def in_order(self, contexts: Sequence[Context]) -> torch.Tensor:
        """`(len(contexts), n_logits)`; not a copy where one step computed just these in this order."""
        places = [self._places[context] for context in contexts]
        block = self._blocks[0] if len(self._blocks) == 1 else torch.cat(self._blocks)
        return block if places == list(range(len(block))) else block[places]
