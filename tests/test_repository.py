"""What holds for the repository as a whole: layers, data files, names, light imports."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import genlm_backend

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "genlm_backend"
SOURCES = sorted(PACKAGE.rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.slow
def test_the_layers_hold() -> None:
    """As in `make check`; in a process of its own, because import-linter switches off the loggers of others."""
    pytest.importorskip("importlinter")
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_logo=True, cache_dir=None))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout


def test_every_module_has_its_place_in_the_layers() -> None:
    """A module that no layer names could import anything."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    named = set(re.findall(r"\w+", " ".join(settings["contracts"][0]["layers"])))
    there = {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert there - {"__init__", "genlm_backend"} <= named


def setup_argument(name: str) -> Any:
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    keywords = [keyword for node in ast.walk(tree) if isinstance(node, ast.Call) for keyword in node.keywords]
    return next(ast.literal_eval(keyword.value) for keyword in keywords if keyword.arg == name)


def test_there_is_one_version() -> None:
    version = setup_argument("version")
    assert genlm_backend.__version__ == version
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_data_file_is_installed() -> None:
    patterns = setup_argument("package_data")["genlm_backend"]
    installed = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    data = {p for p in PACKAGE.rglob("*") if p.is_file() and p.suffix != ".py" and "__pycache__" not in p.parts}
    assert {relative(p) for p in data - installed} == set()


def test_every_folder_with_modules_is_a_package() -> None:
    """find_packages leaves out what has no __init__.py."""
    folders = {path.parent for path in SOURCES}
    assert [relative(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_each_source_says_what_it_is_and_defers_annotations(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "no module docstring"
    names = {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    defines = any(isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) for node in tree.body)
    assert "annotations" in names or not defines, "no `from __future__ import annotations`"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_no_file_has_a_name_that_says_nothing(path: Path) -> None:
    assert not {"utils", "helpers", "manager", "data", "common", "misc"} & set(
        path.relative_to(ROOT).with_suffix("").parts
    )


@pytest.mark.slow
def test_importing_reads_no_environment_and_changes_nothing() -> None:
    """No work at import: warning filters, log levels, the random state and the environment stay as they were."""
    code = """
import logging, os, random, warnings
import filelock, graphviz, numba, numpy, platformdirs, psutil, rich.live, rich.table, scipy  # theirs
import torch, transformers, typer
def state():
    return (list(warnings.filters), logging.getLogger().level, logging.getLogger("genlm_backend").level,
            random.getstate(), numpy.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes(),
            dict(os.environ), torch.get_num_threads(), torch.get_default_dtype())
before = state()
import genlm_backend, genlm_backend.llm, genlm_backend.cli
assert [a == b for a, b in zip(before, state(), strict=True)] == [True] * len(before)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
