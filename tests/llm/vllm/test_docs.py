"""The program of docs/vllm.md runs as pasted, on the real model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[3] / "docs" / "vllm.md"


@pytest.mark.model
@pytest.mark.timeout(300)
def test_the_program_runs(
    needs_vllm: None, smollm2_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # beside other engines, less memory than by default
    (source,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(source, str(PAGE), "exec"), {"__name__": "pasted"})
    printed = capfd.readouterr().out
    assert printed.count("Montreal is") == 3 and "live Tally(" in printed
