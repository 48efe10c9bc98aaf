"""On the real model: modes against the enumeration of its own first steps, streaming, and the cost of many phrases."""

from __future__ import annotations

import asyncio
import gc
import itertools
import time
from collections import Counter

import pytest
import torch

from genlm_backend import load_model_by_name
from genlm_backend.backtracking import Overlay, Prompt, Step, phrases, walk
from tests.backtracking.toy import Tree, bound, total_variation

K, LENGTH, N, N_LAW = 3, 3, 400, 2500
# Total variation to q given C of the law of each mode, as documented in docs/backtracking/modes.md.
DOCUMENTED = {"exact": 0.0, "local": 0.213, "first": 0.181, "mask": 0.452, "none": 0.143}
TEXT = "Montreal is"


@pytest.fixture(scope="module")
def llm(smollm2_path):
    torch.set_num_threads(1)
    options = {"device": "cpu", "hf_opts": {"dtype": torch.float32}}  # the figures are those of every machine
    model = load_model_by_name("smollm2", backend="hf", llm_opts=options)
    yield model
    model.close()


async def enumerated(llm, prompt):
    """The model's `K` best tokens at each step of a text, and their probabilities; some likely pairs are banned."""
    nexts, texts = {}, {(): 1.0}
    for _ in range(LENGTH):
        rows = await asyncio.gather(*(llm.next_token_logprobs([*prompt, *text]) for text in texts))
        for text, row in zip(texts, rows, strict=True):
            best = row.topk(K)
            nexts[text] = dict(zip(best.indices.tolist(), best.values.double().softmax(0).tolist(), strict=True))
        texts = {(*text, v): p * q for text, p in texts.items() for v, q in nexts[text].items()}
    first, later = Counter(), Counter()
    for text, p in texts.items():
        first[text[:2]] += p
        for pair in itertools.pairwise(text[1:]):
            later[pair] += p
    return Tree(nexts, LENGTH, [pair for pair, _ in [*later.most_common(3), *first.most_common(1)]])


async def sampled(llm, prompt, tree, mode, n, **options):
    """Texts of n walks, some at a time."""
    counts = Counter()
    options = {"mode": mode, "top_k": K, "max_new_tokens": LENGTH, "eos": ()} | options
    for begin in range(0, n, 100):
        walks = [walk(llm, prompt, tree.rule(), seed=i, **options).finish() for i in range(begin, min(n, begin + 100))]
        counts.update([tuple(outcome.token_ids) for outcome in await asyncio.gather(*walks)])
    return counts


@pytest.mark.model
async def test_exact_is_the_conditional_on_the_first_steps(llm):
    """False alarms: 1e-9. What masks the last token of a phrase must fail the same check."""
    prompt = llm.encode(TEXT)
    tree = await enumerated(llm, prompt)
    conditional = tree.conditional()
    laws = tree.laws()
    assert {mode: total_variation(law, conditional) for mode, law in laws.items()} == pytest.approx(
        DOCUMENTED, abs=2e-3
    )
    assert tree.evidence() == pytest.approx(0.320, abs=2e-3)
    overlay = Overlay()
    counts = await sampled(llm, prompt, tree, "exact", N, overlay=overlay)
    assert total_variation(counts, conditional) < bound(conditional, N)
    assert overlay.alive == pytest.approx(tree.evidence(), abs=1e-3)
    assert total_variation(await sampled(llm, prompt, tree, "mask", N), conditional) > bound(conditional, N)


@pytest.mark.model
@pytest.mark.parametrize("mode", ["local", "first", "mask", "none"])
async def test_every_other_mode_samples_from_its_law_on_the_first_steps(llm, mode):
    """False alarms: 1e-9. The mutants are the laws of the modes that are twice the bound away, or more."""
    prompt = llm.encode(TEXT)
    tree = await enumerated(llm, prompt)
    laws = tree.laws()
    assert all(sum(law.values()) == pytest.approx(1) for law in laws.values())
    counts = await sampled(llm, prompt, tree, mode, N_LAW)
    limit = bound(laws[mode], N_LAW)
    assert total_variation(counts, laws[mode]) < limit
    others = [law for other, law in laws.items() if total_variation(law, laws[mode]) > 2 * limit]
    assert others, {other: round(total_variation(law, laws[mode]), 3) for other, law in laws.items()}
    assert all(total_variation(counts, law) > limit for law in others)


@pytest.mark.model
async def test_a_stream_never_takes_anything_back(llm):
    ban = phrases(["the", "a", "and"])
    walking = walk(llm, TEXT, ban, max_new_tokens=20, seed=1)
    written = ""
    async for piece in walking.text():
        written += piece
    outcome = walking.outcome()
    assert written == outcome.text and outcome.n_undos > 0
    assert not {"the", "a", "and"} & set(outcome.text.lower().split())


@pytest.mark.model
def test_a_thousand_phrases_cost_little_per_token(llm):
    """The figure is below 50 microseconds on an idle core; the bound here leaves room for a busy machine."""
    words = [llm.str_vocab[i] for i in range(1000, 3000) if llm.str_vocab[i].strip().isalpha()]
    ban = phrases([f"{a.strip()} {b.strip()}" for a, b in itertools.pairwise(words[:1001])])
    ids = llm.encode(TEXT + " a city, and the river is wide where the city is. " * 40)
    state, n = ban.init(Prompt((), llm.byte_vocab)), 0
    gc.collect()
    gc.disable()  # a collection would be of what all tests before left
    try:
        started = time.thread_time()
        for token_id in ids:
            state, _ = ban.step(state, Step(token_id, llm.byte_vocab[token_id].byte_string, (), -1.0, -1.0))
            n += 1
        seconds = time.thread_time() - started
    finally:
        gc.enable()
    assert seconds / n < 500e-6
