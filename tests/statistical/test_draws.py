"""The law of draws: counts against probabilities, independence between keys, and how rarely small logit errors show.

Counts over K outcomes in n draws: sum |p_hat - p| <= sqrt(2 (K ln 2 + ln(1 / delta)) / n) fails with probability below
delta = 1e-9 for a right sampler (Weissman et al. 2003). Seeds are fixed. Each check also rejects a wrong sampler.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from genlm_backend import sampling

DELTA = 1e-9
N_DRAWS = 20_000
ROW = torch.tensor([0.0, -1.5, -0.2, -math.inf, -3.0, -0.7, -5.0]).log_softmax(0)
MASK = torch.tensor([True, True, False, True, True, False, True])

Sampler = Callable[[torch.Tensor, list[int], list[float], list[torch.Tensor] | None], torch.Tensor]


def follows_the_law(outcomes: torch.Tensor, probabilities: torch.Tensor) -> bool:
    """Weissman's bound; -1 among the outcomes breaks the law."""
    if (outcomes < 0).any():
        return False
    n, k = len(outcomes), len(probabilities)
    frequencies = torch.bincount(outcomes, minlength=k).double() / n
    distance = (frequencies - probabilities.double()).abs().sum().item()
    return distance <= math.sqrt(2 * (k * math.log(2) + math.log(1 / DELTA)) / n)


def keys(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 2**64, n, np.uint64).tolist()


def outcomes(sampler: Sampler, temperature: float, mask: torch.Tensor | None, n: int = N_DRAWS) -> torch.Tensor:
    return sampler(ROW.expand(n, len(ROW)), keys(n), [temperature] * n, None if mask is None else [mask] * n)


def law(temperature: float, mask: torch.Tensor | None) -> torch.Tensor:
    allowed = ROW if mask is None else ROW.masked_fill(~mask, -math.inf)
    return (allowed.double() / temperature).softmax(0)


CASES = pytest.mark.parametrize(
    ("temperature", "mask"), [(1.0, None), (0.4, None), (3.0, None), (1.0, MASK), (0.5, MASK), (2.0, MASK)]
)


@CASES
@pytest.mark.parametrize("sampler", [sampling.draw, sampling.draw_plainly])
def test_draws_follow_the_tempered_and_masked_law(sampler: Sampler, temperature: float, mask: torch.Tensor | None):
    assert follows_the_law(outcomes(sampler, temperature, mask), law(temperature, mask))


@CASES
def test_a_sampler_that_reuses_its_noise_across_tokens_is_rejected(temperature: float, mask: torch.Tensor | None):
    def one_number_for_all_tokens(rows, keys, temperatures, masks):
        allowed = rows if masks is None else rows.masked_fill(~torch.stack(masks), -math.inf)
        return (allowed / torch.tensor(temperatures)[:, None] + sampling.gumbel_noise(keys, 1)).argmax(1)

    assert not follows_the_law(outcomes(one_number_for_all_tokens, temperature, mask), law(temperature, mask))


def test_a_sampler_that_ignores_the_temperature_is_rejected():
    def at_one(rows, keys, temperatures, masks):
        return sampling.draw(rows, keys, None, masks)

    for temperature in (0.4, 0.8, 1.25, 3.0):
        assert not follows_the_law(outcomes(at_one, temperature, None), law(temperature, None))


def test_a_sampler_that_ignores_the_mask_or_moves_refused_draws_to_the_best_token_is_rejected():
    def ignoring(rows, keys, temperatures, masks):
        return sampling.draw(rows, keys, temperatures)

    def moving(rows, keys, temperatures, masks):
        drawn = sampling.draw(rows, keys, temperatures)
        return torch.where(masks[0][drawn], drawn, 0)

    assert not follows_the_law(outcomes(ignoring, 1.0, MASK), law(1.0, MASK))
    assert not follows_the_law(outcomes(moving, 1.0, MASK), law(1.0, MASK))


def test_exponential_noise_in_the_place_of_gumbel_noise_is_rejected():
    def exponential(rows, keys, temperatures, masks):
        return (rows + (-sampling.gumbel_noise(keys, rows.shape[1])).exp()).argmax(1)

    assert not follows_the_law(outcomes(exponential, 1.0, None), law(1.0, None))


@pytest.mark.slow
def test_draws_from_many_tokens_follow_the_law():
    n, n_tokens = 1_000_000, 300
    row = (torch.randn(n_tokens, generator=torch.Generator().manual_seed(0)) * 2).log_softmax(0)
    drawn = sampling.draw(row.expand(n, n_tokens), keys(n))
    assert follows_the_law(drawn, row.double().exp())
    assert not follows_the_law(drawn, (row.double() / 1.03).softmax(0))


@pytest.mark.slow
def test_improbable_tokens_are_drawn_at_their_rate():
    # 3,000 tokens of probability 1e-6 beside one that is nearly certain. Their count is Poisson with mean 300; it
    # leaves 6 standard deviations with probability below 1e-7 (Chernoff). Noise from a uniform number of 16 bits never
    # draws one of them: 60 are expected in 20,000 draws and none come, which is more than 6 standard deviations.
    def count_rare(sampler: Callable[[torch.Tensor, list[int]], torch.Tensor], n: int) -> tuple[int, float]:
        row = torch.full((3001,), math.log(1e-6))
        row[0] = math.log1p(-3e-3)
        some = (sampler(row.expand(500, -1), keys(500, i)) for i in range(n // 500))
        return sum(int((drawn > 0).sum()) for drawn in some), n * 3e-3

    def with_16_bits(rows: torch.Tensor, keys: list[int]) -> torch.Tensor:
        uniform = ((-(-sampling.gumbel_noise(keys, rows.shape[1])).exp()).exp() * 2**16).floor_()
        return (rows - (-((uniform + 0.5) / 2**16).log()).log()).argmax(1)

    count, mean = count_rare(sampling.draw, 100_000)
    assert abs(count - mean) <= 6 * math.sqrt(mean)
    count, mean = count_rare(with_16_bits, 20_000)
    assert abs(count - mean) > 6 * math.sqrt(mean)


def test_the_noise_is_gumbel():
    noise = sampling.gumbel_noise(keys(400), 1000).flatten()
    uniform = (-(-noise).exp()).exp()  # the distribution function of the standard Gumbel
    assert follows_the_law((uniform * 32).long().clamp(max=31), torch.full((32,), 1 / 32))
    assert not follows_the_law((uniform**1.02 * 32).long().clamp(max=31), torch.full((32,), 1 / 32))
    # The upper tail, by which improbable tokens win: P(noise > t) = 1 - exp(-exp(-t)). Means 2,686 and 134; a count
    # leaves 6 standard deviations with probability below 1e-6 (Chernoff).
    for t in (5.0, 8.0):
        mean = len(noise) * -math.expm1(-math.exp(-t))
        assert abs((noise > t).sum().item() - mean) <= 6 * math.sqrt(mean)


# Independence: pairs of draws against the product law.

PAIRS = {
    "steps": lambda i: (sampling.draw_key(7, (3,), i), sampling.draw_key(7, (3,), i + 1)),
    "seeds": lambda i: (sampling.draw_key(i), sampling.draw_key(i + 1)),
    "lineages": lambda i: (sampling.draw_key(7, (i,)), sampling.draw_key(7, (i + 1,))),
    "parent and child": lambda i: (sampling.draw_key(7, (i,)), sampling.draw_key(7, (i, 0))),
    "sites": lambda i: (sampling.draw_key(7, (i,), 0, "a"), sampling.draw_key(7, (i,), 0, "b")),
    "step and lineage": lambda i: (sampling.draw_key(7, (i,), 0), sampling.draw_key(7, (0,), i)),
    "neighbouring keys": lambda i: (2 * i, 2 * i + 1),
    "keys with one bit apart": lambda i: (i << 20, (i << 20) | 1 << 63),
}


def pair_outcomes(pair: Callable[[int], tuple[int, int]], n: int = 20_000) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs of draws from one row of 4 tokens, as one number of 16, and the probabilities of those."""
    row = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    pairs = [pair(i) for i in range(1, n + 1)]
    first, second = (sampling.draw(row.expand(n, 4), list(some)) for some in zip(*pairs, strict=True))
    return first * 4 + second, torch.outer(row.exp(), row.exp()).flatten()


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS.keys())
def test_draws_of_related_keys_are_independent(pair: Callable[[int], tuple[int, int]]):
    assert follows_the_law(*pair_outcomes(pair))


@pytest.mark.thorough
def test_a_key_that_ignores_the_step_or_is_shared_now_and_then_is_rejected():
    assert not follows_the_law(*pair_outcomes(lambda i: (sampling.draw_key(i), sampling.draw_key(i))))
    assert not follows_the_law(*pair_outcomes(lambda i: (sampling.draw_key(i), sampling.draw_key(i + (i % 10 > 0)))))


def test_the_noises_of_neighbouring_tokens_are_independent():
    noise = sampling.gumbel_noise(keys(200), 1000)
    cell = ((-(-noise).exp()).exp() * 4).long().clamp(max=3)
    sixteenths = torch.full((16,), 1 / 16)
    for distance in (1, 2, 64, 256):
        pairs = (cell[:, :-distance] * 4 + cell[:, distance:]).flatten()
        assert follows_the_law(pairs, sixteenths)
    assert not follows_the_law((cell * 4 + cell).flatten(), sixteenths)


# Small errors of logits.


def inverse_cdf(rows: torch.Tensor, keys: list[int]) -> torch.Tensor:
    uniform = (-(-sampling.gumbel_noise(keys, 1)).exp()).exp()
    return torch.searchsorted(rows.double().softmax(1).cumsum(1), uniform).clamp(max=rows.shape[1] - 1)[:, 0]


@pytest.mark.slow
def test_logit_errors_of_a_thousandth_change_fewer_than_one_draw_in_a_thousand():
    # The gap between the two best scores has density sum p (1 - p) < 1 at 0 (token v beats the others by a logistic
    # margin), so errors of standard deviation 1e-3 on each logit flip E max(0, N(0, 2e-6)) = 5.7e-4 of the draws at
    # most: 57 in 100,000. More than 100 has probability below exp(-(100 ln(100 / 57) - 43)) = 2e-6 (Chernoff).
    # Inverse-CDF draws with the same errors fail the same check.
    n, n_tokens = 100_000, 50
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(n, n_tokens, generator=generator) * 2
    off = rows + 1e-3 * torch.randn(n, n_tokens, generator=generator)
    n_flipped = (sampling.draw(rows, keys(n)) != sampling.draw(off, keys(n))).sum().item()
    assert 0 < n_flipped <= 100
    few, few_off = rows[:20_000], off[:20_000]
    assert (inverse_cdf(few, keys(20_000)) != inverse_cdf(few_off, keys(20_000))).sum().item() > 20
