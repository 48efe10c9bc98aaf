"""Random programs on AsyncTransformer: ask, extend, branch, go back, cancel, clear; every row equals the plain one."""

from __future__ import annotations

import asyncio
import warnings
from typing import Any, ClassVar, NamedTuple

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from genlm_backend.errors import SlowPathWarning
from genlm_backend.llm import AsyncTransformer
from genlm_backend.llm.hf.self_test import difference
from tests import architectures, tiny_tokenizer
from tests.llm.hf.walks import TINY_NATS, check_books, plain_row, small

pytestmark = pytest.mark.thorough

TOKENIZER = tiny_tokenizer.build_tokenizer(architectures.VOCAB_SIZE)
PATHS = {"llama": "packed", "mistral": "packed", "gemma3_text": "packed", "bloom": "cached"}
KV_TOKENS = 20
MEMO_ROWS = 24
TOKENS = st.integers(3, 60)
# Which known context, how much of its end to drop, what to add.
MOVES = st.tuples(st.integers(0, 10**6), st.integers(0, 6), st.lists(TOKENS, max_size=3))
_plain_rows: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}


class Happened(NamedTuple):
    """What has to have happened for the comparison to mean anything."""

    row_hits: int = 0
    evictions: int = 0
    joint: int = 0
    cancelled: int = 0
    clears: int = 0
    asked: int = 0


class Program(RuleBasedStateMachine):
    """One model, one budget smaller than what the program uses."""

    name: ClassVar[str]
    llm: ClassVar[AsyncTransformer]
    happened: ClassVar[Happened]
    worst: ClassVar[float]

    @initialize(ids=st.lists(TOKENS, min_size=1, max_size=20))
    def begin(self, ids: list[int]) -> None:
        self.llm.clear_cache()
        self.before = self.llm.statistics()
        self.runner = asyncio.Runner()
        self.known = [tuple(ids)]
        self.n_sentinels = 0

    def teardown(self) -> None:
        if not hasattr(self, "runner"):
            return
        after = self.llm.statistics()
        self.count(
            row_hits=after.row_hits - self.before.row_hits, evictions=max(0, after.evictions - self.before.evictions)
        )
        self.runner.close()

    def moved(self, moves: list[tuple[int, int, list[int]]]) -> list[tuple[int, ...]]:
        asked = []
        for number, n_dropped, added in moves:
            start = self.known[number % len(self.known)]
            ids = (start[: max(1, len(start) - n_dropped)] + tuple(added))[:30]
            self.known.append(ids)
            asked.append(ids)
        return asked

    def count(self, **more: int) -> None:
        happened = type(self).happened
        type(self).happened = happened._replace(**{name: getattr(happened, name) + n for name, n in more.items()})

    def compare(self, ids: tuple[int, ...], row: torch.Tensor) -> None:
        want = _plain_rows.get((self.name, ids))
        if want is None:
            want = _plain_rows[self.name, ids] = plain_row(small(self.name), ids)
        apart = difference(row[None], want[None]).nats
        type(self).worst = max(type(self).worst, apart)
        assert apart <= TINY_NATS, ids

    @rule(moves=st.lists(MOVES, min_size=1, max_size=8))
    def ask_at_once(self, moves: list[tuple[int, int, list[int]]]) -> None:
        asked = self.moved(moves)
        before = self.llm.statistics()

        async def all_of_them() -> list[torch.Tensor]:
            return await asyncio.gather(*(self.llm.next_token_logprobs(ids) for ids in asked))

        rows = self.runner.run(all_of_them())
        after = self.llm.statistics()
        n_joint = after.requests - before.requests - (after.row_hits - before.row_hits)
        self.count(asked=len(asked), joint=int(n_joint > 1 and after.batches - before.batches == 1))
        for ids, row in zip(asked, rows, strict=True):
            self.compare(ids, row)
            row.fill_(torch.nan)  # the caller's own: nothing else may change

    @rule(moves=st.lists(MOVES, min_size=2, max_size=6), cancel=st.integers(1, 62), n_passes=st.integers(0, 12))
    def ask_and_cancel_some(self, moves: list[tuple[int, int, list[int]]], cancel: int, n_passes: int) -> None:
        asked = self.moved(moves)

        async def main() -> list[Any]:
            tasks = [asyncio.ensure_future(self.llm.next_token_logprobs(ids)) for ids in asked]
            for _ in range(n_passes):
                await asyncio.sleep(0)
            for i, task in enumerate(tasks):
                if cancel >> i & 1:
                    task.cancel()
            rows = await asyncio.gather(*tasks, return_exceptions=True)
            self.n_sentinels += 1
            await self.llm.next_token_logprobs([1, self.n_sentinels])  # when it is answered, what ran before has ended
            return rows

        outcomes = self.runner.run(main())
        for ids, outcome in zip(asked, outcomes, strict=True):
            if isinstance(outcome, asyncio.CancelledError):
                self.count(cancelled=1)
            else:
                self.compare(ids, outcome)

    @rule(moves=st.lists(MOVES, min_size=1, max_size=3))
    def ask_from_synchronous_code(self, moves: list[tuple[int, int, list[int]]]) -> None:
        for ids in self.moved(moves):
            self.compare(ids, self.llm.next_token_logprobs_sync(ids))

    @rule(number=st.integers(0, 10**6))
    def ask_again(self, number: int) -> None:
        ids = self.known[number % len(self.known)]
        self.compare(ids, self.runner.run(self.llm.next_token_logprobs(ids)))

    @rule(number=st.integers(0, 10**6), continuation=st.lists(TOKENS, max_size=4))
    def score_a_continuation(self, number: int, continuation: list[int]) -> None:
        prompt = self.known[number % len(self.known)]
        got = self.runner.run(self.llm.sequence_logprob(prompt, continuation))
        want = 0.0
        for i, token in enumerate(continuation):
            want += float(plain_row(small(self.name), [*prompt, *continuation[:i]])[token])
        assert abs(got - want) <= TINY_NATS * max(1, len(continuation))

    @rule(is_all=st.booleans())
    def clear(self, is_all: bool) -> None:
        if is_all:
            self.llm.clear_cache()
        else:
            self.llm.clear_kv_cache()
        self.count(clears=1)
        assert self.llm.statistics().kv_tokens == 0

    @invariant()
    def books_are_kept(self) -> None:
        engine: Any = self.llm._service.engine
        check_books(engine)
        assert engine.counts().kv_tokens <= KV_TOKENS


def play(name: str, n_programs: int, n_steps: int) -> tuple[Happened, float]:
    n_bytes = 4 * 2 * 64 * 4 if name == "bloom" else 4 * 2 * 2 * 16 * 4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SlowPathWarning)
        llm = AsyncTransformer(
            small(name),
            TOKENIZER,
            kv_cache_bytes=KV_TOKENS * n_bytes,
            row_memo_bytes=MEMO_ROWS * architectures.VOCAB_SIZE * 4,
        )
    assert llm.path == PATHS[name]
    engine: Any = llm._service.engine
    engine.step_tokens, engine.plan_tokens = 5, 12
    kind: Any = type(f"Program_{name}", (Program,), {"name": name, "llm": llm, "happened": Happened(), "worst": 0.0})
    chosen = settings(
        max_examples=n_programs,
        stateful_step_count=n_steps,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    try:
        run_state_machine_as_test(kind, settings=chosen)
    finally:
        llm.close()
    return kind.happened, kind.worst


@pytest.mark.parametrize("name", PATHS)
def test_every_row_of_random_programs_equals_the_plain_one(name: str) -> None:
    happened, worst = play(name, n_programs=16, n_steps=15)
    assert min(happened) > 0, happened
    assert worst <= TINY_NATS


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", PATHS)
def test_every_row_of_many_random_programs_equals_the_plain_one(name: str) -> None:
    happened, _ = play(name, n_programs=25, n_steps=50)
    assert min(happened) > 5, happened
