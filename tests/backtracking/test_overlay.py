"""What is left of a tree after removals is what its leaves keep, in whatever order they came, and by whomever."""

from __future__ import annotations

import asyncio
import itertools

import numpy as np
import pytest

from genlm_backend.backtracking import Overlay, phrases, walk
from genlm_backend.backtracking.overlay import WHOLE, Siblings, at, removed
from tests.backtracking.speaker import chooser, speaker

N_TOKENS, DEPTH = 3, 3
PREFIXES = [path for n in range(DEPTH + 1) for path in itertools.product(range(N_TOKENS), repeat=n)]


def test_random_bans_and_penalties_leave_what_the_leaves_keep():
    """Each is done twice, as walks do that began with an older tree."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        q = {prefix: rng.dirichlet(np.ones(N_TOKENS)) for prefix in PREFIXES}
        shares: dict[tuple[int, ...], float] = {}
        root = WHOLE
        for _ in range(6):
            path = PREFIXES[rng.integers(1, len(PREFIXES))]
            edges = [float(q[path[:i]][path[i]]) for i in range(len(path))]
            keep, siblings = float(rng.choice([0.0, 0.0, 0.5, 0.25])), None
            if keep == 0:
                mask = rng.random(N_TOKENS) < 0.3
                siblings = Siblings(mask, None, q[path[:-1]])
                shares |= {(*path[:-1], int(v)): 0.0 for v in np.flatnonzero(mask)} | {path: 0.0}
            shares.setdefault(path, keep)
            for _ in range(2):
                root = removed(root, path, edges, keep, siblings)

        def left(prefix, q=q, shares=shares):
            below = (float(q[prefix][v]) * left((*prefix, v), q, shares) for v in range(N_TOKENS))
            return shares.get(prefix, 1.0) * (sum(below) if len(prefix) < DEPTH else 1.0)

        for prefix in PREFIXES:
            if all(shares.get(prefix[:n], 1.0) > 0 for n in range(len(prefix))):
                assert at(root, prefix).alive == pytest.approx(left(prefix), abs=1e-9)


VOCAB = [b"<p>", b"b", b".", b"!", b"c", b"<eos>"]
SAYS = chooser(otherwise={"b": 0.5, "c": 0.5}, b={".": 0.3, "!": 0.3, "c": 0.4})


@pytest.mark.parametrize(
    ("rules", "n_tokens", "left", "said"),
    [
        (phrases("b"), 2, 0.7, "bc"),  # "b." and "b!" are removed together, by every walk that meets one of them
        (phrases({"b": 0.5}, words=False), 1, 0.75, "b"),
        ([phrases({"b": 0.5}, words=False), phrases("bc", words=False)], 2, 0.525, "b."),
        ([phrases({"b": 0.5}, words=False), phrases({"b": 0.2}, words=False)], 1, 0.55, "b"),
    ],
    ids=["siblings", "penalty", "ban below a penalty", "two penalties on one prefix"],
)
async def test_walks_at_once_remove_from_a_shared_overlay_what_is_at_fault_once(rules, n_tokens, left, said):
    """`left` is the mass of C times the shares of penalties, by hand; `said` is a text of C, which must not be lost."""
    overlay, options = Overlay(), {"mode": "exact", "max_new_tokens": n_tokens, "eos": [5]}
    async with speaker(VOCAB, SAYS) as llm:
        walks = [walk(llm, [0], rules, overlay=overlay, seed=seed, **options) for seed in range(30)]
        await asyncio.gather(*walks)
        later = [await walk(llm, [0], rules, overlay=overlay, seed=seed, **options) for seed in range(100, 160)]
    assert overlay.alive == pytest.approx(left, abs=1e-6)
    assert said in {outcome.text for outcome in later}
