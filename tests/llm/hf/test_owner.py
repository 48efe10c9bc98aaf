"""A wrapped model stays its owner's: settings, weights, `generate` and random state; wrappers share one engine."""

from __future__ import annotations

import asyncio
import copy
import gc
import random
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from genlm_backend.errors import ModelClosed
from genlm_backend.llm import AsyncTransformer
from genlm_backend.llm.hf.self_test import difference
from tests import architectures, tiny_tokenizer
from tests.llm.hf.walks import DYNAMIC_ROPE, LONGROPE, TINY_NATS, fresh, plain_row, random_ids, small

pytestmark = pytest.mark.thorough

PROMPT = random_ids(random.Random(5), 10)


def settings(model: Any) -> dict[str, Any]:
    """Everything of a model that its owner could notice."""
    return {
        "config": model.config.to_dict(),
        "generation": model.generation_config.to_dict(),
        "attention": [getattr(m.config, "_attn_implementation", None) for m in model.modules() if hasattr(m, "config")],
        "training": [module.training for module in model.modules()],
        "modules": [id(module) for module in model.modules()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "tensors": [(name, id(t), t.data_ptr(), t.requires_grad) for name, t in model.named_parameters()],
        "buffers": [(name, id(t), t.data_ptr()) for name, t in model.named_buffers()],
    }


def generated(model: Any) -> list[int]:
    ids = torch.tensor([PROMPT])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0)
    return [int(token) for token in out[0]]


@pytest.mark.parametrize(
    ("name", "changes"),
    [("llama", {}), ("mistral", {}), ("gpt2", {}), ("gemma3_text", {}), ("llama", DYNAMIC_ROPE), ("phi3", LONGROPE)],
    ids=["llama", "mistral", "gpt2", "gemma3", "dynamic", "longrope"],
)
def test_a_model_is_the_same_before_during_and_after(
    name: str, changes: dict[str, Any], wrap: Callable[..., AsyncTransformer]
) -> None:
    model = fresh(name, **changes)
    want = generated(model)
    before = settings(model)
    weights = copy.deepcopy(model.state_dict())
    llm = wrap(model)
    assert llm.model is model
    assert settings(model) == before
    during: list[list[int]] = []
    stop = threading.Event()

    def generate_all_the_time() -> None:
        while not stop.is_set() or not during:
            during.append(generated(model))

    async def ask() -> None:
        rng = random.Random(0)
        for _ in range(20):
            batch = [random_ids(rng, rng.choice([5, 20, 50])) for _ in range(5)]
            rows = await asyncio.gather(*(llm.next_token_logprobs(ids) for ids in batch))
            for ids, row in zip(batch[:1], rows, strict=False):
                assert difference(row[None], (await llm.next_token_logprobs_uncached(ids))[None]).nats <= TINY_NATS

    thread = threading.Thread(target=generate_all_the_time)
    thread.start()
    asyncio.run(ask())
    stop.set()
    thread.join()
    assert all(got == want for got in during) and during
    llm.close()
    assert generated(model) == want
    assert {k: v for k, v in settings(model).items() if k != "buffers"} == {
        k: v for k, v in before.items() if k != "buffers"
    }
    if not changes:  # a rotary embedding that adapts replaces its own buffer when its owner generates
        assert settings(model) == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "changes"), [("llama", DYNAMIC_ROPE), ("phi3", LONGROPE)], ids=["dynamic", "longrope"]
)
async def test_serving_writes_into_no_tensor_of_the_owner(
    name: str, changes: dict[str, Any], wrap: Callable[..., AsyncTransformer]
) -> None:
    """Transformers 5.23 updates longrope's frequencies in place, perhaps amid a call of the owner."""
    model = fresh(name, **changes)
    tensors = [*model.parameters(), *model.buffers()]
    versions = [tensor._version for tensor in tensors]
    llm = wrap(model)
    rng = random.Random(0)
    for length in (5, 50, 10):
        await llm.next_token_logprobs(random_ids(rng, length))
        await llm.next_token_logprobs_uncached(random_ids(rng, length))
    assert [tensor._version for tensor in tensors] == versions


async def test_a_model_in_training_is_served_in_evaluation_mode_and_stays_in_training(
    wrap: Callable[..., AsyncTransformer],
) -> None:
    model = fresh("gpt2", resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)
    want = plain_row(model, PROMPT)
    model.train()
    model.transformer.h[1].eval()  # some of it frozen
    before = settings(model)
    llm = wrap(model)
    assert llm.path == "packed"
    for row in (await llm.next_token_logprobs(PROMPT), await llm.next_token_logprobs_uncached(PROMPT)):
        assert difference(row[None], want[None]).nats <= TINY_NATS
    assert settings(model) == before


async def test_weights_are_shared_not_copied(wrap: Callable[..., AsyncTransformer]) -> None:
    model = fresh("llama")
    llm = wrap(model)
    engine: Any = llm._service.engine
    owned = {tensor.data_ptr() for tensor in model.parameters()}
    for served in (engine.model, llm._loaded.oracle.model):
        assert {tensor.data_ptr() for tensor in served.parameters()} == owned
    first = await llm.next_token_logprobs(PROMPT)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    llm.clear_cache()
    assert not torch.allclose(first, await llm.next_token_logprobs(PROMPT))
    assert difference((await llm.next_token_logprobs(PROMPT))[None], plain_row(model, PROMPT)[None]).nats <= TINY_NATS


@pytest.mark.filterwarnings("ignore::genlm_backend.errors.SlowPathWarning")
@pytest.mark.parametrize("is_packed", [True, False])
async def test_a_model_that_got_another_dtype_is_served_after_a_clear(
    wrap: Callable[..., AsyncTransformer], is_packed: bool
) -> None:
    model = fresh("llama") if is_packed else fresh("bloom")
    llm = wrap(model)
    assert llm.path == ("packed" if is_packed else "cached")
    await llm.next_token_logprobs(PROMPT)
    for dtype in (torch.float64, torch.float32):
        model.to(dtype)
        llm.clear_cache()
        row = await llm.next_token_logprobs(PROMPT)
        assert difference(row[None], plain_row(model, PROMPT)[None].float()).nats <= TINY_NATS
        keys, values = llm._service.engine.kv.pool._layers[0]  # type: ignore[attr-defined]
        assert keys.dtype == values.dtype == dtype


async def test_gradients_still_reach_a_wrapped_model(wrap: Callable[..., AsyncTransformer]) -> None:
    model = fresh("llama")
    llm = wrap(model)
    await llm.next_token_logprobs(PROMPT)
    model(torch.tensor([PROMPT])).logits.sum().backward()
    assert all(tensor.grad is not None for tensor in model.parameters())
    await llm.next_token_logprobs(PROMPT[:4])


async def test_loading_and_asking_leave_global_random_states_alone(wrap: Callable[..., AsyncTransformer]) -> None:
    model = fresh("llama")
    torch.manual_seed(123)
    state = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()  # noqa: NPY002
    llm = wrap(model)
    await llm.next_token_logprobs(PROMPT)
    await llm.batch_sample([PROMPT, PROMPT], 3, [], seed=4)
    await llm.sample(PROMPT, 3, [])
    assert torch.equal(torch.random.get_rng_state(), state[0])
    assert (random.getstate(), np.random.get_state()[1].tobytes()) == state[1:]  # noqa: NPY002


async def test_wrapping_twice_shares_one_engine_and_its_batches(wrap: Callable[..., AsyncTransformer]) -> None:
    model = fresh("llama")
    first, second = wrap(model), wrap(model)
    await asyncio.gather(first.next_token_logprobs(PROMPT), second.next_token_logprobs(PROMPT + [4]))
    assert first.statistics() == second.statistics()
    assert first.statistics()[:4] == (2, 1, 1, 11)
    await second.next_token_logprobs(PROMPT)
    assert second.statistics().row_hits == 1


async def test_closing_one_wrapper_leaves_the_other_alive(wrap: Callable[..., AsyncTransformer]) -> None:
    model = fresh("llama")
    first, second = wrap(model), wrap(model)
    await first.aclose()
    await first.aclose()
    with pytest.raises(ModelClosed):
        await first.next_token_logprobs(PROMPT)
    with pytest.raises(ModelClosed):
        await first.next_token_logprobs_uncached(PROMPT)
    row = await second.next_token_logprobs(PROMPT)
    assert difference(row[None], plain_row(model, PROMPT)[None]).nats <= TINY_NATS
    await second.aclose()
    with pytest.raises(ModelClosed):
        await second.next_token_logprobs(PROMPT)


async def test_closed_and_wrapped_again_works(wrap: Callable[..., AsyncTransformer]) -> None:
    model = fresh("llama")
    for kv_cache_bytes in (10**6, 10**5):
        async with wrap(model, kv_cache_bytes=kv_cache_bytes) as llm:
            row = await llm.next_token_logprobs(PROMPT)
            assert difference(row[None], plain_row(model, PROMPT)[None]).nats <= TINY_NATS


@pytest.mark.parametrize("option", ["batch_size", "kv_cache_bytes", "row_memo_bytes"])
def test_conflicting_options_are_refused(option: str, wrap: Callable[..., AsyncTransformer]) -> None:
    model = fresh("llama")
    wrap(model, **{option: 1000})
    wrap(model, **{option: 1000})
    wrap(model)
    with pytest.raises(ValueError, match=f"{option}=1000.*{option}=2000"):
        wrap(model, **{option: 2000})


def test_a_tokenizer_with_another_number_of_tokens_is_refused(wrap: Callable[..., AsyncTransformer]) -> None:
    """The engine's rows have one width."""
    model = fresh("llama")
    wrap(model)
    with pytest.raises(ValueError, match=r"n_vocab=512.*n_vocab=400"):
        wrap(model, tiny_tokenizer.build_tokenizer(400))


def test_a_batch_size_of_zero_is_refused(wrap: Callable[..., AsyncTransformer]) -> None:
    with pytest.raises(ValueError, match="batch_size is 0"):
        wrap(fresh("llama"), batch_size=0)


def test_a_forgotten_wrapper_frees_model_and_engine(tiny_tokenizer_512: Any) -> None:
    model = fresh("llama")
    llm = AsyncTransformer(model, tiny_tokenizer_512)
    llm.next_token_logprobs_sync(PROMPT)
    alive = [weakref.ref(model), weakref.ref(llm), weakref.ref(llm._service.engine)]
    del model, llm
    gc.collect()
    assert [ref() for ref in alive] == [None] * 3


async def test_rows_come_in_the_order_of_the_questions_whatever_the_batch(
    wrap: Callable[..., AsyncTransformer],
) -> None:
    llm = wrap(small("qwen3"), batch_size=3)
    rng = random.Random(9)
    batch = [random_ids(rng, rng.randrange(1, 30)) for _ in range(11)]
    rows = await llm.batch_next_token_logprobs(batch)
    assert llm.statistics().batches == 4
    for ids, row in zip(batch, rows, strict=True):
        assert difference(row[None], plain_row(small("qwen3"), ids)[None]).nats <= TINY_NATS
    assert (await llm.batch_next_token_logprobs([])).shape == (0, architectures.VOCAB_SIZE)


def test_eight_threads_with_a_loop_each_get_plain_rows(wrap: Callable[..., AsyncTransformer]) -> None:
    model = small("mistral")
    llm = wrap(model, kv_cache_bytes=30_000)
    rng = random.Random(2)
    pool = [random_ids(rng, 20) for _ in range(4)]
    pool += [ids[: rng.randrange(3, 20)] + random_ids(rng, 2) for ids in pool for _ in range(5)]
    want = {tuple(ids): plain_row(model, ids) for ids in pool}
    worst: list[float] = []

    def work(seed: int) -> None:
        own = random.Random(seed)

        async def main() -> None:
            for _ in range(5):
                asked = [own.choice(pool) for _ in range(6)]
                rows = await asyncio.gather(*(llm.next_token_logprobs(ids) for ids in asked))
                for ids, row in zip(asked, rows, strict=True):
                    worst.append(difference(row[None], want[tuple(ids)][None]).nats)
                if own.random() < 0.2:
                    llm.clear_cache()

        asyncio.run(main())

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(worst) == 8 * 5 * 6
    assert max(worst) <= TINY_NATS
