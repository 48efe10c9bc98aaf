"""Every name that genlm-control 0.4.1, genlm-bytes 0.2.0, llamppl and hfppl import is there, and is ours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).parent.parent

NAMES = """
from genlm.backend import load_model_by_name, decode_vocab, Token, AsyncVirtualLM, AsyncTransformer
from genlm.backend import TokenCharacterTrie, ParallelTokenCharacterTrie, AsyncTokenCharacterTrie
from genlm.backend.tokenization import Token, decode_vocab
from genlm.backend.tokenization.token import Token as SameToken
from genlm.backend.tokenization.bytes import get_byte_vocab
from genlm.backend.llm import AsyncLM, AsyncVirtualLM, AsyncTransformer, AsyncMlxLM, AsyncSGLTransformer, MockAsyncLM
from genlm.backend.llm import load_model_by_name
from genlm.backend.trie import ParallelTokenCharacterTrie, TokenCharacterTrie, AsyncTokenCharacterTrie
assert SameToken is Token
"""
# hfppl asks for them under this package's own name, with no shim.
NAMES_OF_HFPPL = "from genlm_backend.llm import AsyncTransformer, AsyncVirtualLM, MockAsyncLM\n"
SAME = """
from genlm.backend import llm as theirs
assert (theirs.AsyncTransformer, theirs.AsyncVirtualLM, theirs.MockAsyncLM) == hfppls
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=110)


def test_one_import_makes_every_name_of_the_dependants_importable() -> None:
    done = run("import genlm_backend.compat\n" + NAMES)
    assert done.returncode == 0, done.stderr


def test_hfppl_needs_no_shim_and_gets_the_same_classes() -> None:
    hfppls = NAMES_OF_HFPPL + "hfppls = AsyncTransformer, AsyncVirtualLM, MockAsyncLM\n"
    done = run(hfppls + "import genlm_backend.compat" + SAME)
    assert done.returncode == 0, done.stderr


def test_without_it_the_names_are_not_ours() -> None:
    assert run(NAMES).returncode != 0


@pytest.mark.parametrize("name", ["AsyncMlxLM", "AsyncSGLTransformer"])
def test_an_engine_that_is_not_here_says_so_when_it_is_made(name: str) -> None:
    done = run(
        "import genlm_backend.compat, genlm.backend.llm as llm\n"
        "from genlm_backend.errors import BackendUnavailable\n"
        f"try:\n    llm.{name}.from_name('x')\nexcept BackendUnavailable as error:\n    print(error)"
    )
    assert done.stdout == f"{name} is no part of genlm_backend; use AsyncTransformer\n", done.stderr


def test_it_refuses_to_mix_with_classes_that_are_in_use() -> None:
    done = run(
        "import sys, types\n"
        "sys.modules['genlm'] = types.ModuleType('genlm'); sys.modules['genlm.backend'] = types.ModuleType('b')\n"
        "import genlm_backend.compat"
    )
    assert "import genlm_backend.compat first" in done.stderr
