"""Masks of several particles in one call, each particle's own result or error."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from genlm_backend.errors import InvalidQuery
from genlm_backend.llm.queries import Draw, check_query
from genlm_backend.packed_mask import PackedMask
from genlm_backend.potentials import LanguageModel, Product
from genlm_backend.smc import Direct, sequences, smc
from genlm_backend.smc.masks import Masks
from genlm_backend.testing import FakeEngine, fake_language_model
from tests.smc.oracle import NoRepeat


def allowed(mask: PackedMask) -> list[bool]:
    return mask.unpacked().tolist()


class Counted(NoRepeat):
    """Remembers the states of each call; refuses sequences that hold a 2."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[list[tuple[int, ...]]] = []

    def masks(self, states):
        self.calls.append(list(states))
        if any(2 in state for state in states):
            raise ValueError("there is a 2")
        return super().masks(states)


class NoZero(NoRepeat):
    def mask(self, state):
        return np.array([False, True, True, True])


async def test_what_is_asked_at_once_is_one_call_and_equal_states_are_one_mask():
    rule = Counted()
    masks = Masks([rule, NoZero()], [2])
    once, again, other = (0,), (1,), (0, 1)
    first, second, third = await asyncio.gather(*(masks.ask([s, s]) for s in (once, again, once)))
    assert rule.calls == [[once, again]]
    assert allowed(first) == [False, True, True]  # token 2 ends the text, which may end here
    assert allowed(second) == [False, False, True]
    assert first is third and not first.words.flags.writeable
    assert allowed(await masks.ask([other, other])) == [False, False, True]


async def test_end_tokens_are_allowed_only_where_the_text_may_end():
    assert allowed(await Masks([NoRepeat()], [1]).ask([()])) == [True, False, True]
    assert allowed(await Masks([NoRepeat()], []).ask([()])) == [True, True, True]


async def test_a_read_only_mask_is_not_copied_and_another_is():
    mask = np.array([True, False, True])
    mine = check_query(Draw(1, 1.0, mask), 3)
    mask[:] = False
    assert mine.mask.tolist() == [True, False, True]
    mask.flags.writeable = False
    assert check_query(Draw(1, 1.0, mask), 3).mask is mask


async def test_an_error_reaches_only_the_particle_that_causes_it():
    masks = Masks([Counted()], [])
    good, bad, fine = await asyncio.gather(*(masks.ask([s]) for s in ((0,), (2,), (1,))), return_exceptions=True)
    assert allowed(good) == [False, True, True] and allowed(fine) == [True, False, True]
    assert isinstance(bad, ValueError)


class Panic(BaseException):
    """As a library in Rust raises it."""


@pytest.mark.parametrize("raised", [StopIteration, asyncio.CancelledError, Panic])
async def test_whatever_is_raised_leaves_nobody_waiting(raised):
    class Raising(NoRepeat):
        def masks(self, states):
            if (2,) in states:
                raise raised("no")
            return super().masks(states)

    masks = Masks([Raising()], [])
    asked = asyncio.gather(*(masks.ask([s]) for s in ((0,), (2,), (1,))), return_exceptions=True)
    good, bad, fine = await asyncio.wait_for(asked, 5)
    assert allowed(good) == [False, True, True] and allowed(fine) == [True, False, True]
    assert isinstance(bad, RuntimeError) and raised.__name__ in str(bad)


async def test_a_constraints_own_table_is_not_written_to():
    class Table(NoRepeat):
        table = np.array([[True, True, True, False]] * 2)

        def masks(self, states):
            return self.table[: len(states)]

    rule = Table()
    masks = Masks([rule], [1])
    for _ in range(2):
        assert allowed(await masks.ask([(0,)])) == [True, False, True]
    assert rule.table.tolist() == [[True, True, True, False]] * 2
    assert rule.table.flags.writeable


@pytest.mark.parametrize(
    "table",
    [np.ones((1, 3), np.bool_), np.ones((1, 5), np.bool_), np.ones((2, 4), np.bool_), np.ones((1, 4), np.uint8)],
    ids=["no end", "too wide", "too many", "no bools"],
)
async def test_masks_of_the_wrong_shape_are_refused_by_name(table):
    class Wrong(NoRepeat):
        def masks(self, states):
            return table

    with pytest.raises(InvalidQuery, match=r"Wrong\.masks gave .* expected bool of shape \(1, 4\)"):
        await Masks([Wrong()], []).ask([()])


async def test_who_is_cancelled_is_not_asked_about():
    rule = Counted()
    masks = Masks([rule], [])
    gone, here = masks.ask([(2,)]), masks.ask([(0,)])
    gone.cancel()
    assert allowed(await here) == [False, True, True]
    assert rule.calls == [[(0,)]]
    masks.ask([(1,)]).cancel()
    await asyncio.sleep(0)
    assert len(rule.calls) == 1


def test_a_loop_that_was_interrupted_does_not_keep_the_next_one_waiting():
    masks = Masks([Counted()], [])

    async def ask():
        return await masks.ask([(0,)])

    loop = asyncio.new_event_loop()
    task = loop.create_task(ask())
    loop.call_soon(loop.stop)
    loop.run_forever()
    assert not task.done()
    assert allowed(asyncio.run(asyncio.wait_for(ask(), 5))) == [False, True, True]
    task.cancel()
    loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
    loop.close()


async def test_all_particles_of_a_step_are_one_call():
    rule = Counted()
    llm = fake_language_model(FakeEngine(3), n_vocab=3)
    with_rule = Direct(Product(LanguageModel(llm, [0], eos_token_ids=[2]), rule))
    result = await smc(sequences(with_rule, max_tokens=4), 8, seed=1)
    assert result.log_evidence < 0
    assert len(rule.calls) <= len(result.steps)
    assert len(rule.calls[0]) == 1  # all begin alike
    await llm.aclose()


@pytest.mark.parametrize("n_particles", [1, 7])
async def test_particles_do_not_depend_on_who_asks_with_them(n_particles):
    llm = fake_language_model(FakeEngine(3), n_vocab=3)
    potential = Product(LanguageModel(llm, [0], eos_token_ids=[2]), NoRepeat())
    alone = await smc(sequences(potential, max_tokens=4), n_particles, seed=3, ess_threshold=0)
    both = await asyncio.gather(
        smc(sequences(potential, max_tokens=4), n_particles, seed=3, ess_threshold=0),
        smc(sequences(potential, max_tokens=4), n_particles, seed=4, ess_threshold=0),
    )
    assert both[0].paths == alone.paths
    assert both[0].log_weights == alone.log_weights
    await llm.aclose()
