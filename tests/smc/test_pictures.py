"""Pictures of runs: made, self-contained, and safe with any text."""

from __future__ import annotations

import io
import itertools
import json
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from genlm_backend.smc import program, smc
from genlm_backend.smc.frames import frames
from genlm_backend.smc.live import live_progress, picture
from tests.smc.oracle import ROW, chain

pytestmark = pytest.mark.thorough


@pytest.fixture(params=["smc", "beam", "steer", "importance"])
async def result(request):
    return await smc(chain(3), 8, method=request.param, ess_threshold=0.9)


async def test_frames_say_who_descends_from_whom(result):
    made = frames(result)
    assert made[0].label == "start" and len(made[0].texts) == 8
    for before, now in itertools.pairwise(made):
        assert len(now.parents) == len(now.weights) == len(now.texts) == len(now.statuses)
        for i, parent in enumerate(now.parents):
            assert now.texts[i].startswith(before.texts[parent])
    assert made[-1].texts == result.texts
    assert sum(made[-1].weights) == pytest.approx(1.0, abs=1e-4)


async def test_pictures_are_made(result):
    for figure in (result.plot(), result.plot_genealogy()):
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=40)
        assert len(stream.getvalue()) > 2000


async def test_the_page_is_self_contained_and_shows_any_text_as_text():
    @program
    async def nasty(ctx):
        ctx.show("</script><script>alert(1)</script> \u202e & <b>")
        await ctx.checkpoint()
        ctx.score(-float("inf") if ctx.particle else 0.0)
        return 1

    page = (await smc(nasty(), 3)).html("<i>title</i>")
    assert page.count("</script>") == 2 and "<i>" not in page and "&lt;i&gt;title" in page
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", page) and "@import" not in page
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert data["frames"][1]["texts"][0].startswith("</script>")
    HTMLParser().feed(page)


async def test_a_notebook_shows_the_page(result):
    shown = result._repr_html_()
    assert shown.startswith("<iframe srcdoc=") and "sandbox" in shown


async def test_live_progress_is_silent_in_a_pipe_and_short_in_a_terminal():
    pipe = io.StringIO()
    with live_progress(Console(file=pipe)) as on_step:
        await smc(chain(2), 5, on_step=on_step)
    assert pipe.getvalue() == ""
    terminal = io.StringIO()
    with live_progress(Console(file=terminal, force_terminal=True, width=60)) as on_step:
        result = await smc(chain(2), 5, on_step=on_step)
    assert "step 0" in terminal.getvalue()
    assert len(picture(result.steps[0], 0, 60, 3).renderables) == 4


async def test_diagnostics_have_one_row_per_step(result):
    found = result.diagnostics
    assert {len(column) for column in found} == {len(result.steps)}
    assert found.log_evidence[-1] == pytest.approx(result.log_evidence, abs=0.7)
    assert (found.unique_eves[1:] <= found.unique_eves[:-1]).all()
    assert ROW.shape == (3,)
