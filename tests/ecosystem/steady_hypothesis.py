"""A pytest plugin: Hypothesis draws the same few examples on every machine, and Monte Carlo tests are left out.

Those draw 10,000 samples an example from genlm-control's samplers over potentials that use no backend: minutes each.
"""

import inspect

import hypothesis
import pytest

hypothesis.settings.register_profile(
    "steady",
    derandomize=True,
    deadline=None,
    max_examples=25,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("steady")

N_LEFT_OUT = pytest.StashKey[int]()
SAID = "Monte Carlo tests that were left out:"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests that compare with a Monte Carlo estimate."""
    long = [item for item in items if "monte_carlo" in source_of(item)]
    items[:] = [item for item in items if item not in long]
    config.hook.pytest_deselected(items=long)
    config.stash[N_LEFT_OUT] = len(long)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say how many."""
    terminalreporter.write_line(f"{SAID} {config.stash.get(N_LEFT_OUT, 0)}")


def source_of(item: pytest.Item) -> str:
    function = getattr(item, "function", None)
    function = getattr(getattr(function, "hypothesis", None), "inner_test", function)
    return inspect.getsource(function) if function else ""
