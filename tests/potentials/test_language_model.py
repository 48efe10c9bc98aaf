"""A language model as a potential, against its own rows."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from genlm_backend.errors import InvalidPotential
from genlm_backend.llm import AsyncLM, MockAsyncLM, load_model_by_name
from genlm_backend.potentials import Grammar, LanguageModel, Product
from genlm_backend.sampling import with_temperature
from genlm_backend.testing import FakeEngine, check_idle, check_potential, fake_language_model

PROMPT = [3, 1, 4]
SEQUENCES = [[5, 9, 2], [6], [5, 2, 7], [2], []]


def model() -> AsyncLM:
    return fake_language_model(FakeEngine(n_logits=12), n_vocab=12)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0, 0.0])
@pytest.mark.parametrize("ends", [[2], [2, 7], []], ids=str)
async def test_the_laws_hold(temperature: float, ends: list[int]) -> None:
    async with model() as llm:
        potential = LanguageModel(llm, PROMPT, temperature=temperature, eos_token_ids=ends)
        await check_potential(potential, SEQUENCES)
        begun = [5] if temperature else []  # greedy texts begin otherwise
        row = await potential.logw_next(potential.state_of(begun))
        assert float(row.logsumexp(0)) == pytest.approx(0, abs=1e-5), "normalised"
        plain = with_temperature(await llm.next_token_logprobs([*PROMPT, *begun]), temperature)
        assert row[ends].isneginf().all()
        if ends:
            assert float(row[-1]) == pytest.approx(float(plain[ends].logsumexp(0)), abs=1e-5)
        check_idle(llm)


async def test_the_whole_weight_is_that_of_the_model() -> None:
    async with model() as llm:
        potential = LanguageModel(llm, PROMPT, eos_token_ids=[2])
        complete = await potential.complete(potential.state_of([5, 9]))
        assert complete == pytest.approx(await llm.sequence_logprob(PROMPT, [5, 9, 2]), abs=1e-5)
        assert await potential.complete(potential.state_of([5, 2])) == -math.inf


async def test_greedy_is_one_token() -> None:
    async with model() as llm:
        row = await LanguageModel(llm, PROMPT, temperature=0, eos_token_ids=[]).logw_next(())
        assert row.isfinite().sum() == 1 and row.max() == 0


async def test_what_is_not_greedy_stays_dead() -> None:
    async with model() as llm:
        potential = LanguageModel(llm, PROMPT, temperature=0, eos_token_ids=[2])
        text: list[int] = []
        while len(text) < 5 and (best := int((await potential.logw_next(potential.state_of(text))).argmax())) < 12:
            text.append(best)
        assert len(text) > 2
        sequences = [text, [(text[0] + 1) % 12, *text], [*text[:2], (text[2] + 1) % 12, 5]]
        await check_potential(potential, sequences)
        again = LanguageModel(llm, PROMPT, temperature=0, eos_token_ids=[2])
        states = [again.state_of(text), again.state_of(sequences[1]), again.state_of(sequences[2]), again.start()]
        assert await again.batch_prefix(states) == [0.0, -math.inf, -math.inf, 0.0]


async def test_a_population_is_one_forward() -> None:
    engine = FakeEngine(n_logits=12)
    async with fake_language_model(engine, n_vocab=12) as llm:
        potential = LanguageModel(llm, PROMPT, eos_token_ids=[2])
        await potential.batch_logw_next([potential.state_of([i]) for i in range(3, 9)])
        assert [len(batch) for batch in engine.batches] == [6]


async def test_a_prompt_is_text_or_ids(tiny_tokenizer_512: PreTrainedTokenizerFast) -> None:
    async with MockAsyncLM(tiny_tokenizer_512) as llm:
        text, ids = LanguageModel(llm, "the river"), LanguageModel(llm, llm.tokenizer.encode("the river"))
        assert text.prompt_ids == ids.prompt_ids and text.context((1, 2)) == (*ids.prompt_ids, 1, 2)
        assert text.eos_token_ids == {llm.tokenizer.eos_token_id}
        with pytest.raises(InvalidPotential, match="without a token"):
            LanguageModel(llm, [])
        with pytest.raises(InvalidPotential, match="temperature"):
            LanguageModel(llm, "a", temperature=-1)
        with pytest.raises(InvalidPotential, match="600"):
            LanguageModel(llm, "a", eos_token_ids=[600])


@pytest.mark.model
async def test_the_real_model_under_a_schema_keeps_the_laws(smollm2_path: Path) -> None:
    async with load_model_by_name(str(smollm2_path), "hf") as llm:
        schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
        product = Product(LanguageModel(llm, "A city as JSON:"), Grammar.json_schema(llm, schema))
        sequence = llm.tokenizer.encode('{"city": "Montreal"}')
        await check_potential(product, [sequence[:3]], symbols=[107, 5000], tolerance=2e-3)
        row = await product.logw_next(product.state_of(sequence))
        assert torch.isfinite(row[product.end]), "it may end here"
