"""Every algorithm, resampling scheme and proposal against exact enumeration. Error rate: see `oracle`.

The quick tests make few runs; the slow ones of the same checks many.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from genlm_backend.potentials import Product, Tempered
from genlm_backend.smc import (
    AWRS,
    Bernoulli,
    Categorical,
    Direct,
    Geometric,
    Guided,
    TopK,
    after_bytes,
    after_tokens,
    enumerate_exactly,
    islands,
    particle_gibbs,
    program,
    regenerate,
    sequences,
    smc,
)
from genlm_backend.smc.resampling import SCHEMES
from genlm_backend.testing import FakeEngine, fake_language_model
from tests.smc.oracle import (
    AFTER,
    LIKELIHOOD,
    ROW,
    Z_LIMIT,
    ChainParticle,
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
FEW = 60
MANY = pytest.param(400, marks=[pytest.mark.slow, pytest.mark.timeout(900)], id="many")
RUNS = pytest.mark.parametrize("n_runs", [pytest.param(FEW, id="few"), MANY])


@program
async def chain_by_proposal(ctx):
    """The law of `chain(3)`, drawn from other rows."""
    symbols = []
    for _ in range(3):
        row = AFTER[symbols[-1]] if symbols else ROW
        symbols.append(await ctx.sample(row, proposal=torch.tensor([0.0, 0.7, 1.0])))
        ctx.observe(torch.tensor(LIKELIHOOD).log().numpy(), symbols[-1])
        if symbols[-2:] == [0, 0]:
            break
        await ctx.checkpoint()
    return tuple(symbols)


@program
async def mixed(ctx):
    """Distributions, masks, conditions and a draw without weight, with helper functions and two draws in a step."""
    coin = await ctx.sample(Bernoulli(0.4), proposal=Bernoulli(0.6))
    ctx.observe(Geometric(0.5 if coin else 0.2), 1)
    await ctx.checkpoint()
    letter = await ctx.sample(Categorical("ab", [1, 3]))
    symbol = await ctx.sample(ROW, mask=torch.tensor([True, coin, True]))
    await ctx.checkpoint()
    ctx.condition(not (coin and letter == "a"))
    return (int(coin), letter, symbol)


PROGRAMS = {
    "program": (chain(3), {"ess_threshold": 1.0}),
    "particle": (ChainParticle(), {"ess_threshold": 1.0}),
    "five symbols": (chain(5), {"ess_threshold": 1.0}),
    "adaptive": (chain(3), {}),
    "importance": (chain(3), {"method": "importance"}),
    "twisted": (chain(3, guess=True), {"ess_threshold": 1.0}),
    "by another proposal": (chain_by_proposal(), {"ess_threshold": 1.0}),
    "mixed": (mixed(), {"ess_threshold": 1.0, "on_failure": "mark"}),
    "steering": (chain(3), {"method": "steer", "n_branches": 2}),
    "steering of particles": (ChainParticle(), {"method": "steer", "n_branches": 3}),
    "moves": (chain(3), {"ess_threshold": 1.0, "kernel": regenerate}),
    "moves of particles": (ChainParticle(), {"ess_threshold": 0.8, "kernel": regenerate}),
    **{name: (chain(3), {"ess_threshold": 1.0, "resampling": name}) for name in SCHEMES},
}


@RUNS
@pytest.mark.parametrize("name", PROGRAMS)
async def test_programs(name, n_runs):
    model, options = PROGRAMS[name]
    exact = await enumerate_exactly(model)
    assert await worst_z(lambda seed: smc(model, 4, seed=seed, **options), exact, n_runs) < Z_LIMIT


async def test_the_oracle_itself_against_a_sum_by_hand():
    exact = await enumerate_exactly(chain(3))
    by_hand: dict[tuple[int, ...], float] = {}

    def go(symbols: tuple[int, ...], mass: float) -> None:
        if len(symbols) == 3 or symbols[-2:] == (0, 0):
            by_hand[symbols] = mass
            return
        row = (AFTER[symbols[-1]] if symbols else ROW).exp().tolist()
        for symbol in range(3):
            go((*symbols, symbol), mass * row[symbol] * LIKELIHOOD[symbol])

    go((), 1.0)
    total = sum(by_hand.values())
    assert exact.log_evidence == pytest.approx(math.log(total), abs=1e-6)
    assert exact.posterior == pytest.approx({v: m / total for v, m in by_hand.items()}, abs=1e-6)
    particles = await enumerate_exactly(ChainParticle())
    assert particles.posterior == pytest.approx(exact.posterior, abs=1e-6)
    twisted = await enumerate_exactly(chain(3, guess=True))
    assert twisted.posterior == pytest.approx(exact.posterior, abs=1e-6)
    proposed = await enumerate_exactly(chain_by_proposal())
    assert proposed.log_evidence == pytest.approx(exact.log_evidence, abs=1e-6)


PROPOSALS = {
    "direct": lambda: Direct(Product(MODEL, RULE)),
    "guided": lambda: Guided(Product(MODEL, RULE), Tempered(Table(seed=1), 0.5)),
    "top 1": lambda: TopK(MODEL, RULE, 1),
    "top 2": lambda: TopK(MODEL, RULE, 2),
    "top 2 of weights": lambda: TopK(MODEL, Weigh(), 2),
    "AWRS": lambda: AWRS(MODEL, RULE),
    "AWRS of two checks": lambda: AWRS(MODEL, RULE, max_checks=2),
}


@RUNS
@pytest.mark.parametrize("name", PROPOSALS)
async def test_proposals(name, n_runs):
    proposal = PROPOSALS[name]()
    exact = await sequence_law(proposal.potential, 3, 3)
    model = sequences(proposal, max_tokens=3)
    assert (
        await worst_z(lambda seed: smc(model, 4, seed=seed, ess_threshold=0.9, on_failure="mark"), exact, n_runs)
        < Z_LIMIT
    )


LARGER = {
    "2 tokens": (2, lambda: Direct(Product(Table(2), Weigh(2)))),
    "4 tokens": (4, lambda: TopK(Table(4), NoRepeat(4), 2)),
    "5 tokens": (5, lambda: AWRS(Table(5), NoRepeat(5))),
}


@RUNS
@pytest.mark.parametrize("name", LARGER)
async def test_vocabularies_of_two_to_five_tokens_and_texts_of_five(name, n_runs):
    n_tokens, make = LARGER[name]
    proposal = make()
    exact = await sequence_law(proposal.potential, n_tokens, 5)
    assert max(map(len, exact.posterior)) == 5
    model = sequences(proposal, max_tokens=5)
    options = {"ess_threshold": 0.9, "on_failure": "mark"}
    assert await worst_z(lambda seed: smc(model, 4, seed=seed, **options), exact, n_runs) < Z_LIMIT


@RUNS
async def test_islands(n_runs):
    exact = await enumerate_exactly(chain(3))
    assert await worst_z(lambda seed: islands(chain(3), 3, 3, seed=seed), exact, n_runs) < Z_LIMIT


@RUNS
@pytest.mark.parametrize(
    "boundary",
    [after_tokens(1), after_tokens(2), after_bytes([b"a", b"b\n", b"c"])],
    ids=["every token", "every second", "lines"],
)
async def test_critics_at_any_boundary_give_one_law(boundary, n_runs):
    exact = await sequence_law(Product(MODEL, RULE, Weigh()), 3, 3)
    model = sequences(AWRS(MODEL, RULE), critic=Weigh(), max_tokens=3, boundary=boundary)
    assert await worst_z(lambda seed: smc(model, 4, seed=seed, ess_threshold=1.0), exact, n_runs) < Z_LIMIT


@RUNS
async def test_moves_with_random_weights(n_runs):
    exact = await sequence_law(Product(MODEL, RULE), 3, 2)
    model = sequences(AWRS(MODEL, RULE), max_tokens=2)
    options = {"ess_threshold": 1.0, "kernel": regenerate}
    assert await worst_z(lambda seed: smc(model, 4, seed=seed, **options), exact, n_runs) < Z_LIMIT


@pytest.mark.parametrize("proposal", [Direct(Product(MODEL, RULE)), TopK(MODEL, RULE, 2), AWRS(MODEL, RULE)])
async def test_proposals_enumerate_to_the_law_of_their_potential(proposal):
    exact = await sequence_law(proposal.potential, 3, 3)
    found = await enumerate_exactly(sequences(proposal, max_tokens=3))
    assert found.log_evidence == pytest.approx(exact.log_evidence, abs=1e-5)
    assert found.posterior == pytest.approx(exact.posterior, abs=1e-5)


@pytest.mark.parametrize("model", [chain(3), ChainParticle(), sequences(Product(MODEL, RULE), max_tokens=3)])
async def test_a_wide_beam_is_exact(model):
    exact = await enumerate_exactly(model)
    result = await smc(model, 40, method="beam", n_branches=4)
    assert result.log_evidence == pytest.approx(exact.log_evidence, abs=1e-6)
    assert result.posterior() == pytest.approx(exact.posterior, abs=1e-6)


async def test_a_narrow_beam_is_a_lower_bound_and_finds_good_values():
    exact = await enumerate_exactly(chain(3))
    result = await smc(chain(3), 2, method="beam", n_branches=3)
    assert len(result.paths) == 2
    assert result.log_evidence < exact.log_evidence
    assert result.best() in sorted(exact.posterior, key=lambda v: -exact.posterior[v])[:3]


async def test_best_of_n_gives_all_weight_to_the_heaviest():
    result = await smc(chain(3), 30, method="best_of_n", seed=3)
    assert result.posterior() == {result.best(): 1.0}
    importance = await smc(chain(3), 30, method="importance", seed=3)
    assert importance.log_weights == result.log_weights
    assert max(importance.log_weights) == importance.log_weights[importance.values.index(result.best())]


@RUNS
async def test_tokens_drawn_by_the_model(n_runs):
    async with fake_language_model(FakeEngine(3), n_vocab=3) as llm:
        mask = torch.tensor([True, False, True])

        @program
        async def tokens(ctx):
            ids = [1]
            for i in range(2):
                ids.append(await ctx.next_token(llm, ids, mask=mask if i else None, temperature=0.6))
                await ctx.checkpoint()
            return tuple(ids[1:])

        exact = await enumerate_exactly(tokens())
        assert 0.2 < math.exp(exact.log_evidence) < 0.9
        assert await worst_z(lambda seed: smc(tokens(), 4, seed=seed, ess_threshold=1.0), exact, n_runs) < Z_LIMIT


# ---- Markov chains: the law stays what it was


async def paths_of_the_law(model, n):
    """Paths distributed by the posterior: rejection of single particles, whose weights are at most 1."""
    random_numbers = np.random.default_rng(5)
    paths = []
    for seed in itertools.count():
        result = await smc(model, 1, seed=seed, method="importance", on_failure="mark")
        if random_numbers.random() < math.exp(result.log_weights[0]):
            paths.append(result.paths[0])
        if len(paths) == n:
            return paths


CHAINS = pytest.mark.parametrize(
    "n_chains",
    [pytest.param(150, id="few"), pytest.param(800, marks=[pytest.mark.slow, pytest.mark.timeout(900)], id="many")],
)


@CHAINS
@pytest.mark.parametrize(
    ("model", "kernel"),
    [(chain(2), None), (sequences(Product(MODEL, RULE), max_tokens=2), None), (chain(2), regenerate)],
    ids=["program", "particle", "moved"],
)
async def test_particle_gibbs_keeps_the_law(model, kernel, n_chains):
    exact = await enumerate_exactly(model)
    after, n_moved = [], 0
    for i, path in enumerate(await paths_of_the_law(model, n_chains)):
        visited = await particle_gibbs(model, 3, 2, seed=i, initial=path, ess_threshold=1.0, kernel=kernel)
        after.append(visited.values[-1])
        n_moved += visited.values[-1] != path.value
    assert n_moved > 0.3 * n_chains, "the chain moves"
    assert law_distance(after, exact) < law_distance_bound(len(exact.posterior), n_chains)
