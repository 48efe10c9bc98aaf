"""Masks of several particles in one call, each particle's own result or error."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from genlm_backend.errors import ContextTooLong, InvalidQuery
from genlm_backend.llm.queries import Draw, MaskMass, check_query
from genlm_backend.packed_mask import LateMask, PackedMask
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


def test_an_error_without_words_reaches_who_asked():
    class Wordless(BaseException):
        def __str__(self):
            raise RuntimeError("no words")

    class Raising(Held):
        def masks(self, states):
            raise Wordless

    masks = Masks([Raising()], [])
    with pytest.raises(RuntimeError, match="Wordless"):
        masks.late([(0,)]).result(30)
    assert masks._is_idle.wait(30)


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


class Held(NoRepeat):
    """Any thread may ask it; it answers when the test lets it."""

    is_thread_safe = True

    def __init__(self, *, is_open: bool = True) -> None:
        super().__init__()
        self.calls: list[list[tuple[int, ...]]] = []
        self.threads: set[int] = set()
        self.gate = threading.Semaphore(1_000_000 if is_open else 0)

    def masks(self, states):
        self.calls.append(list(states))
        self.threads.add(threading.get_ident())
        assert self.gate.acquire(timeout=30)
        if any(2 in state for state in states):
            raise ValueError("there is a 2")
        return super().masks(states)


def of_late(late: LateMask) -> list[bool]:
    return allowed(late.result(30))


def test_late_masks_are_made_in_another_thread_and_what_comes_meanwhile_together():
    rule = Held(is_open=False)
    masks = Masks([rule], [2])
    first = masks.late([(0,)])
    time.sleep(0.01)
    assert not rule.calls, "nobody began"
    for _ in range(2):
        first.begin()
    while not rule.calls:
        time.sleep(0.001)
    once, again, other = (1,), tuple(range(1, 2)), (1, 0)
    later = [masks.late([state]) for state in (once, other, once, again)]
    later[3].begin()
    rule.gate.release(2)
    assert of_late(first) == [False, True, True]
    assert [of_late(late) for late in later] == [
        [True, False, True],
        [False, True, True],
        [True, False, True],
        [True, False, True],
    ]
    assert rule.calls == [[(0,)], [once, other, again]]
    assert later[0].result() is later[2].result()
    assert threading.get_ident() not in rule.threads
    rule.gate.release()
    assert of_late(masks.late([(0,)])) == [False, True, True]  # a thread that had nothing to do begins again


def test_without_another_thread_late_masks_are_made_by_who_begins(monkeypatch):
    def refuse(*_):
        raise RuntimeError("can't start new thread")

    rule = Held()
    late = Masks([rule], []).late([(0,)])
    monkeypatch.setattr("_thread.start_new_thread", refuse)
    late.begin()
    monkeypatch.undo()
    assert rule.threads == {threading.get_ident()} and of_late(late) == [False, True, True]


def test_only_constraints_for_any_thread_are_asked_late():
    assert Masks([Held(), Held()], []).can_be_late
    assert not Masks([Held(), NoRepeat()], []).can_be_late


@pytest.mark.parametrize("raised", [StopIteration, asyncio.CancelledError, Panic, SystemExit, KeyboardInterrupt])
def test_whatever_is_raised_in_the_thread_reaches_who_asked_and_the_thread_goes_on(raised):
    class Raising(Held):
        def masks(self, states):
            if (2,) in states:
                raise raised("no")
            return super().masks(states)

    masks = Masks([Raising()], [])
    with pytest.raises(RuntimeError, match=raised.__name__):
        of_late(masks.late([(2,)]))
    assert of_late(masks.late([(1,)])) == [True, False, True]


def test_masks_beside_one_that_ends_the_thread_are_answered():
    class Raising(Held):
        def masks(self, states):
            super().masks(states)
            if (0, 0) in states:
                raise SystemExit("no")
            return NoRepeat.masks(self, states)

    rule = Raising(is_open=False)
    masks = Masks([rule], [])
    late = [masks.late([(1,)])]
    late[0].begin()
    while not rule.calls:
        time.sleep(0.001)
    late += [masks.late([state]) for state in ((2,), (0, 0), (0,))]  # together, after the first
    rule.gate.release(100)
    assert of_late(late[0]) == [True, False, True]
    for one, error in zip(late[1:3], (ValueError, RuntimeError), strict=True):
        with pytest.raises(error):
            of_late(one)
    assert of_late(late[3]) == [False, True, True]


def test_the_interpreter_waits_for_masks_when_it_ends():
    program = """
import time
from genlm_backend.smc.masks import Masks
from tests.smc.oracle import NoRepeat

class Slow(NoRepeat):
    is_thread_safe = True
    def masks(self, states):
        time.sleep(0.5)
        print("made", flush=True)
        return super().masks(states)

Masks([Slow()], []).late([(0,)]).begin()
print("ends", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["ends", "made"]


def test_an_error_of_a_late_mask_reaches_only_the_particle_that_causes_it():
    rule = Held(is_open=False)
    masks = Masks([rule], [])
    late = [masks.late([state]) for state in ((0,), (2,), (1,))]
    rule.gate.release(100)
    assert of_late(late[0]) == [False, True, True] and of_late(late[2]) == [True, False, True]
    with pytest.raises(ValueError, match="there is a 2"):
        of_late(late[1])


async def test_the_model_computes_while_masks_are_made_and_who_draws_waits():
    rule, engine = Held(is_open=False), FakeEngine(3, is_open=False)
    llm = fake_language_model(engine, n_vocab=3)
    drawing = asyncio.create_task(
        Direct(Product(LanguageModel(llm, [0], eos_token_ids=[2]), rule)).propose(((), ()), 5)
    )
    assert await engine.entered() == [(0,)]  # before any mask is there
    while not rule.calls:
        await asyncio.sleep(0.001)
    assert rule.calls == [[()]]  # while the model computes
    engine.open()
    await asyncio.sleep(0.05)
    assert not drawing.done()
    rule.gate.release()
    late = await drawing
    plain = await Direct(Product(LanguageModel(llm, [0], eos_token_ids=[2]), NoRepeat())).propose(((), ()), 5)
    assert late == plain
    await llm.aclose()


async def test_particles_with_late_masks_are_those_with_masks_in_time():
    llm = fake_language_model(FakeEngine(3), n_vocab=3)
    runs = [
        await smc(sequences(Product(LanguageModel(llm, [0], eos_token_ids=[2]), rule), max_tokens=4), 9, seed=seed)
        for seed in range(5)
        for rule in (Held(), NoRepeat())
    ]
    for late, plain in zip(runs[::2], runs[1::2], strict=True):
        assert late.paths == plain.paths and late.log_weights == plain.log_weights
    await llm.aclose()


async def test_a_late_mask_for_a_remembered_row_does_not_block_the_loop():
    rule, engine = Held(is_open=False), FakeEngine(3)
    llm = fake_language_model(engine, n_vocab=3)
    await llm.next_token_logprobs([0])
    asked = asyncio.create_task(llm.query([0], Draw(1, 1.0, Masks([rule], []).late([(1,)]))))
    await asyncio.sleep(0.05)
    assert not asked.done()
    rule.gate.release()
    assert (await asked).token_id in (0, 2)
    assert len(engine.batches) == 1
    await llm.aclose()


async def test_who_asks_with_a_late_mask_that_fails_gets_its_error_and_others_their_answer():
    rule = Held()
    llm = fake_language_model(FakeEngine(3), n_vocab=3)
    masks = Masks([rule], [])
    good, bad, mass, row = await asyncio.gather(
        llm.query([0], Draw(1, 0.0, masks.late([(0, 1)]))),
        llm.query([0], Draw(1, 1.0, masks.late([(2,)]))),
        llm.query([0], MaskMass(masks.late([(0, 1)]))),
        llm.next_token_logprobs([0]),
        return_exceptions=True,
    )
    assert good.token_id == 2 * int(row[2] > row[0]) and isinstance(bad, ValueError)
    assert mass == pytest.approx(float(row[[0, 2]].logsumexp(0)), abs=1e-6)
    await llm.aclose()


async def test_a_late_mask_of_another_vocabulary_is_refused():
    with pytest.raises(InvalidQuery, match="packed mask is of 3 tokens; expected 4"):
        check_query(Draw(1, 1.0, Masks([Held()], []).late([()])), 4)


async def test_particles_die_where_a_late_mask_allows_nothing():
    class Nothing(Held):
        def mask(self, state):
            return np.zeros(4, np.bool_) if state else np.array([True, True, False, False])

    llm = fake_language_model(FakeEngine(3), n_vocab=3)
    potential = Product(LanguageModel(llm, [0], eos_token_ids=[2]), Nothing())
    result = await smc(sequences(potential, max_tokens=4), 5, seed=1, on_failure="mark")
    assert result.status == "failed" and {path.status for path in result.paths} == {"dead"}
    await llm.aclose()


async def test_nothing_to_draw_is_no_error_of_the_models():
    class Nothing(Held):
        def mask(self, state):
            return np.zeros(4, np.bool_)

    llm = fake_language_model(FakeEngine(3), n_vocab=3, max_length=2)
    proposals = [Direct(Product(LanguageModel(llm, [0], eos_token_ids=[2]), rule)) for rule in (Nothing(), Held())]
    assert (await proposals[0].propose(((1, 1), (1, 1)), 5)).log_weight == -np.inf
    with pytest.raises(ContextTooLong):
        await proposals[1].propose(((1, 0), (1, 0)), 5)
    await llm.aclose()


async def test_a_potential_that_is_drawn_from_once_starts_no_thread():
    rule = Held()
    llm = fake_language_model(FakeEngine(3), n_vocab=3)
    potential = Product(LanguageModel(llm, [0], eos_token_ids=[2]), rule)

    async def program(ctx):
        return await ctx.sample(potential, potential.start())

    await smc(program, 5, seed=1)
    assert rule.threads == {threading.get_ident()}
    rule.threads.clear()
    await smc(sequences(potential, max_tokens=2), 5, seed=1)
    assert threading.get_ident() not in rule.threads
    await llm.aclose()


async def test_a_run_that_is_cancelled_while_masks_are_made_leaves_the_next_one_alone():
    rule = Held(is_open=False)
    llm = fake_language_model(FakeEngine(3), n_vocab=3)
    program = sequences(Product(LanguageModel(llm, [0], eos_token_ids=[2]), rule), max_tokens=4)
    running = asyncio.create_task(smc(program, 5, seed=1))
    while not rule.calls:
        await asyncio.sleep(0.001)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    rule.gate.release(1000)
    assert (await asyncio.wait_for(smc(program, 5, seed=1), 30)).log_evidence < 0
    await llm.aclose()
