"""A language small enough to enumerate: what each mode of a walk has to sample from, computed without the walk.

`python -m tests.backtracking.toy 20000` prints how far the law of each mode, and so many walks, are from
P(text | no phrase).
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
import math
import random
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache

import numpy as np
import torch

from genlm_backend.backtracking import Keep, Overlay, Rule, Undo, walk
from genlm_backend.cache.row_memo import Block
from genlm_backend.llm.base import AsyncLM
from genlm_backend.llm.queries import Draw, Drawn, answer
from genlm_backend.llm.service import Context, Engine
from genlm_backend.testing import fake_language_model

Text = tuple[int, ...]
Law = dict[Text, float]


class Toy:
    """A Markov chain over a few tokens, texts of one length, and phrases of tokens that are banned.

    Args:
        chain: Row: the token before (0 stands for the prompt too); column: the token that comes.
        length: Of a text.
        phrases: Banned.
    """

    prompt = (0,)

    def __init__(self, chain: Sequence[Sequence[float]], length: int, phrases: Sequence[Text]) -> None:
        self.chain = np.array(chain)
        self.length = length
        self.phrases = tuple(phrases)
        self.n_tokens = len(chain)
        assert np.allclose(self.chain.sum(1), 1)

    def model(self) -> AsyncLM:
        return fake_language_model(ChainEngine(self.chain), self.n_tokens)

    def rule(self, keep: float = 0.0) -> BannedTokens:
        return BannedTokens(self.phrases, keep)

    # ---- enumeration

    def texts(self) -> list[Text]:
        return list(itertools.product(range(self.n_tokens), repeat=self.length))

    def tokens(self, prefix: Text) -> Iterable[int]:
        """Those that may follow a prefix."""
        return range(self.n_tokens)

    def p(self, prefix: Text) -> float:
        """Of the last token of a prefix."""
        return float(self.chain[(self.prompt[-1], *prefix)[len(prefix) - 1], prefix[-1]])

    def probability(self, text: Text) -> float:
        return math.prod(self.p(text[: i + 1]) for i in range(len(text)))

    def match(self, prefix: Text) -> int:
        """Length of the longest phrase that ends here; 0 if none does."""
        return max((len(p) for p in self.phrases if prefix[-len(p) :] == p), default=0)

    def n_matches(self, text: Text) -> int:
        return sum(self.match(text[: i + 1]) > 0 for i in range(len(text)))

    def conditional(self, keep: float = 0.0) -> Law:
        """P(text) keep ** matches, normalised; with keep 0 that is P(text | no phrase)."""
        return _normalised({t: self.probability(t) * keep ** self.n_matches(t) for t in self.texts()})

    def evidence(self) -> float:
        return sum(self.probability(t) for t in self.texts() if not self.n_matches(t))

    def masked(self) -> Law:
        """Each step renormalised over the tokens that complete no phrase."""
        law: Law = {}
        for text in self.texts():
            if self.n_matches(text):
                continue
            law[text] = self.probability(text)
            for i in range(self.length):
                nexts = [(*text[:i], v) for v in self.tokens(text[:i])]
                law[text] /= sum(self.p(new) for new in nexts if not self.match(new))
        return law

    def after_removals(self, first: bool) -> Law:
        """The law of mode `local`, or `first`: go back to the start of the phrase, without what was removed."""

        @cache
        def alive(prefix: Text, removed: frozenset[Text]) -> float:
            if prefix in removed:
                return 0.0
            if not any(r[: len(prefix)] == prefix for r in removed):
                return 1.0
            return sum(self.p((*prefix, v)) * alive((*prefix, v), removed) for v in self.tokens(prefix))

        @cache
        def law(at: Text, removed: frozenset[Text]) -> tuple[tuple[Text, float], ...]:
            if len(at) == self.length:
                return ((at, 1.0),)
            weights = {v: self.p((*at, v)) * alive((*at, v), removed) for v in self.tokens(at)}
            mixed: Counter[Text] = Counter()
            for v, weight in weights.items():
                new = (*at, v)
                n = self.match(new)
                if weight == 0:
                    continue
                back = new[: len(new) - n]
                fault = new[: len(back) + 1] if first else new
                after = known(back, removed | {fault}) if n else known(new, removed)
                for text, q in after:
                    mixed[text] += weight / sum(weights.values()) * q
            return tuple(mixed.items())

        def known(at: Text, removed: frozenset[Text]) -> tuple[tuple[Text, float], ...]:
            floor = self.floor(at)
            return law(at, frozenset(r for r in removed if r[: len(floor)] == floor))

        return dict(law((), frozenset()))

    def floor(self, at: Text) -> Text:
        """The part of a prefix that no chain of rollbacks can reach: what was removed beside it plays no part."""
        open_ = max((n for p in self.phrases for n in range(1, len(p)) if at[-n:] == p[:n]), default=0)
        return self.floor(at[: len(at) - open_]) if open_ else at

    def resampled(self) -> Law:
        """The law of mode `none`: go back to the start of the phrase and draw again, as often as it takes."""

        @cache
        def law(at: Text) -> tuple[tuple[Text, float], ...]:
            """Where a walk at `at` gets to: whole texts, and prefixes of `at` that a phrase sends it back to."""
            if len(at) == self.length:
                return ((at, 1.0),)
            mixed: Counter[Text] = Counter()
            for v in self.tokens(at):
                new, weight = (*at, v), self.p((*at, v))
                n = self.match(new)
                for outcome, q in ((new[: len(new) - n], 1.0),) if n else law(new):
                    mixed[outcome] += weight * q
            again = mixed.pop(at, 0.0)
            return tuple((outcome, q / (1 - again)) for outcome, q in mixed.items())

        return dict(law(()))

    def laws(self) -> dict[str, Law]:
        """Of every mode."""
        return {
            "exact": self.conditional(),
            "local": self.after_removals(first=False),
            "first": self.after_removals(first=True),
            "mask": self.masked(),
            "none": self.resampled(),
        }

    # ---- sampling

    def sample(self, n: int, make: Callable[[AsyncLM, int], object]) -> list:
        """Outcomes of n walks on a model that answers at once."""
        llm = DirectModel(self)

        async def run() -> list:
            return [await make(llm, i) for i in range(n)]

        return asyncio.run(run())

    def walks(self, mode: str, n: int, rules: object = None, seed: int = 0, **options: object) -> list:
        rules = self.rule() if rules is None else rules
        options = {"max_new_tokens": self.length, "eos": (), "mode": mode} | options
        return self.sample(n, lambda llm, i: walk(llm, self.prompt, rules, seed=seed, lineage=(i,), **options))

    def counts(self, mode: str, n: int, rules: object = None, seed: int = 0, **options: object) -> Counter[Text]:
        return Counter(tuple(outcome.token_ids) for outcome in self.walks(mode, n, rules, seed, **options))


class Tree(Toy):
    """The same laws for texts of a model that are enumerated: what may follow each prefix, and its probability.

    Args:
        nexts: From a prefix to the tokens that may follow it.
        length: Of a text.
        phrases: Banned.
    """

    def __init__(self, nexts: Mapping[Text, Mapping[int, float]], length: int, phrases: Sequence[Text]) -> None:
        self.nexts, self.length, self.phrases = nexts, length, tuple(phrases)

    def texts(self) -> list[Text]:
        texts: list[Text] = [()]
        for _ in range(self.length):
            texts = [(*text, v) for text in texts for v in self.nexts[text]]
        return texts

    def tokens(self, prefix: Text) -> Iterable[int]:
        return self.nexts[prefix]

    def p(self, prefix: Text) -> float:
        return self.nexts[prefix[:-1]][prefix[-1]]


class DirectModel:
    """What a walk asks of a model, without batches and threads: draws by a plain inverse distribution function."""

    tokenizer = None

    def __init__(self, toy: Toy) -> None:
        self.byte_vocab = toy.model().byte_vocab
        self._rows = [torch.log(torch.from_numpy(row)).float() for row in toy.chain]
        self._sums = [row.cumsum().tolist() for row in toy.chain]

    async def query(self, token_ids: Sequence[int], query: object, lora_name: str | None = None) -> object:
        row = self._rows[token_ids[-1]]
        if isinstance(query, Draw) and query.temperature == 1 and query.mask is None:
            sums = self._sums[token_ids[-1]]
            token_id = bisect.bisect_right(sums, query.key / 2**64 * sums[-1], hi=len(sums) - 1)
            return Drawn(token_id, float(row[token_id]), float(row[token_id]))
        (answered,) = answer(Block(row[None], [0.0]), [(0, query)])
        return answered


class ChainEngine(Engine):
    """Logits of a Markov chain."""

    def __init__(self, chain: np.ndarray) -> None:
        self.logits = torch.from_numpy(np.log(chain)).float()

    def evaluate(self, contexts: Sequence[Context]) -> torch.Tensor:
        return torch.stack([self.logits[context.token_ids[-1]] for context in contexts])


class BannedTokens(Rule[None]):
    """Phrases as token ids, the longest that ends here taken back to its start; looks at the path, has no state."""

    def __init__(self, phrases: Sequence[Text], keep: float = 0.0) -> None:
        self.phrases = sorted(phrases, key=len, reverse=True)
        self.keep = keep
        self.reach = max(map(len, phrases))

    def step(self, state, step):
        for phrase in self.phrases:
            if tuple(step.path[-len(phrase) :]) == phrase:
                return None, Undo(len(phrase), why=str(phrase), keep=self.keep)
        return None, Keep()


# Of the shape of the toy in the design's notes (4 tokens, texts of 4, two phrases), whose chain is not written down
# there: this one was searched for, and each mode is within 0.003 of what was measured on that one.
BIG = Toy(
    [
        [0.07, 0.38, 0.51, 0.04],
        [0.20, 0.43, 0.35, 0.02],
        [0.55, 0.04, 0.15, 0.26],
        [0.16, 0.33, 0.10, 0.41],
    ],
    4,
    [(1, 2, 3), (2, 0)],
)
SMALL = Toy([[0.2, 0.5, 0.3], [0.1, 0.2, 0.7], [0.6, 0.2, 0.2]], 3, [(1, 2), (2, 0)])


def total_variation(a: Law | Counter[Text], b: Law | Counter[Text]) -> float:
    """Half of the summed distances; counts are normalised."""
    a, b = _normalised(a), _normalised(b)
    return 0.5 * sum(abs(a.get(t, 0.0) - b.get(t, 0.0)) for t in {*a, *b})


def bound(law: Law, n: int, delta: float = 1e-9) -> float:
    """Total variation that n fair draws exceed with probability below `delta` (Weissman et al. 2003)."""
    return 0.5 * math.sqrt(2 * (len(law) * math.log(2) + math.log(1 / delta)) / n)


def _normalised(masses: Law | Counter[Text]) -> Law:
    total = sum(masses.values())
    return {t: m / total for t, m in masses.items() if m > 0}


def main(n: int) -> None:
    """A row a mode: total variation to P(text | no phrase) of its law and of n walks, and prefixes asked per walk."""
    laws, exact = BIG.laws(), BIG.conditional()
    print(f"P(no phrase) = {BIG.evidence():.3f}; {n} walks a mode\n")
    print("| mode | law | walks | prefixes per walk |\n|---|---|---|---|")
    fair = Counter(random.Random(0).choices(list(exact), list(exact.values()), k=n))
    print(f"| independent draws from P(text given C) | 0 | {total_variation(fair, exact):.4f} | |")
    overlay = Overlay()
    for mode, options in [*((mode, {}) for mode in laws), ("exact", {"overlay": overlay})]:
        outcomes = BIG.walks(mode, n, **options)
        counts = Counter(tuple(outcome.token_ids) for outcome in outcomes)
        name = f"`{mode}`, shared overlay" if options else f"`{mode}`"
        distance, asked = total_variation(counts, exact), statistics.fmean(o.n_prefixes for o in outcomes)
        print(f"| {name} | {total_variation(laws[mode], exact):.4f} | {distance:.4f} | {asked:.2f} |", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
