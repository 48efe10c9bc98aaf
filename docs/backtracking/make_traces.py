"""The gallery of traces: `python docs/backtracking/make_traces.py`."""

from __future__ import annotations

import asyncio
from pathlib import Path

from genlm_backend import load_model_by_name
from genlm_backend.backtracking import Creative, ProbabilityThreshold, Replace, Trace, operator_rule, phrases, walk

PROMPT = "Once upon a time, there was a"
BANNED = ["new", "the", "of", "called", "without"]
RUNS = {
    "phrases": ({"rules": phrases(BANNED)}, "Phrases, mode local"),
    "exact": ({"rules": phrases(BANNED), "mode": "exact"}, "Phrases, mode exact"),
    "operator": ({"rules": operator_rule(ProbabilityThreshold(0.05)), "top_k": 50}, "ProbabilityThreshold(0.05)"),
    "replace": (
        {"rules": Replace(["management", "organization", "town", "girl"], "robot", max_replacements=3)},
        "Replace: a robot",
    ),
    "creative": ({"rules": Creative(top_k_threshold_flat=4), "top_k": 50}, "Creative writing"),
}


async def main() -> None:
    folder = Path(__file__).parent / "traces"
    folder.mkdir(exist_ok=True)
    async with load_model_by_name("smollm2") as llm:
        walks = [walk(llm, PROMPT, max_new_tokens=40, seed=7, **options) for options, _ in RUNS.values()]
        outcomes = await asyncio.gather(*walks)
        for (name, (_, title)), outcome in zip(RUNS.items(), outcomes, strict=True):
            Trace.of(llm, outcome, PROMPT, title).save(folder / f"{name}.html")
            print(name, outcome.n_undos, repr(outcome.text))


asyncio.run(main())
