"""Phrases and expressions are found in bytes, whatever the tokens, and taken back to their start."""

from __future__ import annotations

import itertools
import random
import re
import string

import pytest
import regex

from genlm_backend.backtracking import Keep, Prompt, Retract, Step, Undo, phrases, regexes, walk
from genlm_backend.backtracking.automaton import Automaton
from genlm_backend.tokenization import Token
from tests.backtracking.speaker import chooser, speaker


def fed(rule, pieces, prompt=b"", special=()):
    """The verdicts on pieces that come one after another, as if each were kept."""
    vocab = [Token(0, prompt)]
    state = rule.init(Prompt((0,) if prompt else (), vocab))
    verdicts = []
    for i, piece in enumerate(pieces):
        step = Step(i, piece, (), -1.0, -1.0, is_special=piece in special, byte_vocab=[Token(0, b" "), Token(1, b"x")])
        state, verdict = rule.step(state, step)
        verdicts.append(verdict)
    return verdicts, rule.end(state)


def undos(rule, pieces, **options):
    verdicts, end = fed(rule, pieces, **options)
    return [(i, v.n) for i, v in enumerate([*verdicts, end]) if isinstance(v, Undo)]


@pytest.mark.parametrize(
    ("phrase", "pieces", "expected"),
    [
        ("tapestry", [b" tap", b"estry", b" of"], [(2, 3)]),
        ("tapestry", [b" TAP", b"estry", b"!"], [(2, 3)]),  # without case
        ("tapestry", [b"t", b"ap", b"est", b"ry"], [(4, 4)]),  # another segmentation; judged where the text ends
        ("so", [b"So", b"me"], []),  # not within a word
        ("so", [b"al", b"so", b" on"], []),
        ("so", [b"So", b"."], [(1, 2)]),
        ("as an AI", [b" as", b" an", b" ai", b" model"], [(3, 4)]),
        ("***", [b"a**", b"*b"], [(1, 2)]),  # no word: at once
        ("é!", ["É".encode()[:1], "É".encode()[1:], b"!"], [(2, 3)]),  # a character in two tokens
        ("日本", ["日".encode(), "本".encode()[:1], "本".encode()[1:], b"."], [(3, 4)]),
        ("a b", [b"xx a b yy"], [(0, 1)]),  # inside one token
    ],
)
def test_a_phrase_is_found_across_tokens(phrase, pieces, expected):
    assert undos(phrases(phrase), pieces) == expected


@pytest.mark.parametrize("said", ["Elara", "elara", "ELARA", "eLaRa"])
def test_a_phrase_with_capitals_is_found_in_any_case_as_a_whole(said):
    """Kept in its own case and read in lower case, it is not found, and only its first token is penalised."""
    pieces = [b" the", b" " + said[:2].encode(), said[2:].encode(), b"."]
    verdicts, _ = fed(phrases({"Elara": 0.25}), pieces)
    assert [verdict.keep for verdict in verdicts if isinstance(verdict, Undo)] == [0.25]
    assert undos(phrases({"Elara": 0.25}), pieces) == [(3, 3)]
    assert undos(phrases("Elara", fold=False), pieces) == ([(3, 3)] if said == "Elara" else [])
    assert undos(phrases("Elara"), [b" El", b"bow", b"."]) == [], "its first token alone is innocent"


def test_without_edges_and_with_case():
    assert undos(phrases("so", words=False), [b"Some"]) == [(0, 1)]
    assert undos(phrases("so", words=False, fold=False), [b"Some"]) == []


def test_a_phrase_that_begins_in_the_prompt_is_found():
    assert undos(phrases("language model"), [b" mo", b"del", b","], prompt=b"As a language") == [(2, 3)]
    assert undos(phrases("language"), [b" model"], prompt=b"As a language") == []  # wholly in the prompt: not ours


def test_the_name_of_a_special_token_is_found_and_no_phrase_crosses_another():
    assert undos(phrases("</think>"), [b"a", b"</think>"], special=[b"</think>"]) == [(1, 1)]
    assert undos(phrases("ab"), [b"a", b"<end>", b"b", b" "], special=[b"<end>"]) == []
    assert undos(phrases("end"), [b"<end>"], special=[b"<end>"]) == []


def test_a_character_that_stays_partial_belongs_to_the_token_it_began_in():
    pieces = [b"b", b"ad", b"\xe3", b"<end>"]
    for rule in (phrases("bad"), regexes(r"\bbad\b")):
        assert undos(rule, pieces, special=[b"<end>"]) == [(3, 4)]


@pytest.mark.parametrize(
    ("pieces", "tail"),
    [
        ([b"bad", "。".encode()], 3),
        ([b"bad", "。".encode()[:1], "。".encode()[1:]], 3),
        ([b"bad", b" \xe3"], 2),
        ([b"bad", "!。".encode()], 4),
        ([b"bad"], 0),
        ([b"bad", b"\xe3"], 1),
        ([b"bad", b"<end>"], 0),
        ([b"bad", b"\xe3", b"<end>"], 1),
        (["\u0130 bad。".encode()], 3),  # its small letter has a byte more
        ([b"\xff bad \xff!"], 3),
    ],
)
@pytest.mark.parametrize("rule", [phrases("bad"), regexes(r"\bbad\b")])
def test_what_comes_after_a_fault_is_counted_in_bytes(rule, pieces, tail):
    verdicts, end = fed(rule, pieces, special=[b"<end>"])
    assert [verdict.tail for verdict in [*verdicts, end] if isinstance(verdict, Undo)] == [tail]


def test_first_tokens_can_be_left_out():
    assert undos(phrases("a", words=False, skip_tokens=2), [b"a", b"a", b"a"]) == [(2, 1)]


def test_text_is_held_back_only_while_a_phrase_can_still_match():
    verdicts, _ = fed(phrases("rich tapestry"), [b"A", b" rich", b" tap", b" dance", b" rich"])
    assert verdicts == [Keep(0), Keep(1), Keep(2), Keep(0), Keep(1)]
    verdicts, _ = fed(phrases("rich tapestry"), [b" enrich", b" t"])
    assert verdicts == [Keep(0), Keep(0)], "no phrase begins within a word"


def test_the_ban_that_reaches_furthest_back_counts_and_penalties_come_after_bans():
    rule = phrases({"b!": 0.0, "a b!": 0.0, "!": 0.5})
    assert undos(rule, [b"a ", b"b", b"!"]) == [(2, 3)]
    verdicts, _ = fed(phrases({"b!": 0.5, "!": 0.5}), [b"b", b"!"])
    assert verdicts[1].keep == 0.25


@pytest.mark.parametrize("bad", [{"": 0}, {"a": 1.0}, {"a": -0.1}, {}])
def test_what_is_no_phrase_is_refused(bad):
    with pytest.raises(ValueError):
        phrases(bad)


def test_the_automaton_finds_what_a_plain_search_finds():
    rng = random.Random(0)
    for _ in range(50):
        words = {"".join(rng.choices("ab", k=rng.randint(1, 5))) for _ in range(6)}
        text = "".join(rng.choices("abc", k=60))
        automaton, at = Automaton(sorted(words)), 0
        for i, character in enumerate(text):
            at = automaton.step(at, character)
            expected = sorted((len(w) for w in words if text[: i + 1].endswith(w)), reverse=True)
            assert list(automaton.lengths[at]) == expected


@pytest.mark.parametrize(
    ("pattern", "pieces", "expected"),
    [
        (r"\d{3}-\d{4}", [b"call 55", b"5-1", b"234", b" now"], [(2, 3)]),
        (r"\bSo\b", [b"So", b"me"], []),
        (r"\bSo\b", [b"So", b" on"], [(1, 2)]),
        (r"\bSo\b", [b"So"], [(1, 1)]),  # judged where the text ends
        (r"a+b", [b"aa", b"a", b"b"], [(2, 3)]),
        ("é", [b"\xc3", b"\xa9"], [(1, 2)]),
    ],
)
def test_an_expression_is_found_across_tokens(pattern, pieces, expected):
    assert undos(regexes(pattern), pieces) == expected


def test_expressions_hold_back_a_partial_match_and_refuse_the_empty_one():
    verdicts, _ = fed(regexes(r"\d{3}-\d{4}"), [b"a", b"55", b"5-", b"x"])
    assert [v.hold for v in verdicts] == [0, 1, 2, 0]
    with pytest.raises(ValueError, match="empty text"):
        regexes("a*")
    with pytest.raises(ValueError, match="malformed"):
        regexes("(")


def test_a_match_that_stays_hides_no_other_match_nor_what_is_held_back():
    assert undos(regexes("bad"), [b" bad"], prompt=b"bad") == [(0, 1)]
    assert undos(regexes("aba"), [b"ba"], prompt=b"aba") == [(0, 1)], "across the one of the prompt"
    rule = regexes(r"bad|not bad at|\d{3}-\d{4}", keep=0.5)
    verdicts, end = fed(rule, [b" bad", b" 55", b"5-1", b" bad", b" not", b" bad", b" at", b"."])
    told = [(v.n, v.keep, v.otherwise) if isinstance(v, Undo) else v for v in [*verdicts, end]]
    kept = [(1, 0.5, Keep(0)), Keep(1), Keep(2), (1, 0.5, Keep(0)), Keep(1), (1, 0.5, Keep(2)), (3, 0.5, Keep(0))]
    assert told == [*kept, Keep(0), Keep(0)]
    assert fed(rule, [b"5-"], prompt=b"bad 55")[0] == [Keep(1)]


def test_each_match_is_judged_once_and_as_what_it_is():
    verdicts, _ = fed(regexes("bad", keep=0.5), [b"bad bad", b" ", b"."])
    assert [verdict.keep for verdict in verdicts if isinstance(verdict, Undo)] == [0.25]
    verdicts, end = fed(regexes(r"[ab]+c\b", keep=0.5), [b"abc"])
    assert isinstance(verdicts[0], Keep) and end.keep == 0.5 and end.n == 1
    verdicts, end = fed(regexes(r"[ab]+c\b", keep=0.5), [b"abc", b".", b"."])
    assert [verdict.keep for verdict in [*verdicts, end] if isinstance(verdict, Undo)] == [0.5]


def test_what_one_expression_waits_for_is_nothing_to_another():
    assert undos(regexes(["bad", r"\bSo\b"]), [b" So", b"me"], prompt=b"bad") == []
    assert undos(regexes(["bad", r"\bSo\b"]), [b" So", b" me"], prompt=b"bad") == [(1, 2)]


def test_an_expression_may_look_ahead_into_later_tokens():
    assert undos(regexes("foo(?= bar)"), [b" foo", b" b", b"ar"]) == [(2, 3)]
    for pieces in ([b" b", b"ar"], [b" bar"]):
        assert undos(regexes("foo(?= bar)"), pieces, prompt=b"foo") == [], "wholly in the prompt: not ours"


def test_ten_thousand_phrases_find_what_a_plain_search_finds():
    rng = random.Random(2)
    words = ["".join(rng.choices(string.ascii_lowercase[:6], k=rng.randint(2, 4))) for _ in range(400)]
    pairs = sorted({f"{a} {b}" for a, b in itertools.product(words, words)})
    banned = rng.sample(pairs, 10_000)
    rule, known, n_found = phrases(banned), set(banned), 0
    for _ in range(60):
        said = [rng.choice(words) for _ in range(6)]
        pieces = [piece for word in said for piece in (f" {word[:2]}".encode(), word[2:].encode()) if piece]
        expected = [i for i, pair in enumerate(itertools.pairwise(said)) if " ".join(pair) in known]
        n_found += bool(expected)
        assert bool(undos(rule, pieces)) == bool(expected), said
    assert 5 < n_found < 55


VOCAB = [b"<prompt>", b"a", b" rich", b" tapestry", b" of", b" cloth", b".", b" So", b"me", b"<eos>"]
SAYS = chooser(
    otherwise={" rich": 1.0},
    **{" rich": {" tapestry": 0.9, " cloth": 0.1}, " tapestry": {" of": 0.7, ".": 0.3}, " cloth": {".": 1.0}},
    **{".": {"<eos>": 1.0}, " of": {" cloth": 1.0}},
)


@pytest.mark.parametrize("mode", ["exact", "local"])
async def test_a_walk_never_says_a_banned_phrase(mode):
    async with speaker(VOCAB, SAYS) as llm:
        for seed in range(20):
            outcome = await walk(llm, [1], phrases("Rich Tapestry"), eos=[9], mode=mode, seed=seed, max_new_tokens=8)
            assert outcome.text == " rich cloth." and outcome.reason == "eos"


LINES = [b"<p>", b"bad", "。".encode(), b"ok", b"\xe3", b"\x80\x82", b"<end>", b"<eos>"]


@pytest.mark.parametrize("mode", ["exact", "local"])
@pytest.mark.parametrize("rule", [phrases("bad"), regexes(r"\bbad\b")])
@pytest.mark.parametrize(("stop", "tokens"), [("。", [2]), ("。", [4, 5]), ("<end>", [6])])
async def test_what_is_banned_stays_banned_before_any_stop_string(stop, tokens, rule, mode):
    """The stop takes more bytes than characters, lies in two tokens, or is no text at all."""
    names = {LINES[i]: LINES[j] for i, j in itertools.pairwise(tokens)}

    def says(text):
        last = next((name for name in names if text.endswith(name)), None)
        if last is not None:
            return {names[last]: 1.0}
        return {LINES[tokens[0]]: 1.0} if text.endswith((b"bad", b"ok")) else {b"bad": 0.9, b"ok": 0.1}

    async with speaker(LINES, says, [b"<end>"]) as llm:
        for seed in range(5):
            outcome = await walk(llm, [0], rule, stop=stop, eos=[7], mode=mode, seed=seed, max_new_tokens=5)
            assert (outcome.text, outcome.reason) == ("ok", "stop")


async def test_an_expression_that_matches_in_the_prompt_is_banned_after_it_too():
    async with speaker(
        [b"<p>", b"bad", b" bad", b" ok", b"<eos>"], chooser(otherwise={" bad": 0.9, " ok": 0.1})
    ) as llm:
        outcome = await walk(llm, [1], regexes("bad"), eos=[4], max_new_tokens=3)
        assert outcome.text == " ok ok ok"


async def test_mode_first_also_removes_what_is_innocent():
    async with speaker(VOCAB, SAYS) as llm:
        outcome = await walk(llm, [1], phrases("Rich Tapestry"), eos=[9], mode="first", seed=0, max_new_tokens=8)
        assert outcome.n_undos >= 1 and not outcome.text.startswith(" rich")  # as AntiSlop does


async def test_in_mode_first_only_the_first_token_is_removed_not_the_ends_of_words_in_its_place():
    vocab = [b"<p>", b"a", b" rich", b" tapestry", b".", b" So", b"<eos>"]
    says = chooser(
        otherwise={" rich": 0.6, " So": 0.4},
        **{" rich": {" tapestry": 1.0}, " tapestry": {".": 1.0}, " So": {"<eos>": 1.0}},
    )
    async with speaker(vocab, says) as llm:
        for seed in range(20):
            outcome = await walk(llm, [1], phrases("rich tapestry"), eos=[6], mode="first", seed=seed, max_new_tokens=6)
            assert outcome.text == " So"


async def test_a_phrase_of_a_kept_head_and_a_new_tail_is_found():
    """` rich` stays when ` cloth` is taken back; what then comes makes the other phrase with it."""
    says = chooser(
        otherwise={" rich": 1.0},
        **{" rich": {" cloth": 0.6, " tapestry": 0.39, " of": 0.01}, " of": {".": 1.0}, ".": {"<eos>": 1.0}},
        **{" cloth": {".": 1.0}, " tapestry": {".": 1.0}},
    )
    whys = []
    async with speaker(VOCAB, says) as llm:
        for seed in range(20):
            outcome = await walk(llm, [1], phrases(["cloth", "rich tapestry"]), eos=[9], seed=seed, max_new_tokens=8)
            assert "cloth" not in outcome.text and "rich tapestry" not in outcome.text
            whys.append([(e.why, e.length) for e in outcome.events if isinstance(e, Retract)])
    spanning = [told for told in whys if [length for _, length in told][:2] == [1, 0]]
    assert spanning, "the tail is taken back, then head and new tail"
    assert all("cloth" in told[0][0] and "rich tapestry" in told[1][0] for told in spanning)


async def test_once_the_word_has_ended_all_its_ends_are_removed_together():
    async with speaker(VOCAB, SAYS) as llm:
        counts = [
            (await walk(llm, [1], phrases("tapestry"), eos=[9], seed=seed, max_new_tokens=8)).n_undos
            for seed in range(60)
        ]
    assert max(counts) == 1, "one rollback, not one for every token that may follow"


async def test_a_phrase_at_the_very_end_is_taken_back():
    async with speaker(VOCAB, SAYS) as llm:
        for seed in range(10):
            outcome = await walk(llm, [1], phrases("tapestry"), eos=[9], seed=seed, max_new_tokens=2)
            assert outcome.text == " rich cloth" and outcome.reason == "length"


def test_random_bans_agree_with_a_plain_search():
    """The reference is `re` on the whole text; tokens are random cuts of it."""
    rng = random.Random(1)
    for _ in range(300):
        text = "".join(rng.choices("ab -" + string.ascii_uppercase[:2], k=rng.randint(1, 30)))
        banned = "".join(rng.choices("abAB -", k=rng.randint(1, 4)))
        cuts = sorted({0, len(text), *(rng.randrange(len(text)) for _ in range(8))})
        pieces = [text[a:b].encode() for a, b in itertools.pairwise(cuts)]
        left = r"(?<!\w)" if re.match(r"\w", banned) else ""
        right = r"(?!\w)" if re.search(r"\w$", banned) else ""
        is_there = re.search(left + re.escape(banned) + right, text, re.IGNORECASE) is not None
        assert bool(undos(phrases(banned), pieces)) == is_there, (banned, pieces)


def test_random_expressions_agree_with_a_search_of_the_whole_text():
    """The reference sees the whole text; tokens are random cuts of it, after a prompt that may match too."""
    rng = random.Random(3)
    for _ in range(300):
        text = "".join(rng.choices("ab .", k=rng.randint(2, 20)))
        word = "".join(rng.choices("ab", k=rng.randint(1, 3)))
        pattern = rng.choice(["", r"\b"]) + word + rng.choice(["", r"\b", "(?= )"])
        n_prompt = rng.randrange(len(text))
        cuts = sorted({n_prompt, len(text), *(rng.randrange(n_prompt, len(text)) for _ in range(8))})
        pieces = [text[a:b].encode() for a, b in itertools.pairwise(cuts)]
        is_there = any(match.end() > n_prompt for match in regex.finditer(pattern, text, overlapped=True))
        told = undos(regexes(pattern), pieces, prompt=text[:n_prompt].encode())
        assert bool(told) == is_there, (pattern, text[:n_prompt], pieces)
