"""On the real model: modes against the enumeration of its own first steps, streaming, and the cost of many phrases."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter

import pytest
import torch

from genlm_backend import load_model_by_name
from genlm_backend.backtracking import Overlay, Prompt, Step, phrases, walk
from tests.backtracking.toy import BannedTokens, bound, total_variation

K, LENGTH, N = 3, 3, 400
TEXT = "Montreal is"


@pytest.fixture(scope="module")
def llm(smollm2_path):
    torch.set_num_threads(1)
    model = load_model_by_name("smollm2", llm_opts={"device": "cpu"})
    yield model
    model.close()


async def enumerated(llm, prompt):
    """The texts of the model's `K` best tokens at each step, and their probabilities."""
    law = {(): 1.0}
    for _ in range(LENGTH):
        rows = await asyncio.gather(*(llm.next_token_logprobs([*prompt, *text]) for text in law))
        longer = {}
        for (text, p), row in zip(law.items(), rows, strict=True):
            best = row.topk(K)
            for token_id, q in zip(best.indices.tolist(), best.values.softmax(0).tolist(), strict=True):
                longer[(*text, token_id)] = p * q
        law = longer
    return law


@pytest.mark.model
async def test_exact_is_the_conditional_on_the_first_steps(llm):
    """False alarms: 1e-9. What masks the last token of a phrase must fail the same check."""
    prompt = llm.encode(TEXT)
    law = await enumerated(llm, prompt)
    pairs = Counter()
    for text, p in law.items():
        for pair in itertools.pairwise(text):
            pairs[pair] += p
    banned = [pair for pair, _ in pairs.most_common(3)]
    allowed = {t: p for t, p in law.items() if not any(pair in banned for pair in itertools.pairwise(t))}
    total = sum(allowed.values())
    conditional = {t: p / total for t, p in allowed.items()}
    assert total < 0.9, "the ban matters"

    async def sample(mode, **options):
        walks = [
            walk(
                llm, prompt, BannedTokens(banned), mode=mode, top_k=K, max_new_tokens=LENGTH, eos=(), seed=i, **options
            )
            for i in range(N)
        ]
        return Counter(tuple(o.token_ids) for o in [await each for each in walks])

    overlay = Overlay()
    counts = await sample("exact", overlay=overlay)
    assert total_variation(counts, conditional) < bound(conditional, N)
    assert overlay.alive == pytest.approx(total, abs=1e-3)
    assert total_variation(await sample("mask"), conditional) > bound(conditional, N)


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
    started = time.process_time()
    for token_id in ids:
        state, _ = ban.step(state, Step(token_id, llm.byte_vocab[token_id].byte_string, (), -1.0, -1.0))
        n += 1
    assert (time.process_time() - started) / n < 200e-6
