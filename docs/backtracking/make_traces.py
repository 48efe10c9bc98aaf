"""The gallery of traces: `python docs/backtracking/make_traces.py`, or only those that are named."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Collection
from pathlib import Path

from genlm_backend import load_model_by_name
from genlm_backend.backtracking import (
    Creative,
    GrammarRule,
    ProbabilityThreshold,
    Replace,
    Trace,
    aguide,
    load_parser,
    operator_rule,
    phrases,
    walk,
)
from genlm_backend.llm import AsyncLM

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

FOLDER = Path(__file__).parent / "traces"
SQL_PROMPT = "List the names of all students older than 20, as SQL:\n\n"
GUIDE_PROMPT = "The names of all students older than 20, in SQL:\n\n```sql\n"
PAGE = (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>guide</title></head><body>{}</body></html>\n'
)


async def rules(llm: AsyncLM, names: Collection[str]) -> None:
    runs = {name: run for name, run in RUNS.items() if name in names}
    walks = [walk(llm, PROMPT, max_new_tokens=40, seed=7, **options) for options, _ in runs.values()]
    outcomes = await asyncio.gather(*walks)
    for (name, (_, title)), outcome in zip(runs.items(), outcomes, strict=True):
        Trace.of(llm, outcome, PROMPT, title).save(FOLDER / f"{name}.html")
        print(name, outcome.n_undos, repr(outcome.text))


async def grammar(llm: AsyncLM) -> None:
    rule = GrammarRule(load_parser("sql").constraint(llm))
    outcome = await walk(llm, SQL_PROMPT, rule, max_new_tokens=30, seed=2, top_k=50)
    Trace.of(llm, outcome, SQL_PROMPT, "GrammarRule: SQL, checked").save(FOLDER / "grammar.html")
    print("grammar", outcome.n_undos, rule.accepts(outcome), repr(outcome.text))


async def guided(llm: AsyncLM) -> None:
    result = await aguide(llm, load_parser("sql"), GUIDE_PROMPT, seed=1, stop_at="```", temperature=1.0, top_p=0.95)
    (FOLDER / "guide.html").write_text(PAGE.format(result.html), encoding="utf-8")
    print("guide", result.num_grammar_corrections, result.valid, repr(result.response))


async def main(names: Collection[str]) -> None:
    FOLDER.mkdir(exist_ok=True)
    async with load_model_by_name("smollm2") as llm:
        await rules(llm, names)
        if "grammar" in names:
            await grammar(llm)
        if "guide" in names:
            await guided(llm)


asyncio.run(main(sys.argv[1:] or [*RUNS, "grammar", "guide"]))
