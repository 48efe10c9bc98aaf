"""Which transport serves this model on this release of vLLM? Decided at load, on the real engine.

Each transport is asked for what it may get wrong: a token appended on each side of the edge of a block, several at
once, forks from the end and from the middle of a request, the request that went on after the forks, and a context
that holds a token which vLLM had sampled itself and which was dropped: a block's hash made from that token would find
keys and values of another one. Rows are compared with those of requests that read no cache, tokens computed with what
they should be.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from genlm_backend.llm.service import Context, normalize
from genlm_backend.llm.vllm.core import Core
from genlm_backend.llm.vllm.engine import VirtualEngine
from genlm_backend.llm.vllm.transports import Fresh, Live, Resumable, Transport

TOLERANCE = 5e-4  # nats, over tokens with p > 1e-8, float32: rounding was seen to reach 6e-5 on SmolLM2-135M
HALF_PRECISION_TV = 0.15  # total variation, in 16 bits: gross errors only; what is counted is exact in any dtype
_logger = logging.getLogger(__name__)

TRANSPORTS: dict[str, Callable[[Core], Transport]] = {
    "live": Live,
    "resumable": Resumable,
    "fresh": Fresh,
    "uncached": lambda core: Fresh(core, reads_cache=False),
}
"""Fastest first."""


class Failed(Exception):
    """A transport does not compute what it should; the text says what."""


def choose_transport(engine: VirtualEngine, names: Sequence[str] = tuple(TRANSPORTS)) -> tuple[str, list[str]]:
    """Let an engine use the first transport that passes: its name, and why each before it did not.

    The last one is taken untested: it is what the others are compared with.

    Raises:
        Exception: Whatever vLLM raises for a plain request.
    """
    engine.remember_health()
    reasons = []
    for name in names[:-1]:
        try:
            engine.use(TRANSPORTS[name])
            check(engine)
        except Exception as error:  # whatever a release of vLLM does on this path, there is a slower one
            _logger.info("the transport %r does not serve", name, exc_info=True)
            reasons.append(f"{name}: {error if isinstance(error, Failed) else repr(error)}")
        else:
            engine.reset()
            return name, reasons
    engine.use(TRANSPORTS[names[-1]])
    engine.reset()
    return names[-1], reasons


def check(engine: VirtualEngine) -> None:
    """Raise `Failed` unless the engine's transport computes what uncached requests compute, and no more than it should.

    Raises:
        Failed: With the difference.
        Exception: Whatever vLLM raises.
    """
    core, keeps, can_fork = engine.core, engine.transport.keeps_sessions, engine.transport.can_fork
    block = core.block_size
    ids = _probe(core.n_ids, block + 5)
    if len(ids) + 2 > core.max_model_len - 1:
        raise Failed(f"contexts of {core.max_model_len} tokens are too short for a test across a block of {block}")
    trial = _Trial(engine)
    trial.ask("a prompt", [ids[: block - 2]])
    for end in range(block - 1, block + 3):
        trial.ask(f"the token at position {end - 1} (blocks of {block})", [ids[:end]], 1 if keeps else None)
    trial.ask("several tokens at once", [ids], len(ids) - block - 2 if keeps and can_fork else None)
    forks = [(*ids, (ids[0] + k) % core.n_ids) for k in range(1, 4)]
    trial.ask("forks of one request", forks, len(forks) if can_fork else None)
    other = (ids[block + 1] + 1) % core.n_ids
    trial.ask("a fork from the middle", [(*ids[: block + 1], other)], 1 if can_fork else None)
    trial.ask("requests that went on after a fork", [(*fork, 5 % core.n_ids) for fork in forks], 3 if keeps else None)

    # What vLLM samples itself would complete a block here; then a context has just that token in its place.
    edge, token = ids[1:block], ids[block]
    sampled = {0, int(trial.ask("a block less one token", [edge]).argmax())}
    trial.ask("the token after a dropped one", [(*edge, token)], 1 if keeps else None)
    trial.ask("the block after a dropped one", [(*edge, token, 7 % core.n_ids)], 1 if keeps else None)
    for dropped in sampled - {token}:
        engine.end_sessions()  # so that the prefix cache is read
        # Nobody has computed the dropped token after these: it and the last one are to be computed at least.
        trial.ask("a context with a token that was sampled and dropped", [(*edge, dropped, 9 % core.n_ids)], n_least=2)
    engine.end_sessions()
    trial.ask("a request that was ended and came back", [(*edge, token, 7 % core.n_ids, 9 % core.n_ids)])
    trial.compare()


class _Trial:
    """What was asked and what came; compared at the end, with one batch of uncached requests."""

    def __init__(self, engine: VirtualEngine) -> None:
        self._engine = engine
        self._asked: list[tuple[str, Context, torch.Tensor]] = []

    def ask(
        self, what: str, token_ids: Sequence[tuple[int, ...]], n_expected: int | None = None, n_least: int = 0
    ) -> torch.Tensor:
        """Rows of some contexts; `Failed` unless as many tokens were computed as expected, and at least so many."""
        contexts = [Context(None, ids) for ids in token_ids]
        n_before = self._engine.core.n_computed
        rows = self._engine.evaluate(contexts)
        n_computed = self._engine.core.n_computed - n_before
        if n_expected is not None and n_computed != n_expected:
            raise Failed(f"{what}: computed {n_computed} tokens instead of {n_expected}")
        if n_computed < n_least:
            raise Failed(f"{what}: computed {n_computed} tokens instead of {n_least} or more")
        self._asked += zip([what] * len(rows), contexts, rows.clone(), strict=True)
        return rows

    def compare(self) -> None:
        """Raise `Failed` for the first row that an uncached request does not give."""
        expected = self._engine.uncached([context for _, context, _ in self._asked])
        for (what, _, row), wanted in zip(self._asked, expected, strict=True):
            difference = _difference(row[None], wanted[None], self._engine.core.dtype)
            if difference is not None:
                raise Failed(f"{what}: differs from an uncached request by {difference}")


def _difference(rows: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> str | None:
    """What is wrong with rows of logits, in words; None if they agree as closely as the dtype lets them."""
    n_ids = rows.shape[1]
    found, wanted = (normalize(logits, n_ids).logprobs.double() for logits in (rows, expected))
    if dtype == torch.float32:
        relevant = (wanted > -18.4) | (found > -18.4)  # p > 1e-8
        nats = float((found - wanted).abs()[relevant].max())
        return None if nats <= TOLERANCE else f"{nats:.2g} nats"
    total_variation = float((found.exp() - wanted.exp()).abs().sum(-1).max()) / 2
    return None if total_variation <= HALF_PRECISION_TV else f"{total_variation:.2g} in total variation"


def _probe(n_ids: int, n_tokens: int) -> tuple[int, ...]:
    """Token ids without a pattern, the same at each load."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randint(min(3, n_ids - 1), n_ids, (n_tokens,), generator=generator).tolist())
