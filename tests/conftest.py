"""Fixtures for every test: the demo model where it is installed, small models where it is not, and a look for leaks."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before anything imports huggingface_hub: no test may reach the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"  # the servers of tests

import hypothesis
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from genlm_backend import sampling
from genlm_backend.errors import BackendUnavailable, ModelNotFound
from genlm_backend.llm.demo_model import demo_model_path
from tests import architectures, tiny_tokenizer

# What rich and typer print is that of a plain terminal 80 wide, wherever the tests run.
os.environ["TERM"] = "xterm"
for variable in (
    *("COLUMNS", "LINES", "TERMINAL_WIDTH", "TTY_COMPATIBLE", "TTY_INTERACTIVE"),
    *("NO_COLOR", "FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS"),
):
    os.environ.pop(variable, None)

# A shell that starts the tests in the background lets them ignore Ctrl-C, which some of them send.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples each time, however long they take: a failure is the fault of a change, not of luck or the machine.
hypothesis.settings.register_profile(
    "steady", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("steady")


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The folder of the real demo model; a test that needs it is skipped, with the command, where it is missing."""
    try:
        return demo_model_path()
    except (ModelNotFound, BackendUnavailable) as error:
        pytest.skip(f"needs the demo model: run `make demo` ({error})")


@pytest.fixture(scope="session")
def tiny_tokenizer_512() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 512 ids, for the small random models."""
    return tiny_tokenizer.build_tokenizer(architectures.VOCAB_SIZE)


@pytest.fixture(scope="session")
def tiny_llama() -> PreTrainedModel:
    """A small random Llama in float32. Shared: do not change it."""
    return architectures.build("llama")


@pytest.fixture(params=architectures.PACKABLE)
def packable_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Each architecture that packed attention serves, small and random, in float32."""
    return architectures.build(request.param)


@pytest.fixture(scope="session")
def tiny_model_folder(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: PreTrainedModel, tiny_tokenizer_512: PreTrainedTokenizerFast
) -> Path:
    """A local folder with a small random Llama and its tokenizer, for whatever takes a model's name."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_llama.save_pretrained(folder)
    tiny_tokenizer_512.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def random_state_kept() -> Iterator[None]:
    """Every test draws the same each time, also where it gives no seed, and leaves torch's default type as it was."""
    state = torch.random.get_rng_state()
    dtype = torch.get_default_dtype()
    torch.manual_seed(0)
    # Not by the fixture `monkeypatch`: this one would be what brings it up, and so undoes it after all other fixtures.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "fresh_seed", itertools.count(1).__next__)
        yield
    torch.random.set_rng_state(state)
    assert torch.get_default_dtype() == dtype


@pytest.fixture(autouse=True)
def asyncio_errors() -> Iterator[list[logging.LogRecord]]:
    """What asyncio complained about during the test (a lost exception, a destroyed task); it must be nothing.

    A test that provokes such a complaint asks for this fixture, looks at the list and clears it.
    """
    records: list[logging.LogRecord] = []
    handler = _Keep(records)
    logger = logging.getLogger("asyncio")
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)
    assert not records, [record.getMessage() for record in records]


@pytest.fixture(autouse=True)
def no_thread_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test leaves no thread behind that would keep the interpreter from ending."""
    before = set(threading.enumerate())
    yield
    left = [thread for thread in threading.enumerate() if thread not in before and not thread.daemon]
    for thread in left:
        thread.join(timeout=5)
    assert not [thread.name for thread in left if thread.is_alive()]


class _Keep(logging.Handler):
    """Keeps errors."""

    def __init__(self, records: list[logging.LogRecord]) -> None:
        super().__init__(logging.ERROR)
        self._records = records

    def emit(self, record: logging.LogRecord) -> Any:
        self._records.append(record)
