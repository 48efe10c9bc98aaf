"""A self-contained HTML page that replays a run step by step: texts, weights, who descends from whom."""

from __future__ import annotations

import html
import json
from importlib.resources import files
from typing import TYPE_CHECKING

from genlm_backend.smc.frames import frames

if TYPE_CHECKING:
    from genlm_backend.smc.result import Result


def page(result: Result, title: str = "Particles") -> str:
    """The page as text; it loads nothing from elsewhere and runs from a file."""
    data = {
        "summary": str(result),
        "settings": result.settings._asdict(),
        "frames": [frame._asdict() for frame in frames(result)],
    }
    # "<" is written as an escape, so that no text of a model can end the script.
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    template = files("genlm_backend.smc").joinpath("page.html").read_text(encoding="utf-8")
    return template.replace("__TITLE__", html.escape(title)).replace("__DATA__", text)


def inline(result: Result) -> str:
    """The page within a notebook's cell."""
    return (
        f'<iframe srcdoc="{html.escape(page(result), quote=True)}" style="width:100%;height:560px;border:0" '
        'sandbox="allow-scripts"></iframe>'
    )
