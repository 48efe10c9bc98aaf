"""Context: all that a program asks for. What it answers is recorded, so that a copy of the program can be run to the
same point without drawing, weighing or computing anything again.
"""

from __future__ import annotations

import asyncio
import math
import types
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any

import numpy as np
import torch

from genlm_backend import sampling
from genlm_backend.errors import InvalidProgram, NoTokenAllowed, ReplayMismatch
from genlm_backend.llm.base import AsyncLM
from genlm_backend.llm.queries import Draw, Drawn, Mask, Query, Row
from genlm_backend.packed_mask import PackedMask
from genlm_backend.potentials.base import Potential
from genlm_backend.smc.distributions import Distribution, Enumerable, LogRow, as_row
from genlm_backend.smc.lazy_row import LazyRow
from genlm_backend.smc.proposals import Direct, Proposal, Proposed, nothing_drawn
from genlm_backend.smc.recording import Recording
from genlm_backend.smc.trace import Entry

_MASS_TOLERANCE = 1e-3  # nats; a float32 row of 200,000 tokens is normalised to 1e-5


class Died(BaseException):
    """Leaves a program whose weight became zero; not an Exception, so that `except Exception` lets it through."""


class Checkpoint:
    """What a program yields to its engine where it may be resampled."""


CHECKPOINT = Checkpoint()
_AT_CHECKPOINT = Entry("checkpoint")

_ASKER: ContextVar[tuple[Context | None, object]] = ContextVar("_ASKER", default=(None, None))
"""Who a task is to the context that it has asked; not set where a program itself asks. Tasks inherit this."""


class Context:
    """What a program sees of the run.

    Attributes:
        particle: Where this particle stands in the population of this step; for messages, as copies stand elsewhere.
        step: How many checkpoints it has passed.
    """

    def __init__(self, seed: int, recording: Recording | None = None) -> None:
        self.particle = 0
        self.step = 0
        self.is_stepping = False  # inside Particle.step, which has its checkpoints between steps
        self.entries: list[Entry | None] = []
        self.n_replayed = 0  # these entries weigh nothing: their weights are in the particle's already
        self.position = 0
        self.log_increment = 0.0
        self.state: Any = None  # of a Particle: its copies begin here instead of running again
        # Beam search and enumeration: the rank of the value that each draw since `begin_step` takes; then the best one.
        self.ranks: tuple[int, ...] | None = None
        self.seed = seed
        self._key_step = 0
        self._recording = recording
        self._twist = 0.0
        self._n_keys = 0
        self._task: asyncio.Task[Any] | None = None  # runs the program; others in it are what the program gathers
        self._last_asker: object = None
        self.n_ranked = 0
        self._byte_vocab: Sequence[bytes] | None = None

    # ---- randomness

    async def sample(
        self,
        what: LogRow | Distribution | Potential | Proposal,
        state: Any = None,
        *,
        mask: Mask | None = None,
        proposal: LogRow | Distribution | None = None,
    ) -> Any:
        """A random value; the particle's weight is corrected for what it was drawn from.

        Args:
            what: A normalised row of log-probabilities, `(vocab,)` numpy or torch (the answer is an index), a
                `Distribution`, or a `Proposal` or `Potential` together with a state of its potential (the answer is a
                token id, or `potential.end`; the weight is the potential's).
            state: Of the potential.
            mask: For a row: `(vocab,)` bool; only these are drawn, and the weight is multiplied by their mass.
            proposal: Draw from this instead, and multiply the weight by p(x) / q(x); a row need not be normalised here.

        Raises:
            InvalidProgram: The row is not normalised, or the arguments do not fit together.
        """
        index, known = self._next("sample")
        if known is not None:
            return self._drawn_before(index, known)
        key = self._new_key()
        where = (self._key_step, self.particle, key)
        drawn = None if self._recording is None else self._recording.known_draw(where)
        drawn_by = what if isinstance(what, Proposal) else None
        if drawn_by is None and isinstance(what, Potential):
            drawn_by = Direct(what, is_kept=False)
        if drawn is None:
            if drawn_by is None:
                drawn = self._draw(what, mask, proposal, key)
            elif mask is not None or proposal is not None:
                raise InvalidProgram("ctx.sample of a potential got a mask or a proposal", "multiply the potentials")
            elif self.ranks is None:
                drawn = await drawn_by.propose(state, key)
            else:
                drawn = self._ranked(await drawn_by.target_row(state), None)
            if self._recording is not None:
                self._recording.keep_draw(where, drawn)
        piece = self._piece(what, drawn) if drawn_by is None else _piece_by(drawn_by, drawn)
        self._put(index, Entry("sample", drawn.value, drawn.log_weight, piece))
        self._weigh(drawn.log_weight, "a draw")
        return drawn.value

    async def next_token(
        self,
        llm: AsyncLM,
        token_ids: Sequence[int],
        *,
        mask: Mask | None = None,
        temperature: float = 1.0,
        lora_name: str | None = None,
    ) -> int:
        """A token after `token_ids`, drawn where the logits are: no row is copied, all particles are drawn together.

        The weight is multiplied by p(x) / q(x), q being the model kept to `mask` at `temperature`; with a mask and
        temperature 1 that is the mass of the mask. A mask without probability kills the particle.

        Raises:
            GenlmError: What the model raises.
        """
        index, known = self._next("sample")
        if known is not None:
            return int(self._drawn_before(index, known))
        self._byte_vocab = llm.byte_vocab
        key = self._new_key()
        if self.ranks is not None:
            row = await self._answer(llm, token_ids, Row(), lora_name)
            drawn = self._ranked(row, mask)
        else:
            try:
                token: Drawn = await self._answer(llm, token_ids, Draw(key, temperature, mask), lora_name)
            except NoTokenAllowed:
                drawn = Proposed(-1, -math.inf)
            else:
                drawn = Proposed(token.token_id, token.logprob - token.log_q)
        piece = bytes(llm.byte_vocab[drawn.value]) if drawn.value >= 0 else None
        self._put(index, Entry("sample", drawn.value, drawn.log_weight, piece))
        self._weigh(drawn.log_weight, "a draw")
        return int(drawn.value)

    def key(self) -> int:
        """A 64-bit key for a draw of the program's own: depends on seed, step, particle and how often it was asked."""
        index, known = self._next("key")
        if known is not None:
            return int(known.answer)
        key = self._new_key()
        self._put(index, Entry("key", key))
        return key

    # ---- weights

    def observe(self, what: LogRow | Distribution, value: Any) -> None:
        """Multiply the weight by the probability of a value.

        Args:
            what: A row of log-probabilities or a distribution.
            value: An index of the row, or a value of the distribution.

        Raises:
            InvalidProgram: `what` is neither.
        """
        if self.is_replaying:
            return
        if isinstance(what, (torch.Tensor, np.ndarray)):
            self._weigh(float(as_row(what)[value]), f"observing {value!r}")
        else:
            self._weigh(float(what.logprob(value)), f"observing {value!r}")

    def condition(self, truth: bool) -> None:
        """Keep the particle only if this is true; where it is not, its program ends here."""
        if not truth and not self.is_replaying:
            self._weigh(-math.inf, "a condition")

    def score(self, log_weight: float) -> None:
        """Multiply the weight by exp(log_weight); -inf ends the program here.

        Raises:
            NonFiniteWeight: From the run, naming step and particle, if it is NaN or +inf.
        """
        if not self.is_replaying:
            self._weigh(float(log_weight), "a score")

    def twist(self, log_weight: float) -> None:
        """A guess of the log of the weight still to come: used for resampling, replaced by the next guess, and taken
        back at the end, so that it steers the particles and changes no answer. -inf ends the program here.
        """
        change = float(log_weight) - self._twist
        self._twist = float(log_weight)
        if not self.is_replaying:
            self._weigh(change, "a twist")

    # ---- time

    def checkpoint(self) -> Awaitable[None]:
        """Wait here until all particles are at their checkpoint; this one may be resampled: copied, or ended.

        Raises:
            InvalidProgram: A draw or a question is still pending.
        """
        return _checkpoint(self)

    # ---- models

    async def logprobs(self, llm: AsyncLM, token_ids: Sequence[int], lora_name: str | None = None) -> torch.Tensor:
        """Log-probabilities of the next token, `(vocab,)` float32 nats.

        In a copy of a particle that runs up to its checkpoint, the row is asked for only when it is looked at.

        Raises:
            GenlmError: What the model raises.
        """
        self._byte_vocab = llm.byte_vocab
        index, known = self._next("row")
        if known is not None:
            ask = llm.next_token_logprobs_sync if self._recording is None else partial(self._recording.row_again, llm)
            return LazyRow.of(len(llm.byte_vocab), partial(ask, tuple(token_ids), lora_name))
        row: torch.Tensor = await self._answer(llm, token_ids, Row(), lora_name)
        self._put(index, Entry("row"))
        return row

    async def query(self, llm: AsyncLM, token_ids: Sequence[int], query: Query, lora_name: str | None = None) -> Any:
        """The answer to any query of `genlm_backend.llm.queries`; a draw's weight is up to the program.

        Raises:
            GenlmError: What the model raises.
        """
        if isinstance(query, Row):
            return await self.logprobs(llm, token_ids, lora_name)
        index, known = self._next("query")
        if known is not None:
            return known.answer
        answer = await self._answer(llm, token_ids, query, lora_name)
        self._put(index, Entry("query", answer))
        return answer

    async def recorded(self, function: Callable[[], Awaitable[Any]]) -> Any:
        """What awaiting `function()` gives, computed once: copies of the particle get the same answer.

        For what is costly or not the same twice: another model, a tool, a clock. The answer should be plain data if the
        result is to be saved.
        """
        index, known = self._next("recorded")
        if known is not None:
            return known.answer
        where = (self._key_step, self.particle, self._new_key())
        kept = None if self._recording is None else self._recording.known_draw(where)
        if kept is None:
            kept = Proposed(await function(), 0.0)
            if self._recording is not None:
                self._recording.keep_draw(where, kept)
        self._put(index, Entry("recorded", kept.value))
        return kept.value

    def show(self, text: str) -> None:
        """Show this as the text of the particle in pictures, instead of the tokens it has drawn."""
        index, known = self._next("show")
        if known is None:
            self._put(index, Entry("show", text))

    # ---- for the engine

    @property
    def is_replaying(self) -> bool:
        """Whether the program runs again to where it was: nothing is drawn and nothing weighs."""
        return self.position < self.n_replayed

    def begin_step(self, particle: int, step: int, ranks: tuple[int, ...] | None = None) -> None:
        """From here on, draws are those of this particle at this step."""
        self.particle, self._key_step, self.ranks = particle, step, ranks
        self.runs_here()
        if not self.is_replaying:
            self.step = step
        self.log_increment = 0.0
        self._n_keys = self.n_ranked = 0

    def runs_here(self) -> None:
        """The program goes on in the task that calls this."""
        self._task = asyncio.current_task()

    def finish(self) -> None:
        """End of the program: the twist is taken back; a beam's further copies of one without a draw are no others."""
        self.take_twist_back()
        self.end_step()

    def take_twist_back(self) -> None:
        """The guess of what is still to come is no longer needed."""
        self._weigh(-self._twist, "the end")
        self._twist = 0.0

    def end_step(self) -> None:
        """Check the step that ends here."""
        if self.ranks and any(self.ranks) and not self.n_ranked:
            raise Died
        if self.position < len(self.entries):
            raise ReplayMismatch(f"particle {self.particle}", "the end of its program", f"{len(self.entries)} entries")
        if None in self.entries[self._step_start() :]:
            raise InvalidProgram(
                "the program came to a checkpoint or its end while one of its draws or questions was pending",
                "await them all first",
            )

    def copy(self, n_entries: int, *, at_end: bool) -> Context:
        """A context with the same record, for a copy of the particle: at the record's end, or at its beginning."""
        other = Context(self.seed, self._recording)
        other.entries = self.entries[:n_entries]
        other.n_replayed = n_entries
        other._byte_vocab = self._byte_vocab
        if at_end:
            other.position, other._twist, other.state = n_entries, self._twist, self.state
        return other

    def _step_start(self) -> int:
        for i in range(len(self.entries) - 2, -1, -1):  # the last one may be the checkpoint of this step itself
            entry = self.entries[i]
            if entry is not None and entry.kind == "checkpoint":
                return i + 1
        return 0

    def _next(self, kind: str) -> tuple[int, Entry | None]:
        """The place of the next entry, and the entry where it is on record."""
        self._keep_order()
        index = self.position
        self.position += 1
        if index == len(self.entries):
            self.entries.append(None)
            return index, None
        entry = self.entries[index]
        if entry is None or entry.kind != kind:
            there = "nothing" if entry is None else f"a {entry.kind}"
            raise ReplayMismatch(f"entry {index} of particle {self.particle}", f"a {kind}", there)
        return index, entry

    def _keep_order(self) -> None:
        """See to it that questions come in an order that does not depend on who is answered first.

        What is gathered begins in the order in which it was gathered. After its first question a task may ask on only
        while nobody else has asked; a task that is made within it stands for it.

        Raises:
            InvalidProgram: Somebody has.
        """
        asker = None
        if _task_here() is not self._task:
            context, asker = _ASKER.get()
            if context is not self:
                asker = object()
                _ASKER.set((self, asker))
            elif asker is not self._last_asker:
                raise InvalidProgram(
                    "a coroutine that the program gathered, or made a task of, asked the context again, after another",
                    "ask once in each, or await them one after the other",
                )
        self._last_asker = asker

    def _put(self, index: int, entry: Entry) -> None:
        self.entries[index] = entry

    def _drawn_before(self, index: int, known: Entry) -> Any:
        if index >= self.n_replayed:
            self._weigh(known.log_weight, "a draw")
        return known.answer

    def _new_key(self) -> int:
        self._n_keys += 1
        return sampling.draw_key(self.seed, (self.particle,), self._key_step, str(self._n_keys))

    def _weigh(self, log_weight: float, what: str) -> None:
        if math.isnan(log_weight) or log_weight == math.inf:
            raise BadWeight(log_weight, what)
        self.log_increment += log_weight
        if log_weight == -math.inf:
            raise Died

    def _piece(self, what: object, drawn: Proposed) -> bytes | None:
        if isinstance(what, (torch.Tensor, np.ndarray)):
            vocab = self._byte_vocab
            if drawn.value < 0:
                return None
            return bytes(vocab[drawn.value]) if vocab and len(vocab) == len(what) else f"{drawn.value} ".encode()
        return None if drawn.value is None else f"{drawn.value} ".encode()

    async def _answer(self, llm: AsyncLM, token_ids: Sequence[int], query: Query, lora_name: str | None) -> Any:
        if self._recording is None:
            return await llm.query(token_ids, query, lora_name)
        return await self._recording.answer(llm, tuple(token_ids), query, lora_name)

    def _draw(self, what: object, mask: Mask | None, proposal: LogRow | Distribution | None, key: int) -> Proposed:
        if isinstance(what, (torch.Tensor, np.ndarray)):
            row = as_row(what)
            return _from_row(row, mask, proposal, key) if self.ranks is None else self._ranked(row, mask)
        if not isinstance(what, Distribution):
            raise InvalidProgram(f"ctx.sample got {what!r}", "give it a row, a distribution, a potential or a proposal")
        if self.ranks is None:
            return _from_distribution(what, proposal, key)
        if not isinstance(what, Enumerable):
            raise InvalidProgram(f"the values of {what!r} cannot be ranked", "draw from one that has `support()`")
        values = sorted(what.support(), key=lambda value: -what.logprob(value))
        rank = self._next_rank()
        return Proposed(values[rank], what.logprob(values[rank])) if rank < len(values) else Proposed(None, -math.inf)

    def _next_rank(self) -> int:
        assert self.ranks is not None
        self.n_ranked += 1
        return self.ranks[self.n_ranked - 1] if self.n_ranked <= len(self.ranks) else 0

    def _ranked(self, row: torch.Tensor, mask: Mask | None) -> Proposed:
        rank = self._next_rank()
        if mask is not None:
            allowed = mask.unpacked() if isinstance(mask, PackedMask) else mask
            row = row.masked_fill(~torch.as_tensor(allowed, device=row.device), -math.inf)
        if rank >= len(row):
            return Proposed(-1, -math.inf)
        symbols, _ = sampling.top_k(row[None], rank + 1)
        symbol = int(symbols[0, rank])
        return Proposed(symbol, float(row[symbol]))


class BadWeight(Exception):
    """A weight that is NaN or +inf, on its way to the engine, which knows step and particle."""


def _task_here() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:  # in a thread that the program awaits
        return None


@types.coroutine
def _checkpoint(context: Context) -> Generator[Any, None, None]:
    if context.is_stepping:
        raise InvalidProgram("a checkpoint within Particle.step", "return the next state: that is the checkpoint")
    index, known = context._next("checkpoint")
    if known is not None:
        context.step += 1
        return
    context._put(index, _AT_CHECKPOINT)
    yield CHECKPOINT


def _piece_by(drawn_by: Proposal, drawn: Proposed) -> bytes | None:
    return drawn_by.piece(drawn.value) if drawn.log_weight > -math.inf else None


def _from_row(row: torch.Tensor, mask: Mask | None, proposal: Any, key: int) -> Proposed:
    source = row if proposal is None else as_row(proposal)
    if len(source) != len(row):
        raise InvalidProgram(f"a proposal of {len(source)} tokens for a row of {len(row)}", "make them equally long")
    masks = None if mask is None else [mask]
    (index,) = sampling.draw(source[None], [key], None, masks).tolist()
    if index < 0:
        return nothing_drawn(source)
    if mask is None:
        log_mass = float(source.logsumexp(0))
    else:
        (log_mass,) = sampling.log_mass(source[None], masks).tolist()
    if proposal is not None:
        return Proposed(index, float(row[index]) - float(source[index]) + log_mass)
    if log_mass > _MASS_TOLERANCE or (mask is None and log_mass < -_MASS_TOLERANCE):
        raise InvalidProgram(
            f"ctx.sample got a row with a total probability of {math.exp(log_mass):.4g}",
            "normalise it (log_softmax), or say what is meant: mask=, or proposal= with the row of the model first",
        )
    return Proposed(index, 0.0 if mask is None else min(log_mass, 0.0))


def _from_distribution(target: Distribution, proposal: Any, key: int) -> Proposed:
    if proposal is None:
        return Proposed(target.draw(key), 0.0)
    if not isinstance(proposal, Distribution):
        raise InvalidProgram(f"a proposal {proposal!r} for {target!r}", "propose from a distribution")
    value = proposal.draw(key)
    return Proposed(value, float(target.logprob(value)) - float(proposal.logprob(value)))
