"""What the walks of the backtracking benchmark do, the same for every peer."""

from __future__ import annotations

TOP_K = 50
MIN_PROBABILITY = 0.01
PHRASES = (
    "I'm sorry",
    "I cannot",
    "I can't",
    "as an AI",
    "language model",
    "it is important to",
    "a testament to",
    "rich tapestry",
    "in conclusion",
    "delve into",
    "once upon",
    "the city of",
    "known for its",
    "a variety of",
    "one of the",
    "as well as",
)
