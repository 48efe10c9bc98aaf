"""Width, type and normalisation of rows; which models are refused."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, T5Config, T5ForConditionalGeneration

from genlm_backend.errors import ContextTooLong, EmptyPrompt, TokenIdError, UnsupportedModel
from genlm_backend.llm import AsyncTransformer
from genlm_backend.llm.hf.self_test import HALF_PRECISION_TV, difference
from genlm_backend.llm.queries import LogNormalizer
from tests import architectures, tiny_tokenizer
from tests.llm.hf.walks import TINY_NATS, contexts_of, fresh, plain_logits, plain_row, random_ids, small

PROMPT = random_ids(random.Random(3), 15)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "qwen3_moe"])
async def test_half_precision_rows_are_normalised_in_float32(name: str, wrap: Callable[..., AsyncTransformer]) -> None:
    """Normalised in bfloat16, a log-probability of -10 is rounded to 0.03 nats and rows do not sum to 1."""
    model = small(name, torch.bfloat16)
    llm = wrap(model)
    for n in (1, 7, 15):
        row = await llm.next_token_logprobs(PROMPT[:n])
        assert row.dtype == torch.float32
        assert abs(float(row.double().exp().sum()) - 1) < 1e-6
        apart = difference(row[None], plain_row(model, PROMPT[:n])[None])
        # A near tie of a router may go either way; in float32 `test_packed` compares its rows.
        assert apart.total_variation <= (HALF_PRECISION_TV if name == "qwen3_moe" else 2e-2)
    assert llm.path == "packed"


async def test_logprob_and_normaliser_give_the_models_logit(wrap: Callable[..., AsyncTransformer]) -> None:
    llm = wrap(small("llama"))
    row = await llm.next_token_logprobs(PROMPT)
    logits = plain_logits(small("llama"), contexts_of(PROMPT))[0]
    assert (row + await llm.query(PROMPT, LogNormalizer()) - logits).abs().max() <= TINY_NATS


async def test_logits_beyond_the_tokenizer_are_dropped_before_normalising(
    wrap: Callable[..., AsyncTransformer],
) -> None:
    llm = wrap(fresh("llama"), tiny_tokenizer.build_tokenizer(400))
    row = await llm.next_token_logprobs(PROMPT)
    want = plain_logits(small("llama"), contexts_of(PROMPT))[:, :400]
    assert row.shape == (400,) == (len(llm.byte_vocab),)
    assert difference(row[None], want).nats <= TINY_NATS
    assert abs(float(row.exp().sum()) - 1) < 1e-5
    uncached = await llm.next_token_logprobs_uncached(PROMPT)
    assert (uncached - row).abs().max() <= TINY_NATS


async def test_tokens_without_a_logit_have_no_probability_and_cannot_be_asked(
    wrap: Callable[..., AsyncTransformer],
) -> None:
    llm = wrap(fresh("llama", vocab_size=450))
    row = await llm.next_token_logprobs([5, 6, 7])
    assert row.shape == (512,)
    assert (row[450:] == -math.inf).all() and row[:450].isfinite().all()
    assert abs(float(row.exp().sum()) - 1) < 1e-5
    with pytest.raises(TokenIdError, match="450"):
        await llm.next_token_logprobs([5, 450])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
async def test_a_prompt_at_the_context_length_is_refused_and_harms_nobody(
    name: str, wrap: Callable[..., AsyncTransformer]
) -> None:
    llm = wrap(small(name))
    ids = random_ids(random.Random(0), architectures.CONTEXT_LENGTH + 1)
    row = await llm.next_token_logprobs(ids[:-2])
    assert difference(row[None], plain_row(small(name), ids[:-2])[None]).nats <= TINY_NATS
    for n in (architectures.CONTEXT_LENGTH, architectures.CONTEXT_LENGTH + 1):
        with pytest.raises(ContextTooLong):
            await llm.next_token_logprobs(ids[:n])
        with pytest.raises(ContextTooLong):
            llm.cache_kv(ids[:n])
        with pytest.raises(ContextTooLong):
            await llm.next_token_logprobs_uncached(ids[:n])


async def test_what_is_no_token_is_refused_before_it_reaches_the_model(wrap: Callable[..., AsyncTransformer]) -> None:
    llm = wrap(small("llama"))
    bads: list[list[Any]] = [[512], [-1], [3, 10**12], [True], [1.0], ["a"], [None], [[1]]]
    for bad in bads:
        for ask in (llm.next_token_logprobs, llm.next_token_logprobs_uncached):
            with pytest.raises(TokenIdError):
                await ask(bad)
            with pytest.raises(EmptyPrompt):
                await ask([])
        with pytest.raises(TokenIdError):
            llm.cache_kv(bad)
    assert llm.statistics().batches == 0


async def test_arrays_and_tensors_are_token_ids_too(wrap: Callable[..., AsyncTransformer]) -> None:
    llm = wrap(small("llama"))
    rows = [
        await llm.next_token_logprobs(ids)
        for ids in (PROMPT, tuple(PROMPT), np.array(PROMPT), torch.tensor(PROMPT), np.array(PROMPT, np.int16))
    ]
    assert all(torch.equal(row, rows[0]) for row in rows)
    assert llm.statistics().row_hits == 4


async def test_a_list_changed_after_the_call_is_asked_as_it_was(wrap: Callable[..., AsyncTransformer]) -> None:
    llm = wrap(small("llama"))
    ids = list(PROMPT)
    asked = llm.next_token_logprobs(ids)
    ids[-1] = 9
    assert difference((await asked)[None], plain_row(small("llama"), PROMPT)[None]).nats <= TINY_NATS
    assert (
        difference((await llm.next_token_logprobs(ids))[None], plain_row(small("llama"), ids)[None]).nats <= TINY_NATS
    )


async def test_equal_prompts_get_different_samples_and_temperature_0_is_greedy(
    wrap: Callable[..., AsyncTransformer],
) -> None:
    llm = wrap(small("llama"))
    samples = await llm.batch_sample([PROMPT] * 4, 8, [], seed=3)
    assert len({tuple(sample) for sample in samples}) == 4
    assert samples == await llm.batch_sample([PROMPT] * 4, 8, (), seed=3)
    ids = torch.tensor([PROMPT])
    greedy = await llm.sample(PROMPT, 8, [], temperature=0)
    want = small("llama").generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=-1
    )
    assert greedy == want[0, len(PROMPT) :].tolist()


def test_an_encoder_decoder_is_refused_by_name(wrap: Callable[..., AsyncTransformer]) -> None:
    config = T5Config(vocab_size=512, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    with pytest.raises(UnsupportedModel, match="T5ForConditionalGeneration is an encoder-decoder"):
        wrap(T5ForConditionalGeneration(config))


def test_a_model_without_a_head_is_refused_by_name(wrap: Callable[..., AsyncTransformer]) -> None:
    with pytest.raises(
        UnsupportedModel, match="LlamaModel has no language-model head; load it with AutoModelForCausalLM"
    ):
        wrap(AutoModel.from_config(small("llama").config))


def test_a_model_without_weights_is_refused_by_name(wrap: Callable[..., AsyncTransformer]) -> None:
    with torch.device("meta"):
        model = type(small("llama"))(small("llama").config)
    with pytest.raises(UnsupportedModel, match="lies on meta"):
        wrap(model)


def test_a_model_on_several_devices_is_refused_by_name(wrap: Callable[..., AsyncTransformer]) -> None:
    model = fresh("llama")
    model.model.layers[2].to("meta")
    with pytest.raises(UnsupportedModel, match="lies on cpu and meta; load it on one device"):
        wrap(model)
