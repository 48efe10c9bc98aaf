"""Generation that can take tokens back: one loop, pure rules; see `genlm_backend.backtracking.walk`."""

from __future__ import annotations

from genlm_backend.backtracking.chat import ChatPipeline
from genlm_backend.backtracking.generator import GenerationSession, Generator, StepResult
from genlm_backend.backtracking.grammar_rule import GrammarRule
from genlm_backend.backtracking.guide import Correction, Guided, aguide, choose_candidate, guide
from genlm_backend.backtracking.operators import (
    EntropyThreshold,
    LogitThreshold,
    Never,
    NGramOverlap,
    Operator,
    ProbabilityDrop,
    ProbabilityMargin,
    ProbabilityThreshold,
    ProbabilityTrend,
    Repetition,
    operator_rule,
)
from genlm_backend.backtracking.parser import Parser, load_parser, obtain_correction_pairs
from genlm_backend.backtracking.phrases import Phrases, phrases
from genlm_backend.backtracking.procedures import AdaptiveTemperature, Creative, Human, Replace, Tell
from genlm_backend.backtracking.providers import BaseProvider, TransformersProvider
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
from genlm_backend.backtracking.sampler import BacktrackSampler, TokenStream
from genlm_backend.backtracking.stopping import StopStrings
from genlm_backend.backtracking.strategies import (
    AdaptiveTemperatureStrategy,
    AntiSlopStrategy,
    BaseStrategy,
    ChainStrategy,
    CreativeWritingStrategy,
    DebugStrategy,
    HumanGuidanceStrategy,
    ReplaceStrategy,
)
from genlm_backend.backtracking.text_models import OpenAICompatible
from genlm_backend.backtracking.trace import Trace
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
    "Correction",
    "GrammarRule",
    "Guided",
    "OpenAICompatible",
    "Parser",
    "aguide",
    "choose_candidate",
    "guide",
    "load_parser",
    "obtain_correction_pairs",
    "AdaptiveTemperature",
    "AdaptiveTemperatureStrategy",
    "AllOf",
    "AntiSlopStrategy",
    "BacktrackSampler",
    "BaseProvider",
    "BaseStrategy",
    "Budget",
    "ChainStrategy",
    "ChatPipeline",
    "Choices",
    "Creative",
    "CreativeWritingStrategy",
    "DebugStrategy",
    "End",
    "EntropyThreshold",
    "Event",
    "Forced",
    "GenerationSession",
    "Generator",
    "Halt",
    "Human",
    "HumanGuidanceStrategy",
    "KEEP",
    "Keep",
    "LogitThreshold",
    "NGramOverlap",
    "Never",
    "Operator",
    "Outcome",
    "Overlay",
    "Phrases",
    "ProbabilityDrop",
    "ProbabilityMargin",
    "ProbabilityThreshold",
    "ProbabilityTrend",
    "Prompt",
    "Regexes",
    "Repetition",
    "Replace",
    "ReplaceStrategy",
    "Retract",
    "Rule",
    "Sees",
    "Splice",
    "Step",
    "StepResult",
    "StopStrings",
    "Tell",
    "Token",
    "Trace",
    "TokenStream",
    "TransformersProvider",
    "Undo",
    "Walk",
    "all_of",
    "operator_rule",
    "phrases",
    "regexes",
    "rule",
    "walk",
]
