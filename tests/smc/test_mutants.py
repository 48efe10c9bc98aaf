"""Planted mistakes, each caught by the checks of `test_exact`: the suite can fail.

Each mutant replaces one function of the package for the length of one check, which then has to find it.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from genlm_backend import sampling
from genlm_backend.potentials import Product
from genlm_backend.smc import (
    AWRS,
    Direct,
    TopK,
    awrs,
    context,
    engine,
    enumerate_exactly,
    particle_gibbs,
    program,
    proposals,
    regenerate,
    resampling,
    sequences,
    smc,
    strands,
)
from genlm_backend.smc.proposals import Proposed
from genlm_backend.smc.resampling import Resampled
from genlm_backend.smc.weights import log_mean_exp
from tests.smc.oracle import (
    LIKELIHOOD,
    ROW,
    Z_LIMIT,
    NoRepeat,
    Table,
    Weigh,
    chain,
    law_distance,
    law_distance_bound,
    sequence_law,
    worst_z,
)

pytestmark = pytest.mark.thorough

MODEL, RULE = Table(), NoRepeat()
ALWAYS = {"ess_threshold": 1.0, "on_failure": "mark"}
COPIES = {**ALWAYS, "resampling": "multinomial"}  # many copies


async def chain_check(options=ALWAYS, model=None, n_runs=80) -> bool:
    """Whether the check of `test_programs` finds something."""
    exact = await enumerate_exactly(chain(3))
    return not await worst_z(lambda seed: smc(model or chain(3), 4, seed=seed, **options), exact, n_runs) < Z_LIMIT


async def sequence_check(proposal, critic=None, n_runs=80) -> bool:
    target = proposal.potential if critic is None else Product(proposal.potential, critic)
    exact = await sequence_law(target, 3, 3)
    model = sequences(proposal, critic=critic, max_tokens=3)
    return not await worst_z(lambda seed: smc(model, 4, seed=seed, **ALWAYS), exact, n_runs) < Z_LIMIT


async def test_no_mutant_no_alarm():
    assert not await chain_check()
    assert not await sequence_check(AWRS(MODEL, RULE), Weigh())


async def test_a_dropped_incremental_weight(monkeypatch):
    weigh = context.Context._weigh
    monkeypatch.setattr(
        context.Context, "_weigh", lambda self, w, what: weigh(self, 0.0 if self.step == 1 else w, what)
    )
    exact_check = chain_check  # the oracle enumerates in one go, at step 0 of the same function
    monkeypatch.setattr("tests.smc.test_mutants.enumerate_exactly", _exact_of_chain)
    assert await exact_check()


async def _exact_of_chain(model):
    """The law of chain(3) as the unchanged package has it."""
    return CHAIN_LAW[0]


CHAIN_LAW: list = []


@pytest.fixture(autouse=True)
async def chain_law():
    if not CHAIN_LAW:
        CHAIN_LAW.append(await enumerate_exactly(chain(3)))


async def test_weights_not_reset_after_resampling(monkeypatch):
    def kept(rng, log_weights, n, scheme):
        drawn = resampling.resample(rng, log_weights, n, scheme)
        return Resampled(drawn.ancestors, np.array(log_weights)[drawn.ancestors])

    monkeypatch.setattr(engine, "resample", kept)
    assert await chain_check()


async def test_weights_reset_to_one_so_that_evidence_is_lost(monkeypatch):
    def lost(rng, log_weights, n, scheme):
        return Resampled(resampling.resample(rng, log_weights, n, scheme).ancestors, np.zeros(n))

    monkeypatch.setattr(engine, "resample", lost)
    assert await chain_check()


async def test_a_wrong_ancestor(monkeypatch):
    def shifted(rng, log_weights, n, scheme):
        drawn = resampling.resample(rng, log_weights, n, scheme)
        return Resampled((drawn.ancestors + 1) % n, drawn.log_weights)

    monkeypatch.setattr(engine, "resample", shifted)
    assert await chain_check()


async def test_resampling_that_ignores_the_weights(monkeypatch):
    def uniform(rng, log_weights, n, scheme):
        return Resampled(np.arange(n), np.full(n, log_mean_exp(log_weights)))

    monkeypatch.setattr(engine, "resample", uniform)
    assert await chain_check()


async def test_a_copy_that_weighs_its_past_again(monkeypatch):
    copy = context.Context.copy

    def weighing(self, n_entries, *, at_end):
        other = copy(self, n_entries, at_end=at_end)
        other.n_replayed = 0
        return other

    monkeypatch.setattr(context.Context, "copy", weighing)
    assert await chain_check(COPIES, n_runs=250)


async def test_a_copy_of_an_older_state(monkeypatch):
    entries = strands.Live._entries
    fork = strands.Live.fork

    def stale(self):
        whole = entries(self)
        older = strands.end_of_step(whole, max(0, len(self.log_increments) - 1))
        self_entries, strands.Live._entries = strands.Live._entries, lambda self: whole[:older]
        try:
            return fork(self)
        finally:
            strands.Live._entries = self_entries

    monkeypatch.setattr(strands.Live, "fork", stale)
    assert await chain_check(COPIES, n_runs=250)


async def test_randomness_used_again_at_the_next_step(monkeypatch):
    monkeypatch.setattr(
        context.Context,
        "_new_key",
        lambda self: sampling.draw_key(self.seed, (self.particle,), 0, "1"),
    )
    assert await chain_check(n_runs=300)


async def test_a_twist_that_is_not_taken_back(monkeypatch):
    monkeypatch.setattr(context.Context, "take_twist_back", lambda self: None)
    monkeypatch.setattr("tests.smc.test_mutants.enumerate_exactly", _exact_of_chain)
    assert await chain_check(model=chain(3, guess=True))


async def test_lost_mass_of_the_end(monkeypatch):
    class NoEnd(Table):
        def row(self, state):
            row = super().row(state)
            row[-1] -= 0.7
            return row

    proposal = Direct(Product(NoEnd(), RULE))
    exact = await sequence_law(Product(MODEL, RULE), 3, 3)
    z = await worst_z(lambda seed: smc(sequences(proposal, max_tokens=3), 4, seed=seed, **ALWAYS), exact, 80)
    assert z > Z_LIMIT


async def test_a_proposal_whose_mass_is_forgotten(monkeypatch):
    drawn = proposals._drawn
    monkeypatch.setattr(proposals, "_drawn", lambda *args: Proposed(drawn(*args).value, 0.0))
    assert await sequence_check(Direct(Product(MODEL, RULE)))


async def test_temperature_or_proposal_not_normalised(monkeypatch):
    from_row = context._from_row

    def unnormalised(row, mask, proposal, key):
        drawn = from_row(row, mask, proposal, key)
        return drawn if proposal is None else Proposed(drawn.value, drawn.log_weight - float(proposal.logsumexp(0)))

    @program
    async def proposed(ctx):
        symbol = await ctx.sample(ROW, proposal=torch.tensor([0.0, 0.7, 1.0]))
        ctx.score(math.log(LIKELIHOOD[symbol]))
        return (symbol,)

    exact = await enumerate_exactly(proposed())
    monkeypatch.setattr(context, "_from_row", unnormalised)
    assert await worst_z(lambda seed: smc(proposed(), 4, seed=seed), exact, 100) > Z_LIMIT


async def test_top_k_that_forgets_what_lies_outside(monkeypatch):
    monkeypatch.setattr(proposals, "_uniform", lambda key: 0.0)
    assert await sequence_check(TopK(MODEL, RULE, 2))


async def test_rejection_that_takes_the_first_accepted_for_the_mass(monkeypatch):
    monkeypatch.setattr(awrs, "log_expected_estimate", lambda mass, rates: 0.0)
    assert await sequence_check(AWRS(MODEL, RULE))


async def test_rejection_without_the_expectation_over_times(monkeypatch):
    monkeypatch.setattr(awrs, "log_expected_estimate", lambda mass, rates: math.log(rates[-1]))
    assert await sequence_check(AWRS(MODEL, RULE))


async def test_prefix_and_complete_of_a_critic_swapped():
    class Swapped(Weigh):
        async def complete(self, state):
            return 3 * await Weigh.prefix(self, state)

    exact = await sequence_law(Product(MODEL, RULE, Weigh()), 3, 3)
    model = sequences(Direct(Product(MODEL, RULE)), critic=Swapped(), max_tokens=3)
    assert await worst_z(lambda seed: smc(model, 4, seed=seed, **ALWAYS), exact, 80) > Z_LIMIT


async def test_optimal_resampling_that_leaves_light_weights_as_they_are(monkeypatch):
    def light(rng, log_weights, n, scheme):
        drawn = resampling.resample(rng, log_weights, n, scheme)
        return Resampled(drawn.ancestors, np.array(log_weights)[drawn.ancestors])

    monkeypatch.setattr(engine, "resample", light)
    assert await chain_check({"method": "steer", "n_branches": 2})


async def test_branches_that_do_not_share_their_weight(monkeypatch):
    monkeypatch.setattr(engine, "math", _NoLog())
    assert await chain_check({"method": "steer", "n_branches": 2})


class _NoLog:
    inf = math.inf

    @staticmethod
    def log(x):
        return math.log(x) if x == 4 else 0.0


async def test_moves_that_are_always_accepted():
    async def always(move):
        n = len(move.path.choices)
        candidate = await move.candidate(int(move.uniform() * n))
        return candidate if candidate.log_weight > -math.inf else None

    assert await chain_check({**ALWAYS, "kernel": always}, n_runs=100)
    assert not await chain_check({**ALWAYS, "kernel": regenerate}, n_runs=100)


async def test_a_retained_particle_that_does_not_survive(monkeypatch):
    def forgetful(rng, log_weights, n):
        return np.concatenate([[0], resampling.multinomial(rng, np.zeros(n), n - 1)])

    monkeypatch.setattr(engine, "conditional_multinomial", forgetful)
    exact = await enumerate_exactly(chain(2))
    after = []
    first = await smc(chain(2), 200, seed=0)
    for i in range(400):
        visited = await particle_gibbs(chain(2), 3, 3, seed=i, initial=first.paths[i % 200], ess_threshold=1.0)
        after.append(visited.values[-1])
    assert law_distance(after, exact) > law_distance_bound(len(exact.posterior), 400)
