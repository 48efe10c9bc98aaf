"""The laws hold for potentials that keep them, and `check_potential` finds each way of breaking one."""

from __future__ import annotations

import itertools
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from genlm_backend.errors import GenlmError, InvalidPotential
from genlm_backend.potentials import Potential, Product, Tempered
from genlm_backend.testing import check_potential
from tests.potentials.tables import Listed, Table, log

N = 3
TEXTS = {(): 0.5, (0,): 1.5, (0, 1): 0.25, (1, 2): 3.0, (1, 2, 2): 1.0}
SEQUENCES = [(0, 1), (1, 2, 2), (2, 0), (1, 1, 1), ()]


def table() -> Table:
    return Table(TEXTS, N)


def listed() -> Listed:
    return Listed({(0,), (0, 1), (1, 2, 2), (1, 2, 0)}, N)


@pytest.mark.parametrize(
    "potential",
    [
        table(),
        listed(),
        Product(listed(), listed()),
        Tempered(table(), 0.5),
        Tempered(listed(), 2),
        Listed((), N),
    ],
    ids=["table", "listed", "product", "tempered", "tempered_constraint", "nothing"],
)
async def test_the_laws_hold(potential: Potential) -> None:
    await check_potential(potential, SEQUENCES)


async def test_the_product_of_a_weight_and_a_constraint_keeps_the_laws() -> None:
    """The prefix of a product is the product of prefixes: an upper bound of its texts, which its rows telescope to."""
    product = Product(table(), listed())
    await check_potential(product, SEQUENCES)
    for ids in itertools.chain.from_iterable(itertools.product(range(N), repeat=n) for n in range(4)):
        whole = log(TEXTS.get(ids, 0.0)) if ids in listed().texts else -math.inf
        assert await product.complete(product.state_of(ids)) == pytest.approx(whole, abs=1e-6)


async def test_a_product_does_not_ask_the_model_where_the_constraint_is_dead() -> None:
    class Untouchable(Table):
        async def logw_next(self, state: Any) -> torch.Tensor:
            raise AssertionError("asked")

        async def prefix(self, state: Any) -> float:
            raise AssertionError("asked")

    product = Product(Untouchable(TEXTS, N), listed())
    dead = product.state_of((2,))
    assert (await product.logw_next(dead)).isneginf().all()
    assert (await product.logw_tokens(dead, [0, N])).isneginf().all()
    assert await product.prefix(dead) == -math.inf


async def test_a_product_is_taken_apart_and_checked() -> None:
    parts = [table(), listed(), table()]
    assert Product(Product(parts[0], parts[1]), parts[2]).factors == parts
    with pytest.raises(InvalidPotential, match="two or more"):
        Product(table())
    with pytest.raises(InvalidPotential, match=r"\[3, 4\]"):
        Product(table(), Table({}, 4))
    for power in (0, -1, math.inf, math.nan):
        with pytest.raises(InvalidPotential, match="power"):
            Tempered(table(), power)


def test_the_errors_pickle() -> None:
    error: GenlmError = InvalidPotential("a", "b")
    assert str(pickle.loads(pickle.dumps(error))) == "got a; expected b"


async def test_no_states_give_no_rows() -> None:
    for potential in (table(), listed(), Product(table(), listed())):
        assert (await potential.batch_logw_next([])).shape == (0, N + 1)


def test_forced_tokens_have_no_alternative() -> None:
    constraint = Listed({(0, 1, 2, 0), (0, 1, 2, 1)}, N)
    assert constraint.forced(()) == (0, 1, 2)
    assert constraint.forced((0, 1, 2)) == ()
    assert constraint.forced((0, 1, 2, 0)) == (), "only the end is left, and it is no token"
    assert constraint.forced((2,)) == ()


def test_what_is_forced_without_end_is_told_in_part() -> None:
    class Endless(Listed):
        def is_alive(self, state: Any) -> bool:
            return not any(state)

    assert set(Endless((), N).forced(())) == {0}


class WrongNext(Table):
    async def logw_next(self, state: Any) -> torch.Tensor:
        return (await super().logw_next(state)) + 0.01


class WrongEnd(Table):
    async def logw_next(self, state: Any) -> torch.Tensor:
        row = await super().logw_next(state)
        row[self.end] = -math.inf
        return row


class Revives(Listed):
    def mask(self, state: Any) -> np.ndarray:
        return super().mask(state) if self.is_alive(state) else np.ones(self.n_tokens + 1, bool)


class OneState(Table):
    """Extends in place."""

    def start(self) -> Any:
        return []

    def extend(self, state: Any, token_id: int) -> Any:
        state.append(token_id)
        return state

    def mass(self, prefix: Any) -> float:
        return super().mass(tuple(prefix))

    async def complete(self, state: Any) -> float:
        return log(self.weights.get(tuple(state), 0.0))

    async def logw_next(self, state: Any) -> torch.Tensor:
        return await Table(self.weights, self.n_tokens).logw_next(tuple(state))


class WrongBatch(Table):
    async def batch_logw_next(self, states: Any) -> torch.Tensor:
        return (await super().batch_logw_next(states)).flip(0)


class WrongAllows(Listed):
    def allows(self, state: Any, symbol: int) -> bool:
        return symbol != 2 and super().allows(state, symbol)


class WrongForced(Listed):
    def forced(self, state: Any) -> tuple[int, ...]:
        return (0,) if self.is_alive(state) else ()


class WrongTokens(Table):
    async def logw_tokens(self, state: Any, symbols: Any) -> torch.Tensor:
        return (await super().logw_tokens(state, symbols)).flip(0)


@pytest.mark.parametrize(
    ("potential", "law"),
    [
        (WrongNext(TEXTS, N), "end"),
        (WrongEnd(TEXTS, N), "end"),
        (Revives({(0,), (1, 2)}, N), "dead"),
        (OneState(TEXTS, N), "next|outlives"),
        (WrongBatch(TEXTS, N), "batch equals single"),
        (WrongAllows({(1, 2)}, N), "allows|logw_tokens"),
        (WrongForced({(0,), (1, 2)}, N), "forced"),
        (WrongTokens(TEXTS, N), "logw_tokens"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Potential) else "",
)
async def test_a_broken_law_is_found(potential: Potential, law: str) -> None:
    with pytest.raises(AssertionError, match=law):
        await check_potential(potential, SEQUENCES)
