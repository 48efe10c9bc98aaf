"""Grammars from strangers are refused by name, or cost little."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from genlm_backend.errors import GrammarTooComplex
from genlm_backend.potentials import Grammar, GrammarVocabulary, Limits
from genlm_backend.tokenization import Token
from tests.potentials.hostile import HOSTILE

pytestmark = pytest.mark.thorough

SECONDS, MEBIBYTES = 2.0, 200.0

RUN = """
import json, resource, sys, time
from genlm_backend.errors import GenlmError, InvalidGrammar
from genlm_backend.potentials import Grammar, GrammarVocabulary, Limits
from genlm_backend.tokenization import Token
from tests.potentials.hostile import HOSTILE

triples = {(a + b + c).encode() for a in "abx{[" for b in 'ax"12' for c in "ax]}:"}
words = [bytes([i]) for i in range(256)] + sorted(triples)
vocabulary = GrammarVocabulary([Token(i, word) for i, word in enumerate(words)])
makers = {"json": Grammar.json_schema, "regex": Grammar.regex, "lark": Grammar.lark}
Grammar.regex(vocabulary, "a")

def peak():
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    with open("/proc/self/status") as status:  # ru_maxrss begins with the peak of the process that started this one
        return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 1024

def outcome(kind, text):
    try:
        grammar = makers[kind](vocabulary, text, limits=Limits.untrusted())
        state = grammar.start()
        for step in range(60):
            allowed = grammar.mask(state)[:-1].nonzero()[0]
            if not len(allowed):
                break
            state = grammar.extend(state, int(allowed[step * 7919 % len(allowed)]))
        return f"{step} steps"
    except InvalidGrammar as error:
        return type(error).__name__

before = peak()
for name in sys.argv[1:]:
    started = time.process_time()  # on a machine that does nothing else these are seconds
    what = outcome(*HOSTILE[name])
    print(json.dumps([name, what, time.process_time() - started, peak() - before]), flush=True)
"""


@pytest.mark.parametrize("first", range(0, len(HOSTILE), 8))
def test_hostile_grammars_are_refused_or_cheap(first: int) -> None:
    """In a process of its own, whose peak of memory is theirs, and whose end would be seen."""
    names = list(HOSTILE)[first : first + 8]
    ran = subprocess.run([sys.executable, "-c", RUN, *names], capture_output=True, text=True, timeout=60, check=False)
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [line[0] for line in lines] == names, ran.stderr[-2000:]
    for name, what, seconds, mebibytes in lines:
        assert seconds <= SECONDS, f"{name}: {what} after {seconds:.1f} s"
        assert mebibytes <= MEBIBYTES, f"{name}: {what} with {mebibytes:.0f} MiB"


def test_there_are_enough_of_them() -> None:
    assert len(HOSTILE) >= 20


@pytest.mark.parametrize(
    ("limits", "grammar"),
    [
        ({"source_bytes": 10}, 'start: "a" "b" "c"'),
        ({"nesting": 2}, 'start: ((("a")))'),
        ({"lexer_states": 20}, "start: /[ab]*a[ab]{25}/"),
        ({"row_items": 20}, 'start: e\ne: e e e | e e | "a"'),
        ({"grammar_symbols": 20}, "start: " + " | ".join(f'"{i}" start "x"' for i in range(30))),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_each_limit_is_kept_by_its_error(limits: dict[str, Any], grammar: str) -> None:
    vocabulary = GrammarVocabulary([Token(i, bytes([i])) for i in range(256)])
    text = b"a" * 40 if "row_items" in limits else b"ab" * 20

    def use(bounds: Limits) -> None:
        made = Grammar.lark(vocabulary, grammar, limits=bounds)
        state = made.start()
        for byte in text:
            if made.mask(state)[byte]:
                state = made.extend(state, byte)

    use(Limits())
    with pytest.raises(GrammarTooComplex):
        use(Limits(**limits))
