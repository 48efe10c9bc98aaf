"""Remembered rows: bounded in bytes, least recently used first, against a plain list of blocks."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from genlm_backend.cache.row_memo import Block, RowMemo

N_VOCAB = 4
ROW_BYTES = 4 * N_VOCAB


def block(*values: float) -> Block:
    """One row per value, full of it; its log-normaliser is the value too."""
    return Block(torch.tensor(values, dtype=torch.float32)[:, None].expand(-1, N_VOCAB).contiguous(), list(values))


def value(known: Block | None) -> float | None:
    if known is None:
        return None
    assert known.logprobs.shape == (1, N_VOCAB) and (known.logprobs == known.log_normalizers[0]).all()
    return known.log_normalizers[0]


def test_a_row_is_found_by_its_key_without_a_copy() -> None:
    memo = RowMemo(10 * ROW_BYTES)
    rows = block(1, 2, 3)
    memo.put(["a", "c"], [0, 2], rows)
    found = memo.get("c")
    assert found is not None and value(found) == 3 and memo.get("b") is None
    assert found.logprobs.untyped_storage().data_ptr() == rows.logprobs.untyped_storage().data_ptr()
    assert len(memo) == 2 and memo.n_bytes == 3 * ROW_BYTES


def test_overwriting_a_key_at_capacity_forgets_nobody_elses_newer_row() -> None:
    memo = RowMemo(2 * ROW_BYTES)
    memo.put(["a"], [0], block(1))
    memo.put(["b"], [0], block(2))
    memo.put(["a"], [0], block(3))
    assert value(memo.get("a")) == 3 and value(memo.get("b")) == 2


def test_forgetting_an_old_block_keeps_the_newer_row_of_the_same_key() -> None:
    memo = RowMemo(2 * ROW_BYTES)
    memo.put(["a"], [0], block(1))
    memo.put(["a"], [0], block(2))
    memo.put(["b"], [0], block(3))
    assert value(memo.get("a")) == 2 and value(memo.get("b")) == 3


def test_a_block_larger_than_the_budget_is_kept_alone_until_the_next() -> None:
    memo = RowMemo(2 * ROW_BYTES)
    memo.put(["a"], [0], block(1))
    memo.put(["b", "c", "d"], [0, 1, 2], block(2, 3, 4))
    assert value(memo.get("c")) == 3 and len(memo) == 3 and memo.n_bytes == 3 * ROW_BYTES
    memo.put(["a"], [0], block(5))
    assert value(memo.get("a")) == 5 and len(memo) == 1 and memo.n_bytes == ROW_BYTES


def test_a_budget_of_nothing_keeps_nothing() -> None:
    memo = RowMemo(0)
    memo.put(["a"], [0], block(1))
    assert memo.get("a") is None and memo.n_bytes == 0


def test_clear_forgets_everything() -> None:
    memo = RowMemo(2 * ROW_BYTES)
    memo.put(["a"], [0], block(1))
    memo.clear()
    assert memo.get("a") is None and len(memo) == 0 and memo.n_bytes == 0


def test_rows_whose_computation_began_before_a_clear_are_not_kept() -> None:
    memo = RowMemo(2 * ROW_BYTES)
    began = memo.generation
    memo.clear()
    memo.put(["a"], [0], block(1), began)
    assert memo.get("a") is None and memo.n_bytes == 0
    memo.put(["a"], [0], block(2), memo.generation)
    assert value(memo.get("a")) == 2


def test_threads_share_it() -> None:
    memo = RowMemo(8 * ROW_BYTES)

    def work(thread: int) -> None:
        for i in range(300):
            memo.put([i % 13], [0], block(i % 13))
            assert value(memo.get((i + thread) % 13)) in (None, (i + thread) % 13)
            if i % 50 == 0:
                memo.clear()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert memo.n_bytes <= memo.budget_bytes


class AgainstAList(RuleBasedStateMachine):
    """The memo and a list of blocks, the least recently used first; each a dictionary from key to value."""

    make: Callable[[int], RowMemo] = RowMemo
    n_rows = 6

    def __init__(self) -> None:
        super().__init__()
        self.memo = type(self).make(self.n_rows * ROW_BYTES)
        self.blocks: list[tuple[int, dict[int, float]]] = []
        self.newest: dict[int, dict[int, float]] = {}
        self.clock = 0.0

    @rule(keys=st.lists(st.integers(0, 9), unique=True, max_size=8), n_nameless=st.integers(0, 2))
    def put(self, keys: list[int], n_nameless: int) -> None:
        """Nameless rows are those that were not finite."""
        values = []
        for _ in range(len(keys) + n_nameless):
            self.clock += 1
            values.append(self.clock)
        named = range(n_nameless, len(values))
        if values:
            self.memo.put(keys, list(named), block(*values))
        if not keys:
            return
        while self.blocks and sum(size for size, _ in self.blocks) + len(values) > self.n_rows:
            self.blocks.pop(0)
        entry = {key: values[row] for key, row in zip(keys, named, strict=True)}
        self.blocks.append((len(values), entry))
        self.newest |= dict.fromkeys(keys, entry)

    @rule(key=st.integers(0, 9))
    def get(self, key: int) -> None:
        owner = self.newest.get(key)
        held = [i for i, (_, entry) in enumerate(self.blocks) if entry is owner]
        expected = self.blocks[held[0]][1][key] if held else None
        if held:
            self.blocks.append(self.blocks.pop(held[0]))
        assert value(self.memo.get(key)) == expected

    @rule()
    def clear(self) -> None:
        self.memo.clear()
        self.blocks.clear()

    @invariant()
    def bounded_and_of_the_right_size(self) -> None:
        assert self.memo.n_bytes == sum(size for size, _ in self.blocks) * ROW_BYTES
        assert self.memo.n_bytes <= self.memo.budget_bytes or len(self.blocks) == 1
        held = [entry for _, entry in self.blocks]
        assert len(self.memo) == sum(any(entry is self.newest[key] for entry in held) for key in self.newest)


TestAgainstAList = AgainstAList.TestCase
TestAgainstAList.settings = settings(max_examples=30, stateful_step_count=25, deadline=None, derandomize=True)
UNSHRUNK = settings(
    max_examples=300, deadline=None, derandomize=True, report_multiple_bugs=False, phases=[Phase.generate]
)


class OldestWritten(RowMemo):
    """Forgets by age, not by use."""

    def get(self, key: Hashable) -> Block | None:
        order = list(self._blocks)
        known = super().get(key)
        for block_id in order:
            self._blocks.move_to_end(block_id)
        return known


class ForgetsTheInnocent(RowMemo):
    """Drops a key with its old block although a newer block has it."""

    def _forget_oldest(self) -> None:
        _, held = self._blocks.popitem(last=False)
        self.n_bytes -= held.n_bytes
        for key in held.keys:
            self._where.pop(key, None)


class OffByOneRow(RowMemo):
    def put(self, keys: Sequence[Hashable], rows: Sequence[int], block: Block) -> None:
        super().put(keys, list(range(len(keys))), block)


@pytest.mark.parametrize("mutant", [OldestWritten, ForgetsTheInnocent, OffByOneRow])
@pytest.mark.thorough
def test_the_machine_finds_a_wrong_memo(mutant: type[RowMemo]) -> None:
    class Machine(AgainstAList):
        make = mutant

    with pytest.raises((AssertionError, KeyError)):
        run_state_machine_as_test(Machine, settings=UNSHRUNK)
