"""The pictures of these pages; a hook of the build of the documentation (mkdocs.yml)."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path

import torch

from genlm_backend.smc import program, smc

ROW = torch.tensor([0.35, 0.3, 0.2, 0.15]).log()


@program
async def ascending(ctx):
    """Ten letters that should not go back in the alphabet."""
    letters = ""
    for _ in range(10):
        letters += "abcd"[await ctx.sample(ROW)]
        ctx.show(letters)
        ctx.score(-1.0 if letters[-2:-1] > letters[-1] else 0.0)
        await ctx.checkpoint()
    return letters


def on_pre_build(config: object) -> None:
    """Make them where they are not there yet."""
    if not (Path(__file__).parent / "replay.html").exists():
        main()


def main() -> None:
    folder = Path(__file__).parent
    result = asyncio.run(smc(ascending(), 20, seed=2, ess_threshold=0.6))
    assert math.isfinite(result.log_evidence)
    for name, figure in (("run", result.plot()), ("genealogy", result.plot_genealogy())):
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    (folder / "replay.html").write_text(result.html("Ten letters in order"), encoding="utf-8")


if __name__ == "__main__":
    main()
