"""Compiled functions: what goes wrong with the files that keep them costs time, and no call."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import pytest

from genlm_backend import compiled as of_module
from genlm_backend.compiled import compiled

pytestmark = pytest.mark.thorough


def add(a: int, b: int) -> int:
    return a + b


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, about which nothing was logged."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(of_module, "_told", set())
    return tmp_path


def in_another_process() -> Any:
    """The function as a fresh process has it: not compiled yet, with the files of those before."""
    return compiled()(add)


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:50])


def make_unreadable(file: Path) -> None:  # by root too
    file.unlink()
    file.mkdir()


HARMS: list[tuple[str, Callable[[Path], Any]]] = [
    ("*.nbi", lambda file: file.write_bytes(b"")),
    ("*.nbi", cut_short),
    ("*.nbc", cut_short),
    ("*.nbc", lambda file: file.write_bytes(bytes(file.stat().st_size))),
    ("*.nbi", make_unreadable),
]


@pytest.mark.parametrize(("kind", "harm"), HARMS)
def test_a_damaged_file_costs_one_more_compilation(
    folder: Path, kind: str, harm: Callable[[Path], Any], caplog: pytest.LogCaptureFixture
) -> None:
    assert in_another_process()(1, 2) == 3
    for file in folder.rglob(kind):
        harm(file)
    with caplog.at_level(logging.WARNING):
        assert in_another_process()(1, 2) == 3
        assert in_another_process()(1, 2) == 3
    assert len(caplog.records) == 1 and str(folder) in caplog.text
    if harm is not make_unreadable:
        again = in_another_process()
        assert again(1, 2) == 3 and sum(again.stats.cache_hits.values()) == 1


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), PermissionError(13, "Permission denied")])
def test_a_folder_that_cannot_be_written_any_more_costs_the_compilation(
    folder: Path, error: OSError, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise error

    function = in_another_process()
    with monkeypatch.context() as without_room, caplog.at_level(logging.WARNING):
        without_room.setattr(function._cache._cache_file, "_save_data", refuse)
        assert function(1, 2) == 3 and function(1.5, 2) == 3.5
    assert len(caplog.records) == 1 and error.strerror in caplog.text
    assert in_another_process()(1, 2) == 3
    again = in_another_process()
    assert again(1, 2) == 3 and sum(again.stats.cache_hits.values()) == 1


def test_what_another_user_keeps_for_himself_is_left_as_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    assert in_another_process()(1, 2) == 3
    before = {file: file.read_bytes() for file in folder.rglob("*.nb?")}
    function = in_another_process()
    monkeypatch.setattr(function._cache._cache_file, "_load_index", refuse)
    assert function(1, 2) == 3
    assert {file: file.read_bytes() for file in folder.rglob("*.nb?")} == before


def test_without_the_compiler_a_function_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    assert compiled()(add) is add
