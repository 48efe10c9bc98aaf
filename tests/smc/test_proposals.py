"""Weighted draws symbol by symbol: E[w 1{symbol = y}] = exp(logw_next[y]) for each y, also where little is allowed.

z-limits as in `oracle`: 6.3 standard errors for each number.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from genlm_backend import sampling
from genlm_backend.errors import InvalidProgram
from genlm_backend.potentials import Constraint, Potential, Product
from genlm_backend.smc import AWRS, Direct, Guided, TopK
from genlm_backend.smc.awrs import log_expected_estimate
from tests.smc.oracle import Z_LIMIT, NoRepeat, Table, Weigh

pytestmark = pytest.mark.thorough


class Fixed(Potential):
    """One row, whatever came before."""

    def __init__(self, logprobs: torch.Tensor) -> None:
        self.logprobs, self.n_tokens = logprobs, len(logprobs) - 1

    def start(self):
        return ()

    def extend(self, state, token_id):
        return (*state, token_id)

    async def prefix(self, state):
        return 0.0

    async def complete(self, state):
        return 0.0

    async def logw_next(self, state):
        return self.logprobs


class Only(Constraint):
    """Some symbols; counts how often it is asked, and refuses to make a mask."""

    def __init__(self, symbols, n_tokens) -> None:
        self.symbols, self.n_tokens = frozenset(symbols), n_tokens
        self.n_asked = 0

    def start(self):
        return ()

    def extend(self, state, token_id):
        return (*state, token_id)

    def is_alive(self, state):
        return all(symbol in self.symbols for symbol in state)

    def is_complete(self, state):
        return self.end in self.symbols

    def allows(self, state, symbol):
        self.n_asked += 1
        return symbol in self.symbols

    def mask(self, state):
        return np.array([symbol in self.symbols for symbol in range(self.n_tokens + 1)])


async def z_of_each_symbol(proposal, n_draws: int, state=None) -> np.ndarray:
    state = proposal.start() if state is None else state
    row = (await proposal.target_row(state)).double().exp().numpy()
    weights = np.zeros((n_draws, len(row)))
    for i in range(n_draws):
        symbol, log_weight = await proposal.propose(state, sampling.draw_key(0, (), i))
        if log_weight > -math.inf:
            weights[i, symbol] = math.exp(log_weight)
    # Never less spread than 0.4 of a coin's, see oracle.
    floor = 0.4 * np.sqrt(np.maximum(row * (1.0 - row), 0.0))
    error = np.maximum(weights.std(0, ddof=1), floor) / math.sqrt(n_draws)
    return np.abs(weights.mean(0) - row) / np.maximum(error, 1e-9)


DRAWS = pytest.mark.parametrize(
    "n_draws",
    [pytest.param(200, id="few"), pytest.param(2_000, marks=[pytest.mark.slow, pytest.mark.timeout(600)], id="many")],
)
ROW = torch.tensor([0.4, 0.25, 0.02, 0.13, 0.1, 0.1]).log()


@DRAWS
@pytest.mark.parametrize("allowed", [{0, 1, 2, 3, 4, 5}, {0, 5}, {2}, {1, 2, 3}, {5}, {2, 4}])
@pytest.mark.parametrize("kind", ["direct", "awrs", "awrs 1", "awrs 3", "top 1", "top 3", "top 9", "guided"])
async def test_each_symbol_has_its_expected_weight(kind, allowed, n_draws):
    model, rule = Fixed(ROW), Only(allowed, 5)
    proposal = {
        "direct": lambda: Direct(Product(model, rule)),
        "awrs": lambda: AWRS(model, rule),
        "awrs 1": lambda: AWRS(model, rule, max_checks=1),
        "awrs 3": lambda: AWRS(model, rule, max_checks=3),
        "top 1": lambda: TopK(model, rule, 1),
        "top 3": lambda: TopK(model, rule, 3),
        "top 9": lambda: TopK(model, rule, 9),
        "guided": lambda: Guided(Product(model, rule), Fixed(torch.zeros(6))),
    }[kind]()
    assert (await z_of_each_symbol(proposal, n_draws)).max() < Z_LIMIT


async def test_weights_of_a_potential_that_is_no_constraint():
    for proposal in (TopK(Table(), Weigh(), 2), Direct(Product(Table(), Weigh(), NoRepeat()))):
        assert (await z_of_each_symbol(proposal, 400, None)).max() < Z_LIMIT


async def test_nothing_allowed_is_a_dead_end():
    for proposal in (
        AWRS(Fixed(ROW), Only((), 5)),
        TopK(Fixed(ROW), Only((), 5), 2),
        Direct(Product(Fixed(ROW), Only((), 5))),
    ):
        _, log_weight = await proposal.propose(proposal.start(), 7)
        assert log_weight == -math.inf


async def test_two_allowed_at_once_weigh_one_exactly_and_ask_twice():
    rule = Only(range(1000), 1000)
    row = torch.full((1001,), -math.log(1000))
    row[1000] = -math.inf
    proposal = AWRS(Fixed(row), rule)
    for key in range(20):
        _, log_weight = await proposal.propose(proposal.start(), key)
        assert log_weight == pytest.approx(0.0, abs=1e-6)
    assert rule.n_asked == 40 and proposal.checks.n_checks == 40


@pytest.mark.parametrize("n_allowed", [1, 3])
async def test_an_allowed_mass_of_a_millionth(n_allowed):
    """Where genlm-control 0.4.1 gives weight 0 to every draw (its rejected mass reaches 1 - 1e-5)."""
    n_vocab = 400
    row = torch.zeros(n_vocab + 1, dtype=torch.float64)
    allowed = [17, 230, 399][:n_allowed]
    row[:] = math.log((1 - 1e-6) / (n_vocab + 1 - n_allowed))
    row[allowed] = math.log(1e-6 / n_allowed)
    proposal = AWRS(Fixed(row.float()), Only(allowed, n_vocab))
    weights = []
    n_draws = 30
    for key in range(n_draws):
        symbol, log_weight = await proposal.propose(proposal.start(), sampling.draw_key(0, (), key))
        assert symbol in allowed and log_weight > -math.inf, "a draw always finds what there is"
        weights.append(math.exp(log_weight))
    if n_allowed == 1:
        assert weights == pytest.approx([1e-6] * n_draws, rel=1e-4), "known exactly once all others were refused"
    # One draw in some thousands finds an allowed token early and weighs more: 1 % of the mean, which few draws miss.
    assert np.mean(weights) == pytest.approx(1e-6, rel=0.05)


async def test_drawing_is_lazy():
    """A constraint that agrees with the model is asked about two or three tokens, whatever the vocabulary."""
    torch.manual_seed(0)
    n_vocab = 20_000
    row = (3.0 * torch.randn(n_vocab + 1)).log_softmax(0)
    rule = Only(range(n_vocab + 1), n_vocab)
    rule.symbols = frozenset(i for i in range(n_vocab + 1) if i % 10)
    proposal = AWRS(Fixed(row), rule)
    for key in range(40):
        await proposal.propose(proposal.start(), key)
    assert proposal.checks.n_checks / proposal.checks.n_draws < 3


async def test_a_constraint_that_weighs_otherwise_than_0_or_1_is_refused():
    with pytest.raises(InvalidProgram, match="must weigh 0 or 1"):
        await AWRS(Table(), Weigh()).propose(((), ()), 1)


@pytest.mark.parametrize("mass", [0.3, 1e-2, 1e-5, 1e-9])
@pytest.mark.parametrize("n", [2, 3, 8, 40])
def test_the_expected_estimate_is_the_sum_of_its_series(mass, n):
    """Against the plain sum where that ends, and against numerical integration over times elsewhere."""
    rng = np.random.default_rng(n)
    rates = np.sort(rng.random(n))[::-1] * 0.5 + mass
    rates[0] = 1.0
    found = log_expected_estimate(mass, rates)
    terms = np.arange(2_000_000 if n == 2 else 50_000, dtype=np.float64)
    if mass > 1e-3:
        total = mass * np.exp(-sum(np.log1p(terms * mass / rate) for rate in rates)).sum()
        assert found == pytest.approx(math.log(total), abs=1e-4 if n == 2 else 1e-6)
    else:  # p is far below the rates: the sum is the integral over s of prod r / (r + s), up to p / 2
        s = np.exp(np.linspace(-30, 40, 20_001))
        integrand = np.exp(-sum(np.log1p(s / rate) for rate in rates)) * s
        integral = np.trapezoid(integrand, np.log(s)) + mass / 2
        assert found == pytest.approx(math.log(integral), abs=1e-6)
