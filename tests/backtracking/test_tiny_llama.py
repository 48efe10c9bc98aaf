"""On a small random transformers model: the ways in, coroutines side by side, and calls inside a running event loop."""

from __future__ import annotations

import asyncio

import pytest
import torch

from genlm_backend.backtracking import (
    AntiSlopStrategy,
    BacktrackSampler,
    ChatPipeline,
    GenerationSession,
    Generator,
    ProbabilityThreshold,
    TransformersProvider,
    guide,
    load_parser,
    phrases,
    walk,
)
from genlm_backend.llm import AsyncTransformer

pytestmark = pytest.mark.thorough

TEXT = "the river is"


@pytest.fixture
def ids(tiny_tokenizer_512):
    return tiny_tokenizer_512.encode(TEXT)


def logits_of(model, ids):
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0, -1]


def test_a_loaded_model_is_a_provider(tiny_llama, tiny_tokenizer_512, ids):
    provider = TransformersProvider(tiny_llama, tiny_tokenizer_512, torch.device("cpu"))
    assert provider.encode(TEXT, add_special_tokens=False) == ids and provider.decode(ids) == TEXT
    assert provider.get_eos_token_id() == tiny_tokenizer_512.eos_token_id
    row = provider.generate(ids)
    assert row.shape == (1, 512)
    assert torch.allclose(row[0], logits_of(tiny_llama, ids).log_softmax(-1), atol=1e-5)
    sampler = BacktrackSampler(provider, AntiSlopStrategy(provider, list("aeiou")))
    text = provider.decode(list(sampler.generate(TEXT, max_new_tokens=20, seed=0)))
    assert text and not any(word in "aeiou" for word in text.lower().split())
    best = BacktrackSampler(provider, AntiSlopStrategy(provider, "zzz")).generate(TEXT, max_new_tokens=1, temperature=0)
    assert list(best) == [int(logits_of(tiny_llama, ids).argmax())]
    provider.llm.close()


def test_a_loaded_model_and_its_tokenizer_make_a_generator(tiny_llama, tiny_tokenizer_512):
    generator = Generator(tiny_llama, tiny_tokenizer_512)
    assert generator.tokenizer is tiny_tokenizer_512 and generator.model is tiny_llama
    greedy = generator.generate(TEXT, max_new_tokens=5, temperature=0, eos=())
    ids = tiny_tokenizer_512.encode(TEXT)
    n_prompt = len(ids)
    for _ in range(5):  # the same by plain forward passes
        ids.append(int(logits_of(tiny_llama, ids).argmax()))
    assert greedy == tiny_tokenizer_512.decode(ids[n_prompt:])
    generator.llm.close()


def test_a_session_from_a_loaded_model(tiny_llama, tiny_tokenizer_512, ids):
    session = GenerationSession(
        tiny_llama, tiny_tokenizer_512, TEXT, ProbabilityThreshold(0.999), max_new_tokens=3, top_k=7, seed=1
    )
    assert session.prompt_length == len(ids)
    result = session.step()
    expected = logits_of(tiny_llama, ids).topk(7).values.softmax(-1)
    assert torch.allclose(result.probabilities, expected, atol=1e-5)
    assert result.backtrack_count == 1 and session.token_ids.tolist() == [[*ids, result.token_id]]
    session.backtrack(1)
    assert session.token_ids.tolist() == [ids]
    session.llm.close()


async def test_gathered_walks_of_a_model_are_those_one_after_another(tiny_llama, tiny_tokenizer_512):
    """In float32, where rows of a batch differ from those alone by rounding: far less than between two draws."""
    ban = phrases([*"aeiou", "the", " is"], words=False)
    async with AsyncTransformer(tiny_llama, tiny_tokenizer_512) as llm:

        def make(seed):
            return walk(llm, TEXT, ban, max_new_tokens=10, seed=seed, top_k=50).finish()

        together = await asyncio.gather(*(make(seed) for seed in range(12)))
        llm.clear_cache()
        alone = [await make(seed) for seed in range(12)]
    assert [o.token_ids for o in together] == [o.token_ids for o in alone]
    assert sum(o.n_undos for o in together) > 12 and len({tuple(o.token_ids) for o in together}) == 12


async def test_synchronous_functions_work_inside_a_running_loop(tiny_llama, tiny_tokenizer_512):
    llm = AsyncTransformer(tiny_llama, tiny_tokenizer_512)
    session = GenerationSession(llm, None, TEXT, seed=3)
    assert [session.step().token_id for _ in range(2)] == session.token_ids[0, -2:].tolist()

    chatty = Generator(llm)
    template = tiny_tokenizer_512.chat_template
    tiny_tokenizer_512.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    try:
        answer, history = ChatPipeline(chatty).run_turn("the fox", [], max_new_tokens=3, seed=1)
    finally:
        tiny_tokenizer_512.chat_template = template
    assert history == [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": answer}]

    parser = load_parser('start: "a" ("b" | "c")')
    guided = guide(llm, parser, TEXT, max_new_tokens=3, seed=0)
    assert parser.is_valid(guided.response) == guided.valid and guided.response.startswith("a")
    await asyncio.sleep(0)  # and the loop is as it was
    llm.close()
