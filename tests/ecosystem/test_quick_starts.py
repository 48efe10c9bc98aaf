"""The first programs of genlm-control, genlm-bytes and llamppl, unmodified, on this backend: `make ecosystem`.

They run in an environment of their own, which also has the genlm-backend that those packages ask for: it must not be
used.
"""

from __future__ import annotations

import importlib.metadata
import math
import sys
from pathlib import Path
from typing import Any

import pytest

for distribution in ("genlm-control", "genlm-bytes", "llamppl"):
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{distribution} is not installed here; run: make ecosystem", allow_module_level=True)

import genlm_backend.compat  # noqa: E402  (the one line; before the packages that need it)
from genlm_backend import AsyncTransformer, load_model_by_name  # noqa: E402
from genlm_backend.llm.demo_model import demo_model_path  # noqa: E402


@pytest.fixture(scope="module")
def llm() -> Any:
    with_rows = load_model_by_name("smollm2")
    yield with_rows
    with_rows.close()


def test_what_they_import_is_ours() -> None:
    import genlm.backend
    import genlm.control

    assert genlm.backend.AsyncTransformer is AsyncTransformer
    theirs = [name for name, module in sys.modules.items() if "genlm/backend" in str(getattr(module, "__file__", ""))]
    assert theirs == []


async def test_genlm_control_samples_within_a_regular_expression(llm: Any) -> None:
    from genlm.control import AWRS, BoolFSA, PromptedLLM

    prompted = PromptedLLM(llm)
    prompted.set_prompt_from_str("Montreal is")
    constraint = BoolFSA.from_regex(r" (a|the) [a-z ]{5,30}\.").coerce(prompted, f=b"".join)
    before = llm.statistics()
    sequences = await AWRS(prompted, constraint).smc(n_particles=5, ess_threshold=0.5, max_tokens=12)
    after = llm.statistics()
    assert sequences.decoded_posterior
    assert math.isclose(sum(sequences.decoded_posterior.values()), 1.0, rel_tol=1e-6)
    assert all(text.startswith((" a ", " the ")) for text in sequences.decoded_posterior)
    assert after.requests - before.requests > 5 * (after.batches - before.batches) / 2  # particles share batches


async def test_genlm_bytes_continues_byte_by_byte(llm: Any) -> None:
    from genlm.bytes import BeamParams, ByteBeamState

    state = await ByteBeamState.initial(llm, BeamParams(K=5))
    assert await state.greedy(b"An apple a day keeps the ", steps=6) == b"An apple a day keeps the doctor"


async def test_llamppl_runs_its_sequential_monte_carlo() -> None:
    from llamppl import CachedCausalLM, LMContext, Model, smc_standard

    model_folder: Path = demo_model_path()
    lm = CachedCausalLM.from_pretrained(str(model_folder), backend="hf")
    assert isinstance(lm.model, AsyncTransformer)

    class ShortWords(Model):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.context = LMContext(lm, "Montreal is", 0.7)
            self.n_left = 5

        async def step(self) -> None:
            token = await self.sample(self.context.next_token())
            self.condition(len(str(token)) < 8)
            self.n_left -= 1
            if self.n_left == 0:
                self.finish()

    particles = await smc_standard(ShortWords(), 5, 0.5)
    assert len(particles) == 5
    assert any(particle.weight > -math.inf for particle in particles)
    assert genlm_backend.compat is not None
    lm.model.close()
