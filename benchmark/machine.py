"""What a benchmark ran on, the machine and the commit, and its table as Markdown."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmark.environments import ROOT
from genlm_backend.llm.loading import multiplies_bfloat16


def commit() -> dict[str, Any]:
    """The commit, and whether the package differs from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    return {"id": git("rev-parse", "HEAD"), "has_changes": bool(git("status", "--porcelain", "--", "genlm_backend"))}


def describe_machine() -> dict[str, Any]:
    """Processor, its instructions for bfloat16, cores, memory in bytes and system."""
    processor, flags = platform.processor(), ""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
        processor, flags = fields.get("model name", processor), fields.get("flags", "")
    except OSError:
        pass
    return {
        "processor": processor,
        "bfloat16": [flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags.split()],
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.machine()}",
    }


def dtype() -> str:
    """What every peer computes in: bfloat16 where the processor multiplies it fast, else float32, as is best for all.

    The environment variable BENCHMARK_DTYPE decides otherwise.
    """
    return os.environ.get("BENCHMARK_DTYPE") or ("bfloat16" if multiplies_bfloat16() else "float32")


def machine_line(machine: dict[str, Any]) -> str:
    """What `describe_machine` found, in words."""
    return (
        f"{machine['processor']}, {machine['cores']} cores, bfloat16 in hardware: "
        f"{', '.join(machine['bfloat16']) or 'no'}, {machine['memory_bytes'] / 2**30:.0f} GiB, {machine['system']}"
    )


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table for the documentation: the first column names its row, the others hold numbers."""
    aligned = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, aligned, *rows])


def with_notes(table: str, notes: Iterable[str]) -> str:
    """The table and a list of what one has to know about it."""
    return table + "\n\n" + "\n".join(f"- {note}" for note in notes) + "\n"
