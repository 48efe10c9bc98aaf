"""Live requests on structures shaped as those of vLLM's V2 runner, which itself needs a GPU: no vLLM here."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from genlm_backend.llm.service import Context
from genlm_backend.llm.vllm import transports
from genlm_backend.llm.vllm.engine import VirtualEngine
from genlm_backend.llm.vllm.runners import RunnerV2
from genlm_backend.llm.vllm.self_test import choose_transport
from genlm_backend.llm.vllm.transports import Live
from tests.llm.vllm.fake_v2 import CoreOnV2


def make_engine() -> tuple[VirtualEngine, Any]:
    core: Any = CoreOnV2()
    engine = VirtualEngine(core, lambda: core)
    return engine, core


def test_live_requests_pass_the_self_test() -> None:
    engine, core = make_engine()
    assert choose_transport(engine, ("live", "uncached")) == ("live", [])
    assert isinstance(engine.transport, Live) and isinstance(engine.transport._runner, RunnerV2)
    assert engine.transport.longest_extension == 1 and engine.transport.can_fork
    assert core.n_free_blocks() == core.n_blocks


def feeds_nothing(core: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunnerV2, "write", lambda self, feeds: None)


def feeds_the_wrong_place(core: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    write = RunnerV2.write
    monkeypatch.setattr(
        RunnerV2, "write", lambda self, feeds: write(self, [f._replace(name=feeds[0].name) for f in feeds])
    )


def copies_nothing(core: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    core.copies = False


def takes_sampled(core: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transports.Live, "_drop_output", lambda self, *args: self._take_output(*args))


def takes_several(core: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """More tokens in one feed than the runner reads."""
    monkeypatch.setattr(RunnerV2, "longest_feed", None)


@pytest.mark.parametrize(
    ("sabotage", "reason"),
    [
        (feeds_nothing, "the token at position"),
        (feeds_the_wrong_place, "went on after a fork"),
        (copies_nothing, "differs from an uncached request"),
        (takes_sampled, ""),
        (takes_several, "several tokens at once: differs"),
    ],
)
def test_what_is_fed_and_copied_matters(
    monkeypatch: pytest.MonkeyPatch, sabotage: Callable[[Any, pytest.MonkeyPatch], None], reason: str
) -> None:
    engine, core = make_engine()
    sabotage(core, monkeypatch)
    name, reasons = choose_transport(engine, ("live", "uncached"))
    assert name == "uncached" and reason in reasons[0], reasons


def test_random_asks_on_few_slots_and_blocks() -> None:
    """Growing by one and by several, forks, steps back, more than there are slots; no block is lost."""
    engine, core = make_engine()
    engine.use(Live)
    rng = random.Random(0)
    known = [tuple(rng.randrange(64) for _ in range(12))]
    for _ in range(30):
        asked = []
        for _ in range(rng.choice((1, 3, 12))):
            ids = rng.choice(known[-12:])
            ids = ids[: rng.randrange(max(1, len(ids) - 6), len(ids) + 1)][:50]
            asked.append(Context(None, (*ids, *(rng.randrange(64) for _ in range(rng.choice((1, 1, 3)))))))
        asked = list(dict.fromkeys(asked))
        rows = engine.evaluate(asked).clone()
        assert torch.equal(rows, engine.uncached(asked))
        known += [context.token_ids for context in asked]
    tally = engine.tally
    assert min(tally.extended, tally.forked, tally.opened, tally.evicted) > 0, tally
    engine.end_sessions()
    core.step()
    assert core.n_free_blocks() == core.n_blocks


def test_tokens_of_a_wave_that_could_not_be_given_are_not_fed_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = make_engine()
    engine.use(Live)
    engine.remember_health()
    held = Context(None, (1, 2, 3))
    engine.evaluate([held])

    def fails(*args: Any) -> None:
        raise MemoryError("no room for a request")

    monkeypatch.setattr(engine.transport, "open", fails)
    with pytest.raises(MemoryError):
        engine.evaluate([Context(None, (*held.token_ids, 4)), Context(None, (9, 9))])  # the first one is an extension
    monkeypatch.undo()
    innocent = [Context(None, (7, 8))]
    assert torch.equal(engine.evaluate(innocent), engine.uncached(innocent))
    assert engine.tally.restarted == 0
