"""This package without guesses: one forward pass for each token of a text."""

from __future__ import annotations

from benchmark.peers.grammar_walk import GrammarWalk
from benchmark.worker import serve


class GrammarWalkPlain(GrammarWalk):
    speculate = 0


if __name__ == "__main__":
    serve(GrammarWalkPlain)
