"""Generation that can take tokens back: one loop, pure rules; see `genlm_backend.backtracking.walk`."""

from __future__ import annotations

from genlm_backend.backtracking.phrases import Phrases, phrases
from genlm_backend.backtracking.regexes import Regexes, regexes
from genlm_backend.backtracking.rules import (
    KEEP,
    AllOf,
    Choices,
    Halt,
    Keep,
    Prompt,
    Rule,
    Sees,
    Splice,
    Step,
    Undo,
    all_of,
    rule,
)
from genlm_backend.backtracking.stopping import StopStrings
from genlm_backend.backtracking.walk import (
    Budget,
    End,
    Event,
    Forced,
    Outcome,
    Overlay,
    Retract,
    Token,
    Walk,
    walk,
)

__all__ = [
    "Phrases",
    "phrases",
    "Regexes",
    "regexes",
    "AllOf",
    "Budget",
    "Choices",
    "End",
    "Event",
    "Forced",
    "Halt",
    "KEEP",
    "Keep",
    "Outcome",
    "Overlay",
    "Prompt",
    "Retract",
    "Rule",
    "Sees",
    "Splice",
    "Step",
    "StopStrings",
    "Token",
    "Undo",
    "Walk",
    "all_of",
    "rule",
    "walk",
]
