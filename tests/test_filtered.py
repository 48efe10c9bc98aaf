"""Draws from filtered rows: the compiled pass is the plain one, and both are what top-k, top-p and min-p mean."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from genlm_backend import sampling
from genlm_backend.errors import InvalidQuery
from genlm_backend.sampling import Kept

pytestmark = pytest.mark.thorough

KEPT = [
    Kept(),
    Kept(top_k=1),
    Kept(top_k=7),
    Kept(top_k=10**6),
    Kept(top_p=0.37),
    Kept(top_p=0.93),
    Kept(top_p=1.0),
    Kept(min_p=0.03),
    Kept(min_p=0.4),
    Kept(7, 0.61),
    Kept(None, 0.83, 0.01),
    Kept(40, None, 0.02),
    Kept(40, 0.77, 0.005),
]
TEMPERATURES = [0.0, 0.3, 1.0, 2.5]


def some_rows(n_tokens: int, seed: int) -> torch.Tensor:
    """(8, n_tokens): peaked to flat, one half impossible, one with equals, one far below 0."""
    random = torch.Generator().manual_seed(seed)
    rows = torch.randn(8, n_tokens, generator=random)
    rows *= torch.tensor([0.1, 0.5, 1.0, 2.0, 4.0, 2.0, 2.0, 30.0])[:, None]
    rows[5, torch.rand(n_tokens, generator=random) < 0.5] = -math.inf
    rows[5, 0] = 0.0
    rows[6] = (rows[6] * 2).round() / 2 + 0.1 * torch.randn((), generator=random)
    rows[7] -= 700
    return rows


def some_masks(n: int, n_tokens: int, seed: int) -> torch.Tensor:
    return torch.rand(n, n_tokens, generator=torch.Generator().manual_seed(seed)) < 0.4


def kept_of(row: torch.Tensor, kept: Kept, temperature: float) -> torch.Tensor:
    """(vocab,) float64 log-probabilities, token after token as the words say."""
    weights = (row.double() - row.double().max()) / (temperature or 1.0)
    lowest = math.log(kept.min_p) - 1e-9 if kept.min_p else -math.inf
    order = sorted(range(len(row)), key=lambda v: (-float(row[v]), v))
    order = [v for v in order if weights[v] > -math.inf and weights[v] >= lowest][: kept.top_k]
    if kept.top_p is not None and kept.top_p < 1:
        total, before, n = float(weights[order].exp().sum()), 0.0, 0
        while n < len(order) and (n == 0 or before < kept.top_p * total):
            before, n = before + math.exp(weights[order[n]]), n + 1
        order = order[:n]
    q = torch.full((len(row),), -math.inf, dtype=torch.float64)
    q[order] = weights[order].log_softmax(0)
    return q


@pytest.mark.parametrize("n_tokens", [1, 2, 63, 64, 65, 300, pytest.param(1025, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("is_masked", [False, True])
def test_compiled_draws_are_the_plain_ones_and_what_filters_mean(n_tokens, temperature, is_masked):
    rows, masks = some_rows(n_tokens, n_tokens), some_masks(8, n_tokens, n_tokens)
    for kept in KEPT:
        keys = [sampling.draw_key(i, (), n_tokens) for i in range(8)]
        some = masks if is_masked else None
        asked = sampling._checked(rows, keys, [temperature] * 8, some, range(8))
        compiled = sampling.draw_filtered(rows, range(8), keys, [kept] * 8, [temperature] * 8, some)
        plain = sampling._draw_filtered_plainly(rows, keys, [kept] * 8, asked)
        for i in range(8):
            q = kept_of(rows[i], kept, temperature)
            allowed = q.masked_fill(~masks[i], -math.inf) if is_masked else q
            scores = allowed + (sampling.gumbel_noise([keys[i]], n_tokens)[0] if temperature else 0)
            token = int(scores.argmax()) if allowed.max() > -math.inf else -1
            for found in (compiled, plain):
                assert int(found.token_ids[i]) == token, (kept, i)
                if token < 0:
                    assert found.log_masses[i] == found.log_qs[i] == -math.inf
                    continue
                log_mass, near = float(allowed.logsumexp(0)), {"abs": 3e-6 / (temperature or 1), "rel": 1e-6}
                assert float(found.log_masses[i]) == pytest.approx(log_mass, **near)
                assert float(found.log_qs[i]) == pytest.approx(
                    float(allowed[token]) - log_mass if temperature else 0.0, **near
                )


def test_a_whole_vocabulary():
    rows = some_rows(49_152, 5)
    for kept, temperature in itertools.product(KEPT[1:], (0.6, 1.0)):
        keys = list(range(8))
        asked = sampling._checked(rows, keys, [temperature] * 8, None, range(8))
        compiled = sampling.draw_filtered(rows, range(8), keys, [kept] * 8, [temperature] * 8)
        plain = sampling._draw_filtered_plainly(rows, keys, [kept] * 8, asked)
        assert torch.equal(compiled.token_ids, plain.token_ids), (kept, temperature)
        torch.testing.assert_close(compiled.log_qs, plain.log_qs, atol=1e-5, rtol=0)


def test_the_plain_ones_in_parts_are_the_same(monkeypatch):
    rows, masks, keys = some_rows(300, 3), some_masks(8, 300, 3), list(range(8))
    asked = sampling._checked(rows, keys, [0.7] * 8, masks, range(8))
    whole = sampling._draw_filtered_plainly(rows, keys, KEPT[3:11], asked)
    monkeypatch.setattr(sampling, "_TOKENS_AT_ONCE", 1000)
    parts = sampling._draw_filtered_plainly(rows, keys, KEPT[3:11], asked)
    assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True))


def test_a_wrong_filter_is_noticed():
    """The check itself: other filters, or filters after the mask, give other tokens."""
    rows, keys = some_rows(300, 1)[2:3].expand(200, 300), list(range(200))
    mask = some_masks(1, 300, 3)[0]
    right = sampling.draw_filtered(rows, range(200), keys, [Kept(top_p=0.5)] * 200, None, [mask] * 200).token_ids
    for kept in (Kept(), Kept(top_p=0.6), Kept(top_k=20)):
        other = sampling.draw_filtered(rows, range(200), keys, [kept] * 200, None, [mask] * 200).token_ids
        assert not torch.equal(other, right)
    masked_first = rows[:1].masked_fill(~mask, -math.inf).expand(200, 300)
    other = sampling.draw_filtered(masked_first, range(200), keys, [Kept(top_p=0.5)] * 200).token_ids
    assert not torch.equal(other, right)


def test_the_batch_decides_nothing():
    rows, masks = some_rows(300, 2), some_masks(3, 300, 2)
    draws = [
        (row, key, kept, t, mask)
        for row in range(8)
        for key, kept in enumerate(KEPT)
        for t in (0.0, 0.7)
        for mask in (None, masks[row % 3])
    ]
    row_of_draw, keys, kept, temperatures, some = map(list, zip(*draws, strict=True))
    together = sampling.draw_filtered(rows, row_of_draw, keys, kept, temperatures, some)
    for i in range(0, len(draws), 7):
        row, key, one, t, mask = draws[i]
        alone = sampling.draw_filtered(rows[row : row + 1], [0], [key], [one], [t], [mask])
        assert [float(x[i]) for x in together] == [float(x[0]) for x in alone]


def test_a_mask_that_allows_the_drawn_token_changes_nothing():
    rows, keys = some_rows(300, 4), list(range(100, 108))
    for kept in KEPT:
        free = sampling.draw_filtered(rows, range(8), keys, [kept] * 8).token_ids
        masks = some_masks(8, 300, 9)
        masks[torch.arange(8), free] = True
        assert torch.equal(sampling.draw_filtered(rows, range(8), keys, [kept] * 8, None, masks).token_ids, free)


def test_rows_without_a_possible_token_are_marked_and_harm_no_other():
    rows = torch.tensor([[-math.inf] * 3, [0.0, math.nan, 0.0], [0.0, math.inf, 0.0], [-1.0, -2.0, -9.0], [-1.0, 0, 0]])
    nothing = torch.zeros(3, dtype=torch.bool)
    for kept in KEPT[1:]:
        found = sampling.draw_filtered(rows, range(5), [1] * 5, [kept] * 5, None, [None] * 4 + [nothing])
        assert found.token_ids.tolist()[:3] == [-1] * 3 and found.token_ids[4] == -1 and found.token_ids[3] >= 0
        assert found.log_masses.tolist()[3:] == [0.0, -math.inf]
    only_last = torch.tensor([False, False, True])
    assert sampling.draw_filtered(rows[3:4], [0], [1], [Kept(top_p=0.7)], None, [only_last]).token_ids.tolist() == [-1]


def test_no_draws_and_layouts():
    assert sampling.draw_filtered(torch.empty(0, 3), [], [], []).token_ids.shape == (0,)
    assert sampling.draw_filtered(torch.empty(1, 0), [0], [1], [Kept(top_p=0.5)]).token_ids.tolist() == [-1]
    rows, keys = some_rows(300, 6), list(range(8))
    expected = sampling.draw_filtered(rows, range(8), keys, [Kept(top_p=0.8)] * 8)
    for view in (rows.T.contiguous().T, torch.cat([rows, rows], 1)[:, :300], rows.double()):
        found = sampling.draw_filtered(view, range(8), keys, [Kept(top_p=0.8)] * 8)
        assert torch.equal(found.token_ids, expected.token_ids)


@pytest.mark.parametrize(
    "kept",
    [
        Kept(0),
        Kept(-1),
        Kept(True),
        Kept(1.5),
        Kept(None, 0.0),
        Kept(None, 1.1),
        Kept(None, math.nan),
        Kept(None, "0.9"),
        Kept(None, None, -0.1),
        Kept(None, None, 1.1),
        Kept(None, None, math.nan),
    ],
)
def test_filters_that_have_no_meaning_are_refused(kept):
    with pytest.raises(InvalidQuery, match=r"(top_k|top_p|min_p) is"):
        sampling.draw_filtered(torch.zeros(1, 3), [0], [1], [kept])


def test_one_filter_for_each_draw():
    with pytest.raises(InvalidQuery, match="1 filters for 2 draws; expected one each"):
        sampling.draw_filtered(torch.zeros(2, 3), [0, 1], [1, 2], [Kept()])


def test_tokens_come_at_the_rate_of_the_filtered_distribution():
    """Chi-squared with 20,000 draws; the false-alarm rate is 1e-9, and a nucleus that is one token short is caught."""
    from scipy import stats

    row = some_rows(60, 8)[2:3]
    n = 20_000
    for kept in (Kept(top_p=0.7), Kept(20, 0.9, 0.01)):
        found = sampling.draw_filtered(
            row.expand(n, 60), range(n), [sampling.draw_key(3, (), i) for i in range(n)], [kept] * n, [0.8] * n
        )
        counts = np.bincount(found.token_ids.numpy(), minlength=60)
        q = kept_of(row[0], kept, 0.8).exp().numpy()
        assert (counts[q == 0] == 0).all()
        assert stats.chisquare(counts[q > 0], n * q[q > 0]).pvalue > 1e-9
        last = q.argsort()[60 - np.count_nonzero(q)]
        assert counts[last] > 0, "the one that crosses top-p is among them"
