"""The first programs of genlm-control, genlm-bytes, llamppl and hfppl, on this backend: `make ecosystem`.

The programs of their READMEs are taken from what is installed, and only the name of the model is another; further ones
are written here. They run in an environment of their own, which also has the genlm-backend that those packages ask
for: it must not be used.
"""

from __future__ import annotations

import ast
import asyncio
import importlib.metadata
import inspect
import math
import re
import sys
from typing import Any

import numpy as np
import pytest
import torch

for distribution in ("genlm-control", "genlm-bytes", "llamppl", "hfppl"):
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{distribution} is not installed here; run: make ecosystem", allow_module_level=True)

import genlm_backend.compat  # noqa: E402  (the one line; before the packages that need it)
from genlm_backend import AsyncTransformer, load_model_by_name  # noqa: E402
from genlm_backend.llm.demo_model import demo_model_path  # noqa: E402


@pytest.fixture(autouse=True)
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What these packages draw from: two global generators, and those that they make without a seed."""
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    new = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed=None: new(0 if seed is None else seed))


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


# ---- the programs of their READMEs; loading takes long where the machine has other work


def readme_programs(distribution: str, model: str) -> list[str]:
    """The Python blocks of a README, in which our model stands in place of `model`."""
    readme = importlib.metadata.metadata(distribution).get_payload()
    blocks: list[str] = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    blocks = [re.sub(r", auth_token=<\w+>", "", block) for block in blocks]
    assert sum(f'"{model}"' in block for block in blocks) == 1
    return [block.replace(f'"{model}"', repr(str(demo_model_path()))) for block in blocks]


def run(*programs: str, names: dict[str, Any] | None = None) -> dict[str, Any]:
    """What is left behind by programs that run one after the other, as in a notebook, after those that left `names`."""
    names = {"__name__": "pasted"} if names is None else names
    for program in programs:
        outcome = eval(compile(program, "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), names)
        if inspect.iscoroutine(outcome):
            asyncio.run(outcome)
    return names


@pytest.mark.timeout(300)
def test_the_readme_of_genlm_control() -> None:
    program = readme_programs("genlm-control", "openai-community/gpt2")[0]
    names = run(program)
    assert isinstance(names["llm"].model, AsyncTransformer)
    posterior = names["sequences"].decoded_posterior
    assert math.isclose(sum(posterior.values()), 1.0, rel_tol=1e-6)
    assert set(posterior) <= {f" SMC is {2 * emoji} with LMs" for emoji in "🔥😍🤌"}
    names["llm"].model.close()


@pytest.mark.timeout(300)
def test_the_readme_of_genlm_bytes() -> None:
    (program,) = readme_programs("genlm-bytes", "gpt2-medium")
    names = run(program)
    assert isinstance(names["llm"], AsyncTransformer)
    logps = names["logp_next"].ps
    assert int(np.argmax(logps)) == ord("d") and math.isclose(np.exp(logps).sum(), 1.0, rel_tol=1e-3)
    assert type(names["new_beam"]) is type(names["beam"])
    names["llm"].close()


def end_after(model: Any, n_tokens: int) -> None:
    """Also without a full stop, which a small model that may write no "e" may never come to."""
    own = model.step

    async def step(self: Any) -> None:
        await own(self)
        self.n_steps = getattr(self, "n_steps", 0) + 1
        if self.n_steps == n_tokens and not self.done_stepping():
            self.finish()

    model.step = step


@pytest.mark.timeout(300)
@pytest.mark.parametrize("distribution", ["llamppl", "hfppl"])
def test_the_readme_of_llamppl(distribution: str) -> None:
    definition, *others = readme_programs(distribution, "meta-llama/Llama-2-7b-hf")
    names = run(definition)
    end_after(names["MyModel"], 30)
    run(*others, names=names)
    assert isinstance(names["lm"].model, AsyncTransformer)
    assert len(names["particles"]) == 5
    for particle in names["particles"]:
        assert particle.done_stepping() and particle.weight > -math.inf
        assert str(particle.context) and "e" not in str(particle.context)
    names["lm"].model.close()


# ---- others


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


async def test_llamppl_runs_its_sequential_monte_carlo(llm: Any) -> None:
    from llamppl import CachedCausalLM, LMContext, Model, smc_standard

    lm = CachedCausalLM(llm)
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
