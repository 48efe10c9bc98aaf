"""The pages' programs run as printed and print what the pages say, but for what differs between machines."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pages import ROOT, n_lines_apart, page_environment

BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", re.DOTALL)


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", ["index", "examples"])
def test_a_page_runs_as_printed(smollm2_path: Path, tmp_path: Path, page: str):
    text = (ROOT / "docs" / "smc" / f"{page}.md").read_text(encoding="utf-8")
    blocks = BLOCK.findall(text)
    assert len(blocks) >= 3 and all(output for _, output in blocks)
    script = tmp_path / "page.py"
    script.write_text("".join(code for code, _ in blocks), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        env=page_environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    on_the_page = "".join(output for _, output in blocks)
    # Of some thousand draws one may be another token on another machine, and its text another line.
    assert n_lines_apart(done.stdout, on_the_page) <= 1, done.stdout
