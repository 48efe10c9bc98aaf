"""The real model writes objects of ten schemas, all at once; what is finished is valid."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import jsonschema
import pytest
import torch

from genlm_backend import load_model_by_name
from genlm_backend.backtracking import GrammarRule, walk
from genlm_backend.potentials import Grammar
from tests.potentials import schemas

CHOSEN = schemas.ALL[::20]


@pytest.mark.model
@pytest.mark.timeout(300)
async def test_what_the_model_writes_under_a_schema_is_valid(smollm2_path: Path) -> None:
    async with load_model_by_name("smollm2", "hf", {"hf_opts": {"dtype": torch.float32}}) as llm:
        rules = [GrammarRule(Grammar.json_schema(llm, schema, whitespace=False)) for schema in CHOSEN]
        outcomes = await asyncio.gather(
            *(
                walk(llm, "An example in JSON: ", rule, mode="mask", max_new_tokens=64, seed=1, lineage=(i,))
                for i, rule in enumerate(rules)
            )
        )
    finished = [(s, o.text) for s, o in zip(CHOSEN, outcomes, strict=True) if o.reason == "eos"]
    assert len(finished) > 3, [outcome.text for outcome in outcomes]
    for schema, text in finished:
        kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        kind(schema, format_checker=kind.FORMAT_CHECKER).validate(json.loads(text))
