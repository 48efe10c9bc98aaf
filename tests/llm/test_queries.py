"""Queries: each against the plainest computation on the whole row, alone and in a batch."""

from __future__ import annotations

import asyncio
import itertools
import math
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from genlm_backend import sampling
from genlm_backend.cache.row_memo import Block
from genlm_backend.errors import InvalidQuery, NoTokenAllowed
from genlm_backend.llm import AsyncLM, Draw, Drawn, LogNormalizer, Logprobs, MaskMass, Query, Row, TopK, TopTokens
from genlm_backend.llm.queries import answer, check_query
from genlm_backend.llm.service import normalize
from genlm_backend.testing import FakeEngine, check_idle, fake_language_model

N_VOCAB = 300
N_ROWS = 7


@pytest.fixture
def logits() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(N_ROWS, N_VOCAB, generator=generator)
    logits[2, 100:] = -math.inf  # missing ids
    logits[3, 0] = -math.inf
    return logits


@pytest.fixture
def block(logits: torch.Tensor) -> Block:
    return normalize(logits, N_VOCAB)


@pytest.fixture
def masks() -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.rand(N_ROWS, N_VOCAB, generator=generator) < 0.3


def exact(block: Block, row: int) -> torch.Tensor:
    return block.logprobs[row].double().log_softmax(-1)


def check(outcome: Any, query: Query, block: Block, row: int) -> None:
    """Compare an answer with float64 over the whole row."""
    logprobs = exact(block, row)
    match query:
        case Row():
            assert torch.equal(outcome, block.logprobs[row])
        case LogNormalizer():
            assert outcome == block.log_normalizers[row]
        case TopK(k):
            assert isinstance(outcome, TopTokens) and outcome.token_ids.shape == outcome.logprobs.shape == (k,)
            assert torch.allclose(outcome.logprobs.double(), logprobs.sort(descending=True).values[:k], atol=1e-5)
            assert torch.equal(outcome.logprobs, block.logprobs[row][outcome.token_ids])
            assert len(set(outcome.token_ids.tolist())) == k
        case Logprobs(token_ids):
            assert torch.equal(outcome, torch.stack([block.logprobs[row, i] for i in token_ids]))
        case MaskMass(mask):
            expected = logprobs[torch.as_tensor(mask)].logsumexp(-1).item()
            assert isinstance(outcome, float) and outcome == pytest.approx(expected, abs=2e-6)
        case Draw(key, temperature, mask, top_k, top_p, min_p):
            kept = (logprobs / (temperature or 1.0)).log_softmax(-1)
            kept = kept if min_p is None else sampling.keep_min_p(kept, min_p)
            kept = kept if top_k is None else sampling.keep_top_k(kept, top_k)
            kept = kept if top_p is None else sampling.keep_top_p(kept, top_p)
            allowed = kept > -math.inf
            if mask is not None:
                allowed = allowed & torch.as_tensor(mask)
            if not allowed.any():
                assert isinstance(outcome, NoTokenAllowed)
                return
            (token,) = sampling.draw_plainly(block.logprobs[row : row + 1], [key], [temperature], [allowed]).tolist()
            assert isinstance(outcome, Drawn) and outcome.token_id == token and allowed[token]
            assert outcome.logprob == pytest.approx(logprobs[token].item(), abs=2e-6)
            tempered = logprobs.masked_fill(~allowed, -math.inf)
            if temperature == 0:
                assert outcome.log_q == 0 and tempered[token] == tempered.max()
            else:
                expected = (tempered / temperature).log_softmax(-1)[token].item()
                assert outcome.log_q == pytest.approx(expected, abs=2e-6 + 2e-6 / temperature)
            if temperature or query.kept:
                assert outcome.log_mass == pytest.approx(kept[allowed].logsumexp(-1).item(), abs=4e-6)


def queries_for(row: int, masks: torch.Tensor) -> list[Query]:
    return [
        Row(),
        LogNormalizer(),
        TopK(1),
        TopK(5),
        Logprobs([0, 299, 7, 7]),
        MaskMass(masks[row]),
        MaskMass(masks[row].numpy()),
        Draw(row),
        Draw(row + 10, mask=masks[row]),
        Draw(row + 20, 0.5),
        Draw(row + 30, 2.0, masks[row].numpy()),
        Draw(row + 40, 0.0),
        Draw(row + 50, 0.0, masks[row]),
        Draw(row + 60, top_k=5),
        Draw(row + 70, 0.7, top_k=20),
        Draw(row + 80, 1.5, top_k=5),
        Draw(row + 90, 0.0, top_k=5),
        Draw(row + 100, top_k=N_VOCAB),
        Draw(row + 110, 0.6, top_p=0.9),
        Draw(row + 120, 0.6, masks[row], top_p=0.9),
        Draw(row + 130, 1.0, masks[row].numpy(), 30, 0.8, 0.01),
        Draw(row + 140, 0.0, masks[row], min_p=0.001),
        Draw(row + 150, 2.0, None, None, None, 0.2),
    ]


def test_every_query_on_every_row_alone_and_in_one_batch(block: Block, masks: torch.Tensor) -> None:
    asked = [(row, check_query(query, N_VOCAB)) for row in range(N_ROWS) for query in queries_for(row, masks)]
    before = block.logprobs.clone()
    together = answer(block, asked)
    backwards = answer(block, asked[::-1])[::-1]
    for (row, query), outcome, again in zip(asked, together, backwards, strict=True):
        check(outcome, query, block, row)
        check(again, query, block, row)
        (alone,) = answer(Block(block.logprobs[row : row + 1], [block.log_normalizers[row]]), [(0, query)])
        check(alone, query, block, row)
        if isinstance(query, Draw | MaskMass | LogNormalizer):
            assert str(outcome) == str(again) == str(alone), "the batch decides nothing"
    assert torch.equal(block.logprobs, before), "no row was changed"


def test_a_wrong_answer_is_noticed(block: Block, masks: torch.Tensor) -> None:
    """The check itself: an answer that ignores the mask, the temperature or the row must fail it."""
    (plain, masked) = answer(block, [(0, Draw(3)), (0, Draw(3, 1.0, masks[0]))])
    for outcome, query, row in [
        (plain, Draw(3, 1.0, masks[0]), 0),
        (plain, Draw(3, 0.5), 0),
        (masked, Draw(3), 0),
        (plain, Draw(3, top_k=2), 0),
        (plain, Draw(3, top_p=0.1), 0),
        (plain, Draw(3, min_p=0.9), 0),
        (masked._replace(log_q=plain.logprob), Draw(3, 1.0, masks[0]), 0),
        (answer(block, [(1, TopK(5))])[0], TopK(5), 0),
        (answer(block, [(1, MaskMass(masks[0]))])[0], MaskMass(masks[0]), 0),
    ]:
        with pytest.raises(AssertionError):
            check(outcome, query, block, row)


@pytest.mark.thorough
def test_every_pair_of_queries_can_share_a_batch(block: Block, masks: torch.Tensor) -> None:
    queries = [check_query(query, N_VOCAB) for query in queries_for(1, masks)]
    for first, second in itertools.product(queries, repeat=2):
        outcomes = answer(block, [(1, first), (4, second), (1, second)])
        check(outcomes[0], first, block, 1)
        check(outcomes[1], second, block, 4)
        check(outcomes[2], second, block, 1)


def test_no_query_has_no_answer(block: Block) -> None:
    assert answer(block, []) == []


def test_a_dead_end_is_heard_by_its_asker_only(block: Block, masks: torch.Tensor) -> None:
    nothing = torch.zeros(N_VOCAB, dtype=torch.bool)
    impossible = torch.arange(N_VOCAB) >= 100  # in row 2, all of these have probability zero
    asked: list[tuple[int, Query]] = [
        (0, Draw(1)),
        (0, Draw(2, 1.0, nothing)),
        (2, Draw(3, 0.0, impossible)),
        (2, Draw(4, 0.7, impossible)),
        (1, Draw(5, 1.0, masks[1])),
        (2, MaskMass(impossible)),
        (2, MaskMass(nothing)),
        (2, Draw(6)),
    ]
    outcomes = answer(block, asked)
    assert [type(outcome) for outcome in outcomes[1:4]] == [NoTokenAllowed] * 3
    assert "allows 0 tokens" in str(outcomes[1]) and "allows 200 tokens" in str(outcomes[2])
    assert outcomes[5] == outcomes[6] == -math.inf
    for i in (0, 4, 7):
        check(outcomes[i], asked[i][1], block, asked[i][0])


def test_a_dead_end_names_what_leaves_nothing(block: Block) -> None:
    row = block.logprobs[0]
    mask = torch.zeros(len(row), dtype=torch.bool)
    mask[row.argsort()[:5]] = True  # none of the best tokens
    assert row[mask].isfinite().any()
    for draw, told in (
        (Draw(1, mask=mask, top_k=2), "allows 5 tokens, none of those that top_k=2 leaves; draw with weaker filters"),
        (Draw(1, mask=mask, top_k=3, min_p=1.0), "none of those that top_k=3, min_p=1.0 leaves"),
        (Draw(1, mask=torch.zeros_like(mask)), "allows 0 tokens, all of probability zero"),
    ):
        (dead,) = answer(block, [(0, check_query(draw, len(row)))])
        assert isinstance(dead, NoTokenAllowed) and told in str(dead)
        assert str(pickle.loads(pickle.dumps(dead))) == str(dead)


def test_numbers_of_numpy_are_numbers() -> None:
    assert check_query(TopK(np.int64(3)), 8) == TopK(3)  # type: ignore[arg-type]
    asked = Draw(np.uint64(5), np.float32(0.5), None, np.int32(2), np.float64(0.5), np.float32(0.25))  # type: ignore[arg-type]
    checked = check_query(asked, 8)
    assert checked == Draw(5, 0.5, None, 2, 0.5, 0.25)
    assert isinstance(checked, Draw) and [type(value) for value in checked[:2]] == [int, float]
    assert check_query(Draw(1, np.int64(2)), 8) == Draw(1, 2.0)
    for wrong in (TopK(np.int64(0)), TopK(np.float64(3)), Draw(1, np.float32(-1)), Draw(1, np.float16("nan"))):  # type: ignore[arg-type]
        with pytest.raises(InvalidQuery):
            check_query(wrong, 8)


def test_a_mask_of_one_token_draws_it_for_sure(block: Block) -> None:
    for token in (0, 17, 299):
        mask = torch.arange(N_VOCAB) == token
        (drawn,) = answer(block, [(0, Draw(9, 1.3, mask))])
        assert drawn.token_id == token and drawn.log_q == pytest.approx(0.0, abs=1e-6)
        assert drawn.logprob == pytest.approx(exact(block, 0)[token].item(), abs=1e-5)


@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-31, 1e-29, 1e-6, 1e6, 1e29, 1e300])
def test_extreme_temperatures_have_a_finite_log_q(block: Block, masks: torch.Tensor, temperature: float) -> None:
    for mask in (None, masks[0]):
        (drawn,) = answer(block, [(0, check_query(Draw(3, temperature, mask), N_VOCAB))])
        n_allowed = N_VOCAB if mask is None else int(mask.sum())
        assert drawn.log_q == pytest.approx(0.0 if temperature < 1 else -math.log(n_allowed), abs=1e-3)


def test_the_importance_weight_of_a_masked_draw_is_the_mass_of_the_mask(block: Block, masks: torch.Tensor) -> None:
    asked: list[tuple[int, Query]] = [(0, Draw(key, 1.0, masks[0])) for key in range(20)]
    (log_mass,) = answer(block, [(0, MaskMass(masks[0]))])
    for drawn in answer(block, asked):
        assert drawn.logprob - drawn.log_q == pytest.approx(log_mass, abs=5e-6)


def test_all_tokens_have_mass_one(block: Block) -> None:
    everything = torch.ones(N_VOCAB, dtype=torch.bool)
    for row in range(N_ROWS):
        (log_mass,) = answer(block, [(row, MaskMass(everything))])
        assert -1e-6 < log_mass <= 0.0


def test_masks_are_copied_and_may_be_read_only(block: Block) -> None:
    mask = np.zeros(N_VOCAB, bool)
    mask[5] = True
    query = check_query(MaskMass(mask), N_VOCAB)
    mask[:] = True
    read_only = np.frombuffer(bytes([0, 1] * (N_VOCAB // 2)), bool)
    strided = np.ones(2 * N_VOCAB, bool)[::2]
    assert isinstance(query, MaskMass) and torch.as_tensor(query.mask).sum() == 1
    for mask in (read_only, strided):
        (log_mass,) = answer(block, [(0, check_query(MaskMass(mask), N_VOCAB))])
        assert log_mass == pytest.approx(exact(block, 0)[torch.from_numpy(mask.copy())].logsumexp(-1).item(), abs=2e-6)


def test_no_ids_have_no_log_probabilities(block: Block) -> None:
    (logprobs,) = answer(block, [(0, check_query(Logprobs([]), N_VOCAB))])
    assert logprobs.shape == (0,) and logprobs.dtype == torch.float32


def test_answers_are_the_askers_own(block: Block) -> None:
    before = block.logprobs.clone()
    for outcome in answer(block, [(0, Row()), (0, Logprobs([1, 2])), (0, Logprobs([1]))]):
        outcome.fill_(7)
    (top,) = answer(block, [(0, TopK(N_VOCAB))])
    top.logprobs.fill_(7)
    assert torch.equal(block.logprobs, before)


# ---- through a model


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(N_VOCAB)


@pytest.fixture
def llm(engine: FakeEngine) -> Iterator[AsyncLM]:
    llm = fake_language_model(engine, N_VOCAB)
    yield llm
    check_idle(llm)
    llm.close()


async def test_queries_on_one_context_share_one_evaluation_and_a_remembered_row(
    llm: AsyncLM, engine: FakeEngine, masks: torch.Tensor
) -> None:
    logprobs = engine.row([1, 2])
    for _ in range(2):
        top, chosen, mass, drawn, row = await asyncio.gather(
            llm.query([1, 2], TopK(2)),
            llm.query([1, 2], Logprobs([4])),
            llm.query([1, 2], MaskMass(masks[0])),
            llm.query([1, 2], Draw(5)),
            llm.next_token_logprobs([1, 2]),
        )
        assert top.token_ids.tolist() == logprobs.topk(2).indices.tolist()
        assert chosen.item() == pytest.approx(logprobs[4].item(), abs=1e-6)
        assert mass == pytest.approx(logprobs[masks[0]].logsumexp(-1).item(), abs=2e-6)
        assert drawn.logprob == pytest.approx(logprobs[drawn.token_id].item(), abs=1e-6)
        assert torch.allclose(row, logprobs, atol=1e-6)
    assert engine.batches == [[(1, 2)]] and llm.statistics().row_hits == 5


async def test_a_dead_end_of_one_particle_leaves_the_others_alone(llm: AsyncLM, engine: FakeEngine) -> None:
    nothing = np.zeros(N_VOCAB, bool)
    for _ in range(2):  # computed, then remembered
        *good, dead, joined = await asyncio.gather(
            *(llm.query([i], Draw(i)) for i in range(10)),
            llm.query([99], Draw(1, mask=nothing)),
            llm.query([5], Draw(1, mask=nothing)),
            return_exceptions=True,
        )
        assert all(isinstance(drawn, Drawn) for drawn in good)
        assert isinstance(dead, NoTokenAllowed) and isinstance(joined, NoTokenAllowed)
    assert len(engine.batches) == 1


async def test_a_draw_is_decided_by_its_key_and_row_whatever_else_runs(llm: AsyncLM) -> None:
    alone = await llm.query([7], Draw(42))
    llm.clear_cache()
    crowd = await asyncio.gather(*(llm.query([i], Draw(42 if i == 7 else i)) for i in range(50)))
    assert crowd[7] == alone
    draws = await asyncio.gather(*(llm.query([7], Draw(key)) for key in range(50)))
    assert len({drawn.token_id for drawn in draws}) > 5, "other keys draw others"


async def test_log_probability_plus_normaliser_is_the_engines_logit(llm: AsyncLM, engine: FakeEngine) -> None:
    row, log_normalizer = await asyncio.gather(llm.next_token_logprobs([3]), llm.query([3], LogNormalizer()))
    from genlm_backend.llm.service import Context

    logits = engine.evaluate([Context(None, (3,))])[0]
    assert torch.allclose(row + log_normalizer, logits, atol=1e-5)
    assert await llm.query([3], LogNormalizer()) == log_normalizer, "remembered with the row"


@pytest.mark.parametrize("n_logits", [N_VOCAB - 20, N_VOCAB, N_VOCAB + 84])
async def test_rows_are_as_wide_as_the_vocabulary_whatever_the_engine_gives(n_logits: int) -> None:
    """Padded logits are dropped before normalising; ids without a logit have no probability and are never drawn."""
    engine = FakeEngine(n_logits)
    async with fake_language_model(engine, N_VOCAB) as llm:
        row = await llm.next_token_logprobs([1])
        n = min(n_logits, N_VOCAB)
        assert row.shape == (N_VOCAB,) and (row[n:] == -math.inf).all()
        assert torch.allclose(row[:n], engine.row([1])[:n].log_softmax(-1), atol=1e-6)
        draws = await asyncio.gather(*(llm.query([1], Draw(key, 50.0)) for key in range(200)))
        assert max(drawn.token_id for drawn in draws) < n
