"""What a grammar reads of a text, and what it expects where it stops; two engines, one answer."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import regex

from genlm_backend.backtracking import Parser, earley, load_parser, obtain_correction_pairs
from genlm_backend.errors import GrammarTooComplex, InvalidGrammar, UnsupportedGrammar
from genlm_backend.potentials import GrammarVocabulary, Limits
from genlm_backend.tokenization import Token
from tests.potentials.hostile import HOSTILE

SHIPPED = {
    "json": (['{"a": [1, -2.5e3, null], "b": {}}', '"\\u00e9"', "true"], ['{"a" 1}', "{'a': 1}", "01", "[1,]"]),
    "arithmetic": (["1 + (2*3)**2", "-4/2"], ["1 +* 2", "(1", "2 2"]),
    "robot": (["  move north 3; repeat 2 { turn left; take lamp }"], ["move up 1", "turn", "repeat 0 { turn left }"]),
    "sql": (
        [
            "SELECT * FROM students WHERE name LIKE 'Dan%';",
            "SELECT DISTINCT s.name AS n, COUNT(*) FROM students AS s LEFT JOIN marks ON s.id = marks.id GROUP BY n",
            "SELECT a FROM t WHERE a NOT IN (1, 2) AND (b IS NOT NULL OR c >= 3.5) ORDER BY a DESC LIMIT 3 OFFSET 1",
            "SELECT a FROM t UNION ALL SELECT b FROM (SELECT b FROM u)",
        ],
        ["SELECT FROM t", "SELECT a FROM t WHERE name SIMILAR TO 'x'", "DELETE FROM t"],
    ),
}
PRIORITY = 'start: word+\nword: A | B\nA.2: "a"\nB: /[a-c]/\n'
TEMPLATE = 'start: _list{NUMBER}\n_list{item}: item ("," item)*\nNUMBER: /[0-9]+(\\.[0-9]+)?/\n'


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_grammars_read_what_they_should(name: str) -> None:
    parser = load_parser(name)
    assert parser.engine == "llguidance", parser.refusal
    good, bad = SHIPPED[name]
    for text in good:
        assert parser.is_valid(text) and parser.is_viable(text), text
    for text in bad:
        assert not parser.is_valid(text), text


@pytest.mark.thorough
def test_the_published_correction() -> None:
    """The part that is read keeps its white space."""
    prefix, candidates = obtain_correction_pairs(
        "SELECT * FROM students WHERE name SIMILAR TO 'Dan%';", load_parser("sql")
    )
    assert (prefix, len(prefix)) == ("SELECT * FROM students WHERE name ", 34)
    assert {"IN", ">", "=", "NOT", "BETWEEN", "LIKE"} <= set(candidates)
    assert all(load_parser("sql").is_viable(prefix + candidate) for candidate in candidates)


def test_candidates_are_strings_that_know_what_they_are() -> None:
    """They print, compare and travel as strings."""
    _, candidates = obtain_correction_pairs('{"a": ,', load_parser("json"))
    assert json.loads(json.dumps(candidates)) == candidates == [str(text) for text in candidates]
    assert [text.is_regex for text in candidates] == [text.startswith(("-?(0|", '"(')) for text in candidates]
    assert {text.is_regex for text in candidates} == {True, False}
    flagged = obtain_correction_pairs("", load_parser('start: "select"i | "x"\n'))[1]
    assert [(text, text.is_regex, text.flags) for text in pickle.loads(pickle.dumps(flagged))] == [
        ("select", False, "i"),
        ("x", False, ""),
    ]


def test_terminals_are_told_by_their_expressions() -> None:
    prefix, candidates = obtain_correction_pairs('{"a": ,', load_parser("json"))
    assert prefix == '{"a": '
    assert "null" in candidates and any(candidate.startswith("-?(0|") for candidate in candidates)
    assert obtain_correction_pairs("[1]", load_parser("json")) == ("[1]", [])


@pytest.mark.parametrize(
    ("name", "text", "n"),
    [
        ("sql", "SELECT a WHE", 12),
        ("sql", "SELEC", 5),
        ("sql", "SELECX", 5),
        ("json", '{"key', 5),
        ("json", '{"é": tru', 9),
        ("json", '{"é": trx', 8),
        ("arithmetic", "", 0),
        ("arithmetic", "1.", 2),
    ],
)
def test_unfinished_text_is_alive(name: str, text: str, n: int) -> None:
    parser = load_parser(name)
    assert parser.n_viable(text) == n
    assert parser.is_viable(text) == (n == len(text))


@pytest.mark.parametrize(("grammar", "text", "n"), [(TEMPLATE, "1,2.", 4), (TEMPLATE, "1,,", 2), (PRIORITY, "abx", 2)])
def test_what_llguidance_lacks_runs_on_lark(grammar: str, text: str, n: int) -> None:
    parser = load_parser(grammar)
    assert parser.engine == "lark"
    assert parser.n_viable(text) == n
    constraint = parser.constraint(GrammarVocabulary([Token(i, bytes([i])) for i in range(256)]))
    with pytest.raises(UnsupportedGrammar, match="no masks"):
        constraint.mask(constraint.start())
    assert load_parser(TEMPLATE).is_valid("1,2.5,3") and not load_parser(TEMPLATE).is_valid("1,")


@pytest.mark.parametrize("name", ["json", "arithmetic", "robot"])
def test_both_engines_agree(name: str) -> None:
    both = load_parser(name), load_parser(name)
    both[1]._grammar = None
    good, bad = SHIPPED[name]
    for text in [*good, *bad]:
        for end in range(0, len(text) + 1, 3):
            here = text[:end]
            assert both[0].is_valid(here) == both[1].is_valid(here), here
            assert both[0].n_viable(here) == both[1].n_viable(here), here


def test_flags_count_on_both_engines() -> None:
    """Terminals in either case are begun in either case, and told with their flags."""
    grammar = 'start: _list{item}\n_list{x}: x ("," x)*\nitem: "select"i | WORD\nWORD: /x+ y/is\n'
    parser = load_parser(grammar)
    assert parser.engine == "lark"
    for text in ("SELECT,SELEC", "sElEcT,X", "xX Y,Select"):
        assert parser.is_viable(text), text
    assert parser.n_viable("SELECT,SELEX") == 11
    candidates = {candidate.text: candidate for candidate in parser.expected("SELECT,").candidates}
    assert candidates["select"].pattern == "(?i:select)" and set(candidates["x+ y"].flags) == set("is")
    plain = load_parser('start: "a"i /b/ "."\n')
    assert plain.engine == "llguidance" and plain.is_viable("A") and not plain.is_viable("AB")
    assert [candidate.pattern for candidate in plain.expected("Ab").candidates] == [r"\."]


@pytest.mark.parametrize("rule", ["start: A\n", "start: _twice{A}\n_twice{x}: x x\n"])
def test_a_terminal_that_looks_around_is_refused_by_name(rule: str) -> None:
    with pytest.raises(UnsupportedGrammar, match=r"(?s)terminal A.*look-around"):
        load_parser(rule + "A: /a(?=b)b/\n")


def test_terminals_that_are_only_declared_are_refused_by_name() -> None:
    for more in ("", "y{t}: t\nz: y{A}\n"):  # for llguidance too, and for lark alone
        with pytest.raises(UnsupportedGrammar, match="%declare of INDENT, UNDER"):
            load_parser(f'%declare UNDER INDENT\nstart: A UNDER INDENT\nA: "a"\n{more}')
    unused = load_parser('%declare INDENT\nstart: A\nA: "a"\n')
    assert unused.is_valid("a")


def test_strings_of_larks_library_are_read_though_they_look_behind() -> None:
    rule = 'start: _list{ESCAPED_STRING}\n_list{x}: x ("," x)*\n%import common.ESCAPED_STRING\n'
    parser = load_parser(rule)
    assert parser.engine == "lark"
    text = r'"a\"b","c\\","d'
    assert parser.is_viable(text) and parser.is_valid(text + '"')
    assert parser.n_viable(r'"c\\"d"') == 5
    (candidate,) = parser.expected("").candidates
    assert "(?<!" in candidate.text and "(?<!" not in candidate.pattern and parser.opening(candidate) == '"'


HOSTILE_LARK = sorted(name for name, (kind, _) in HOSTILE.items() if kind == "lark")
LOAD = """
import json, resource, sys, time
from genlm_backend.backtracking import load_parser
from genlm_backend.errors import InvalidGrammar
from genlm_backend.potentials import Limits
from tests.potentials.hostile import HOSTILE

def peak():
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    with open("/proc/self/status") as status:  # ru_maxrss begins with the peak of the process that started this one
        return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 1024

def outcome(grammar):
    try:
        return load_parser(grammar, limits=Limits.untrusted()).engine
    except InvalidGrammar as error:
        return type(error).__name__

load_parser("arithmetic")
before = peak()
for name in sys.argv[1:]:
    started = time.process_time()
    what = outcome(HOSTILE[name][1])
    print(json.dumps([name, what, time.process_time() - started, peak() - before]), flush=True)
"""


@pytest.mark.thorough
def test_hostile_grammars_are_refused_or_loaded_cheaply() -> None:
    """In a process of its own, whose peak of memory is theirs, and whose end would be seen."""
    command = [sys.executable, "-c", LOAD, *HOSTILE_LARK]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [line[0] for line in lines] == HOSTILE_LARK, ran.stderr[-2000:]
    told = {name: what for name, what, _, _ in lines}
    assert {told[name] for name in ("deep groups", "doubling terminals", "long rule")} == {"GrammarTooComplex"}
    assert told["terminal of itself"] == "InvalidGrammar"
    for name, what, seconds, mebibytes in lines:
        assert seconds <= 2, f"{name}: {what} after {seconds:.1f} s"
        assert mebibytes <= 200, f"{name}: {what} with {mebibytes:.0f} MiB"


# What only lark reads, because of a priority or a template, with a text that hurts; and what hurts lark while it loads.
ONLY_LARK = {
    "ambiguous": ('start: e\ne.2: e e | e e e | "a"\n', "a" * 300),
    "very ambiguous": ('start: e\ne.2: e e | e e e | e e e e | e? e? | "a" | "a" "a"\n', "a" * 300),
    "cycle": ('start.2: a\na: b | "x"\nb: a | a b\n', "x" * 100),
    "nested stars": ('start.2: (("a"*)*)*\n', "a" * 200),
    "palindromes": ('start: p\np.2: "a" p "a" | "b" p "b" | "a" | "b" | \n', "ab" * 200),
    "right recursion": ('start: r\nr.2: "a" r | \n', "a" * 3000),
    "expression that backtracks": ("start: (A|B)+\nA.2: /(a|aa)+b/\nB: /a/\n", "a" * 60),
    "long and unfinished": ("start: (A|B)+\nA.2: /a{1,1000}b/\nB: /a/\n", "a" * 800 + "c"),
    "empty parts": ('start.2: a0 "x"\n' + "".join(f"a{i}: a{i + 1} a{i + 1}\n" for i in range(30)) + 'a30: ["y"]', "x"),
    "options": ("start: " + " ".join(f'"{chr(97 + i)}"?' for i in range(26)) + "\n", "abc"),
    "options of a priority": ("start.2: " + " ".join(f'["{i}"]' for i in range(40)) + "\n", "1"),
    "alternatives": ("start.2: " + " ".join(f'("{i}"|"a{i}")' for i in range(40)) + "\n", "1"),
    "chain": ("start.2: a0\n" + "".join(f"a{i}: a{i + 1}\n" for i in range(3000)) + 'a3000: "y"\n', "y"),
    "template that grows": ('start: f{"a"}\nf{x}: f{g{x}} | x\ng{x}: "(" x ")"\n', "a"),
    "template that doubles": ('start: f{"a"}\nf{x}: f{g{x,x}} | x\ng{x,y}: x y\n', "a"),
    "doubling templates": (
        'start: f0{"a"}\n'
        + "".join(f"f{i}{{x}}: f{i + 1}{{g{{x,x}}}}\n" for i in range(40))
        + "f40{x}: x\ng{x,y}: x y\n",
        "a",
    ),
}
ASK = """
import json, resource, sys, time
from genlm_backend.backtracking import load_parser
from genlm_backend.errors import GrammarTooComplex
from genlm_backend.potentials import Limits
from tests.backtracking.test_parser import ONLY_LARK

def peak():
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    with open("/proc/self/status") as status:  # ru_maxrss begins with the peak of the process that started this one
        return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 1024

def outcome(grammar, text):
    try:
        parser = load_parser(grammar, limits=Limits.untrusted())
        assert parser.engine == "lark", parser.engine
        return parser.n_viable(text)
    except GrammarTooComplex as error:
        return str(error)

load_parser("arithmetic")
for name in sys.argv[1:]:
    before, started = peak(), time.process_time()
    what = outcome(*ONLY_LARK[name])
    print(json.dumps([name, what, time.process_time() - started, peak() - before]), flush=True)
"""


@pytest.mark.thorough
@pytest.mark.timeout(300)
def test_what_only_lark_reads_is_refused_or_cheap() -> None:
    """Loading and one question."""
    command = [sys.executable, "-c", ASK, *ONLY_LARK]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [line[0] for line in lines] == list(ONLY_LARK), ran.stderr[-2000:]
    told = {name: what for name, what, _, _ in lines}
    assert "text of 300 characters" in told["very ambiguous"] and "text of 60" in told["expression that backtracks"]
    assert "too long to load" in told["options"] and "too long to load" in told["alternatives"]
    assert all("templates" in told[name] for name in told if "template" in name)
    assert told["empty parts"] == 1
    for name, what, seconds, mebibytes in lines:
        assert seconds <= 2, f"{name}: {what} after {seconds:.1f} s"
        assert mebibytes <= 200, f"{name}: {what} with {mebibytes:.0f} MiB"


@pytest.mark.thorough
@pytest.mark.parametrize(
    "grammar",
    [
        "start: " + "a" * 99_000 + "\n",
        "a" * 99_000 + "\n",
        'start: "' + '\\"' * 49_000 + "\n",
        'start: "a"\n' + "\n" * 98_000,
        'start: "a"\n' + "\r\n" * 49_000,
    ],
    ids=["name", "no rule", "quotes", "blank", "blank too"],
)
def test_long_lines_are_refused_soon(grammar: str) -> None:
    """Expressions that go back over what they matched take time with the square of the length."""
    started = time.thread_time()
    with pytest.raises(InvalidGrammar):
        load_parser(grammar, limits=Limits.untrusted())
    assert time.thread_time() - started < 2


def test_templates_that_end_are_not_refused() -> None:
    """Recursion with the same argument, and templates within templates."""
    grammar = """
        start: _list{pair{WORD, tree{WORD}}}
        _list{x}: _separated{x, ","}
        _separated{x, separator}: x (separator x)*
        pair{x, y}: x ":" y
        tree{x}: x | "(" tree{x} tree{x} ")"
        WORD: /[a-z]+/
    """
    parser = load_parser(grammar, limits=Limits.untrusted())
    assert parser.engine == "lark"
    assert parser.is_valid("a:(b(cd)e),f:g") is False and parser.is_valid("a:((bc)(de)),f:g") is False
    assert parser.is_valid("a:(b(c(de))),f:g") is False and parser.is_viable("a:((b")
    with pytest.raises(GrammarTooComplex, match="templates"):
        load_parser('start: f{g{"aaaaaaaaaa"}}\nf{x}: h{g{x}}\nh{x}: x\ng{x}: x\n', limits=Limits(source_bytes=60))


def test_what_is_skipped_is_unfinished_only_where_it_may_begin() -> None:
    grammar = 'start.2: WORD "d"\nWORD: /ab#c/\n%ignore /#[^!]*!/\n'
    parser = load_parser(grammar)
    assert parser.engine == "lark"
    assert parser.n_viable("ab#cxy") == 4, "the # is within a word"
    assert parser.is_viable("#skipped") and parser.is_viable("ab#c#skip") and parser.is_valid("ab#c#s!d#s!")
    assert parser.is_viable("ab#cd#sk"), "after the end"


@pytest.mark.parametrize(
    ("grammar", "text", "goes_on"),
    [
        ('start: "a" REST?\nREST.2: /.+/\n', "a", True),
        ('start: "a" REST?\nREST.2: /.+/\n', "a\uffff", True),
        ("start: A\nA.2: /a{1,3}/\n", "aa", True),
        ("start: A\nA.2: /a{1,3}/\n", "aaa", False),
        ('start: x{"a"}\nx{y}: y\n%ignore "é"\n', "a", True),
        ('start: x{"a"}\nx{y}: y\n', "a", False),
    ],
)
def test_what_may_follow_a_whole_text_on_lark(grammar: str, text: str, goes_on: bool) -> None:
    parser = load_parser(grammar)
    assert parser.engine == "lark" and parser.is_valid(text)
    assert parser.may_go_on(text) == goes_on
    follows = any(parser.n_viable_bytes(text.encode() + bytes([byte])) > len(text.encode()) for byte in range(256))
    assert follows == goes_on


def test_bytes_within_a_character_are_viable_where_a_terminal_or_what_is_ignored_may_begin() -> None:
    half = "aé".encode()[:2]
    assert load_parser('start: "a" REST?\nREST.2: /.+/\n').n_viable_bytes(half) == 2
    assert load_parser('start: x{"a"}\nx{y}: y\n%ignore "é"\n').n_viable_bytes(half) == 2
    assert load_parser('start: x{"a"} "b"?\nx{y}: y\n').n_viable_bytes(half) == 1


def test_a_terminal_that_is_also_ignored_is_unfinished_where_rules_have_it() -> None:
    parser = load_parser('start: x{"a"} WS "b"\nx{y}: y\nWS: /   /\n%ignore WS\n')
    assert parser.engine == "lark" and parser.is_valid("a   b")
    assert [parser.n_viable(text) for text in ("a ", "a  ", "a  b", "a    b")] == [2, 3, 3, 5]


def test_readings_of_long_texts_are_small() -> None:
    """What may begin is kept once for many positions: 10,000 characters take 0.1 MB and not 2."""
    reading = load_parser(PRIORITY)._earley.read("ab" * 500)
    assert len(reading.begun) == 1001 and len({id(names) for names in reading.begun}) == 1


class Interrupted:
    """An expression whose first match ends with an error."""

    def __init__(self, expression: Any, error: Exception) -> None:
        self._expression = expression
        self._errors = [error]

    def match(self, *arguments: Any, **options: Any) -> Any:
        if self._errors:
            raise self._errors.pop()
        return self._expression.match(*arguments, **options)


def test_time_of_other_threads_and_errors_of_others_are_not_the_grammars() -> None:
    """A match that `regex` gives up is made again while the thread has time; a signal's TimeoutError passes."""
    given_up = TimeoutError("not yet raised")
    try:
        regex.compile("(a|aa)+b").match("a" * 60, timeout=0.001)
    except TimeoutError as error:
        given_up = error
    parser = load_parser(PRIORITY)
    known = parser._earley._expressions
    plain = known["B"]
    known["B"] = Interrupted(plain, given_up)
    assert parser.is_valid("abc")
    known["B"] = Interrupted(plain, TimeoutError("alarm"))
    with pytest.raises(TimeoutError, match="alarm"):
        parser.is_valid("cab")


def test_a_debuggers_trace_survives_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever time runs out, the last call included."""
    n_looks, n_allowed = 0, 10**9

    def look(clock: earley.Clock) -> None:
        nonlocal n_looks
        n_looks += 1
        if n_looks >= n_allowed:
            raise earley._TimeIsUp

    def trace(frame: Any, event: str, argument: Any) -> None:
        return None

    monkeypatch.setattr(earley, "_TICKS", 1)
    monkeypatch.setattr(earley.Clock, "look", look)
    before = sys.gettrace()
    try:
        kept = []  # what was raised, and so the frames of it
        for _ in range(2):  # the first time makes more calls
            n_looks = 0
            earley._loaded(PRIORITY, None, earley.Clock(1))
        n_in_all = n_looks
        for n_allowed in (1, n_in_all // 2, *range(n_in_all - 6, n_in_all + 1)):
            n_looks = 0
            sys.settrace(trace)
            try:
                earley._loaded(PRIORITY, None, earley.Clock(1))
            except GrammarTooComplex as error:
                kept.append(error)
            assert sys.gettrace() is trace, n_allowed
        assert len(kept) >= 3
    finally:
        sys.settrace(before)


@pytest.mark.parametrize(
    "expression", ["#{expr}", r"\p{Foo}", "[z-a]", "a{99999999999999999999}"], ids=["brace", "class", "range", "count"]
)
def test_expressions_that_are_none_are_told_as_errors_of_the_grammar(expression: str) -> None:
    with pytest.raises(InvalidGrammar):
        load_parser(f"start: /{expression}/\n")


def test_limits_are_kept_while_loading() -> None:
    nested = "start: " + "(" * 1500 + '"a"' + ")" * 1500 + "\n"
    with pytest.raises(GrammarTooComplex, match="nest"):
        load_parser(nested)
    with pytest.raises(GrammarTooComplex, match="lark"):
        load_parser(nested, limits=Limits(nesting=10_000))
    with pytest.raises(GrammarTooComplex, match="written out"):
        load_parser('start: A\nA: B B\nB: C C // C\nC: "C" /C/\n', limits=Limits(source_bytes=50))
    with pytest.raises(GrammarTooComplex, match="bytes"):
        load_parser("json", limits=Limits(source_bytes=10))
    with pytest.raises(GrammarTooComplex):  # it is not handed to lark's engine, which keeps no limits
        load_parser("start: /[ab]*a[ab]{25}/" + " B" * 20 + "\nB: /b/\n", limits=Limits(grammar_symbols=10))


def test_grammars_come_from_text_paths_and_names(tmp_path: Path) -> None:
    path = tmp_path / "two.lark"
    path.write_text('start: "two"\n', encoding="utf-8")
    for parser in (load_parser('start: "two"'), load_parser(str(path)), load_parser(lark_grammar_filepath=path)):
        assert isinstance(parser, Parser) and parser.is_valid("two")
    with pytest.raises(InvalidGrammar, match="arithmetic"):
        load_parser("no such grammar")
    with pytest.raises(InvalidGrammar, match="neither"):
        load_parser()
    with pytest.raises(InvalidGrammar):
        load_parser("start: (")


def test_what_lark_writes_is_read() -> None:
    parser = load_parser('start: "x"i ~ 2 WORD\n%import common.WORD\n%import common.WS\n%ignore WS\n')
    assert parser.is_valid("X x word") and not parser.is_valid("x word")
