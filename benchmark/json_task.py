"""What the peers of `benchmark.grammars` write: a JSON object with ten pairs of strings, and when it counts as one.

Imported in the environments of all peers: only the standard library here.
"""

from __future__ import annotations

import json

PROMPT = "Here is a really long JSON object, with 10 keys, using only string values:\n\n```json\n"
N_PAIRS = 10
TEMPERATURE, TOP_P = 0.6, 0.9  # for all: the defaults of `guide`, there and here
LOOKAHEAD, MAX_CORRECTIONS = 20, 20  # of the published benchmark

# The same language for all: strings of at most so many characters of printable ASCII, without escapes, and white space
# between the parts. Bounded, so that texts end: a small model goes on with "users.users.users" for ever.
MOST_IN_A_STRING, MOST_BLANKS = 24, 8
_CHARACTER, _BLANK = r"[ !#-\[\]-~]", r"[ \t\n]"
_STRING = f'"{_CHARACTER}{{0,{MOST_IN_A_STRING}}}"'

LARK = f"""
start: "{{" pair ("," pair)~{N_PAIRS - 1} "}}"
pair: STRING ":" STRING
STRING: /{_STRING}/
WS: /{_BLANK}+/
%ignore WS
"""
"""With any amount of white space: correction must not take it for a terminal to choose."""

BOUNDED_LARK = f"""
start: "{{" WS? pair ("," WS? pair)~{N_PAIRS - 1} "}}"
pair: STRING WS? ":" WS? STRING WS?
STRING: /{_STRING}/
WS: /{_BLANK}{{1,{MOST_BLANKS}}}/
"""
"""With so much white space: no text is longer than the room that it is given, so each is finished."""


def _nested(name: str, element: str, most: int) -> str:
    """Rules for up to so many elements, each optional within the one before: what that library repeats fastest."""
    rules = [f"{name}{n} ::= ({element} {name}{n - 1})?" for n in range(most, 1, -1)]
    return "\n".join([*rules, f"{name}1 ::= ({element})?"])


_MORE_PAIRS = " ".join(['"," ws pair'] * (N_PAIRS - 1))
EBNF = rf"""
root ::= "{{" ws pair {_MORE_PAIRS} "}}"
pair ::= string ":" ws string
string ::= "\"" c{MOST_IN_A_STRING} "\"" ws
ws ::= b{MOST_BLANKS}
{_nested("c", _CHARACTER, MOST_IN_A_STRING)}
{_nested("b", _BLANK, MOST_BLANKS)}
"""


def is_valid(text: str) -> bool:
    """Whether it parses as JSON and is an object of exactly ten pairs, all values strings.

    A key may come twice: no context-free grammar can forbid it, so the pairs count, not the keys.
    """
    try:
        pairs = json.loads(text, object_pairs_hook=_Pairs)
    except ValueError:
        return False
    return isinstance(pairs, _Pairs) and len(pairs) == N_PAIRS and all(isinstance(value, str) for _, value in pairs)


class _Pairs(list[tuple[str, object]]):
    """The pairs of an object, as written."""
