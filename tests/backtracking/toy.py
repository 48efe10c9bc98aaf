"""A language of 4 tokens and texts of 4, enumerated: what each mode of a walk has to sample from."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch

from genlm_backend.backtracking import Keep, Rule, Undo, walk
from genlm_backend.llm.base import AsyncLM
from genlm_backend.llm.service import Context, Engine
from genlm_backend.testing import fake_language_model

N_TOKENS, LENGTH = 4, 4
PROMPT = [0]
# Order-1 chain: row = what was before (token 0 is the prompt too), column = what comes.
CHAIN = np.array(
    [
        [0.10, 0.45, 0.25, 0.20],
        [0.15, 0.10, 0.60, 0.15],
        [0.30, 0.25, 0.15, 0.30],
        [0.25, 0.30, 0.35, 0.10],
    ]
)
BANNED = ((1, 2, 0), (3, 2))

Text = tuple[int, ...]


class ChainEngine(Engine):
    """Logits of a Markov chain."""

    def __init__(self, chain: np.ndarray) -> None:
        self.logits = torch.from_numpy(np.log(chain)).float()

    def evaluate(self, contexts: Sequence[Context]) -> torch.Tensor:
        return torch.stack([self.logits[context.token_ids[-1]] for context in contexts])


def model(chain: np.ndarray = CHAIN) -> AsyncLM:
    return fake_language_model(ChainEngine(chain), len(chain))


class BannedTokens(Rule[None]):
    """Phrases as token ids, taken back to their start. State-free: it looks at the path."""

    def __init__(self, phrases: Sequence[Text], keep: float = 0.0) -> None:
        self.phrases = phrases
        self.keep = keep
        self.reach = max(map(len, phrases))

    def step(self, state, step):
        for phrase in self.phrases:
            if tuple(step.path[-len(phrase) :]) == phrase:
                return None, Undo(len(phrase), why=str(phrase), keep=self.keep)
        return None, Keep()


def texts() -> list[Text]:
    return list(itertools.product(range(N_TOKENS), repeat=LENGTH))


def probability(text: Text, chain: np.ndarray = CHAIN) -> float:
    return math.prod(chain[a, b] for a, b in zip((PROMPT[-1], *text[:-1]), text, strict=True))


def n_matches(text: Text, phrases: Sequence[Text] = BANNED) -> int:
    ends = [(p, i) for p in phrases for i in range(len(p), len(text) + 1) if text[i - len(p) : i] == p]
    return len(ends)


def conditional(phrases: Sequence[Text] = BANNED, keep: float = 0.0, chain: np.ndarray = CHAIN) -> dict[Text, float]:
    """P(text) keep ** matches, normalised; with keep 0, P(text | no phrase)."""
    mass = {t: probability(t, chain) * keep ** n_matches(t, phrases) for t in texts()}
    total = sum(mass.values())
    return {t: p / total for t, p in mass.items() if p > 0}


def locally_masked(chain: np.ndarray = CHAIN) -> dict[Text, float]:
    """Each step renormalised over the tokens that complete no phrase."""
    law: dict[Text, float] = {}
    for text in texts():
        p = 1.0
        for i in range(LENGTH):
            before = (PROMPT[-1], *text)[i]
            ok = [v for v in range(N_TOKENS) if not n_matches((*text[:i], v)[-3:]) or n_matches((*text[:i], v)) == 0]
            p *= chain[before, text[i]] / chain[before, ok].sum() if text[i] in ok else 0.0
        if p:
            law[text] = p
    return law


def evidence() -> float:
    return sum(probability(t) for t in texts() if not n_matches(t))


def total_variation(counts: Counter[Text], law: dict[Text, float]) -> float:
    n = sum(counts.values())
    return 0.5 * sum(abs(counts[t] / n - law.get(t, 0.0)) for t in set(counts) | set(law))


def bound(n_outcomes: int, n_draws: int, delta: float = 1e-9) -> float:
    """Total variation that fair draws exceed with probability below `delta` (Weissman et al. 2003)."""
    return 0.5 * math.sqrt(2 * (n_outcomes * math.log(2) + math.log(1 / delta)) / n_draws)


def sample(n: int, make: Callable[[AsyncLM, int], object], at_once: int = 500) -> list:
    """Outcomes of n walks, `at_once` at a time."""

    async def run() -> list:
        outcomes = []
        async with model() as llm:
            for start in range(0, n, at_once):
                outcomes += await asyncio.gather(*(make(llm, i) for i in range(start, min(n, start + at_once))))
        return outcomes

    return asyncio.run(run())


def counts_of(mode: str, n: int, rules: object = None, **options: object) -> Counter[Text]:
    rules = BannedTokens(BANNED) if rules is None else rules

    def make(llm: AsyncLM, i: int) -> object:
        return walk(llm, PROMPT, rules, max_new_tokens=LENGTH, eos=(), mode=mode, seed=i, **options)

    return Counter(tuple(outcome.token_ids) for outcome in sample(n, make))
