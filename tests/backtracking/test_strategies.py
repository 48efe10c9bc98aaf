"""backtrack_sampler's strategies and sampler: its meaning, and each of its defects."""

from __future__ import annotations

import asyncio
import gc
import itertools
import sys
import threading

import pytest
import torch

from genlm_backend.backtracking import (
    AdaptiveTemperatureStrategy,
    AntiSlopStrategy,
    BacktrackSampler,
    BaseProvider,
    BaseStrategy,
    ChainStrategy,
    CreativeWritingStrategy,
    DebugStrategy,
    HumanGuidanceStrategy,
    ReplaceStrategy,
    menu,
)
from genlm_backend.errors import BackendUnavailable
from tests.backtracking.speaker import chooser, speaker

VOCAB = [b"<p>", b"a", b" So", b" But", b" let", b" me", b" Some", b".", b"<eos>", b"</think>", b"So", b" it", b"c"]
EOS = 8


class Words:
    """A tokenizer for `VOCAB`: the longest words that fit."""

    eos_token_id = EOS

    def encode(self, text, add_special_tokens=True):
        ids, rest = [], text.encode()
        while rest:
            i = max((i for i, word in enumerate(VOCAB) if rest.startswith(word)), key=lambda i: len(VOCAB[i]))
            ids.append(i)
            rest = rest[len(VOCAB[i]) :]
        return ids

    def decode(self, ids):
        return b"".join(VOCAB[i] for i in ids).decode()


def model(special=(b"<p>", b"<eos>"), **likely):
    llm = speaker(VOCAB, chooser(**likely), special)
    llm.tokenizer = Words()
    return llm


def text_of(llm, strategy, seed=0, max_new_tokens=8, **options):
    stream = BacktrackSampler(llm, strategy).generate("<p>", max_new_tokens=max_new_tokens, seed=seed, **options)
    return Words().decode(list(stream))


SO = {"otherwise": {" So": 0.8, " it": 0.2}, "So": {".": 1.0}, "it": {".": 1.0}, ".": {"<eos>": 1.0}}


# ---- AntiSlop


@pytest.mark.parametrize("slops", ["so", ["so"], ["So"], " So"])
def test_slop_is_never_seen(slops):
    llm = model(**SO)
    assert {text_of(llm, AntiSlopStrategy(llm, slops), seed=s) for s in range(10)} == {" it.<eos>"}


def test_a_word_inside_another_is_left_alone():
    llm = model(otherwise={" Some": 1.0}, Some={"<eos>": 1.0})
    assert text_of(llm, AntiSlopStrategy(llm, "So")) == " Some<eos>"


def test_slop_that_ends_with_the_text_is_taken_back_with_its_end():
    """backtrack_sampler stops at an end token that was taken back."""
    llm = model(otherwise={" So": 0.9, " it": 0.1}, So={"<eos>": 1.0}, it={"<eos>": 1.0})
    assert {text_of(llm, AntiSlopStrategy(llm, "So"), seed=s) for s in range(6)} == {" it<eos>"}


def test_bans_belong_to_prefixes_not_to_positions():
    """After `a` the word is banned, after `c` at the same position another one comes before it."""
    llm = model(otherwise={"a": 0.5, "c": 0.5}, a={" So": 0.5, " it": 0.5}, c={" So": 0.5, " Some": 0.5}, So={".": 1.0})
    texts = {text_of(llm, AntiSlopStrategy(llm, ["So."]), seed=s, max_new_tokens=2) for s in range(30)}
    assert texts == {"a So", "a it", "c So", "c Some"}, "what is at fault is the whole phrase"


def test_tokens_are_final_as_soon_as_nothing_can_match():
    llm = model(otherwise={"a": 1.0}, a={" So": 1.0}, So={" it": 1.0})
    stream = BacktrackSampler(llm, AntiSlopStrategy(llm, "So.")).generate("<p>", max_new_tokens=5, seed=0)
    seen = [(next(stream), stream.outcome().token_ids) for _ in range(4)]
    assert [len(walked) - i - 1 for i, (_, walked) in enumerate(seen)] == [0, 1, 0, 0]
    stream.close()


# ---- Replace


def test_a_phrase_is_replaced_once_with_the_seam_it_had():
    llm = model(otherwise={"a": 1.0}, a={" So": 1.0}, me={"<eos>": 1.0}, So={".": 1.0})
    strategy = ReplaceStrategy(llm, "So", " But let me")
    assert text_of(llm, strategy) == "a But let me<eos>"


def test_a_replacement_is_not_searched_again_and_is_counted_per_replacement():
    llm = model(otherwise={"So": 1.0}, So={".": 1.0})
    strategy = ReplaceStrategy(llm, ["So."], "So.a", max_replacements=2)
    assert text_of(llm, strategy, max_new_tokens=8) == "So.aSo.aSo."


def test_a_phrase_too_probable_to_be_replaced_stays():
    """backtrack_sampler draws it for ever."""
    llm = model(**SO)
    texts = {text_of(llm, ReplaceStrategy(llm, "So", " But", max_prob=0.5), seed=s) for s in range(10)}
    assert texts == {" So.<eos>", " it.<eos>"}
    texts = {
        text_of(llm, ReplaceStrategy(llm, "So", " But", max_prob=0.9), seed=s, max_new_tokens=1) for s in range(10)
    }
    assert texts == {" But", " it"}


def test_added_tokens_are_found_by_their_name():
    for special in ((b"<p>", b"<eos>"), (b"<p>", b"<eos>", b"</think>")):
        llm = model(special, otherwise={"</think>": 1.0}, **{" it": {"<eos>": 1.0}})
        assert text_of(llm, ReplaceStrategy(llm, "</think>", " it", max_replacements=1)) == " it<eos>"


# ---- Chain


def test_in_a_chain_the_first_that_objects_acts_and_pending_text_is_dropped():
    llm = model(otherwise={" So": 1.0}, it={"<eos>": 1.0}, me={"<eos>": 1.0})
    first = ReplaceStrategy(llm, "So", " But let me")
    second = ReplaceStrategy(llm, "But", " it")
    assert text_of(llm, ChainStrategy([first, second])) == " it<eos>"  # backtrack_sampler: ' let meSoSoSo'
    assert text_of(llm, ChainStrategy([AntiSlopStrategy(llm, "But"), first]), max_new_tokens=2) != " But let"


def test_of_two_that_object_to_one_token_the_first_in_the_list_counts():
    llm = model(otherwise={" So": 1.0}, So={".": 1.0}, it={"<eos>": 1.0}, But={"<eos>": 1.0})
    for order, expected in (((" it", " But"), " it<eos>"), ((" But", " it"), " But<eos>")):
        chain = ChainStrategy([ReplaceStrategy(llm, "So.", text) for text in order])
        assert text_of(llm, chain) == expected


# ---- the others


def test_creative_writing_never_takes_the_obvious_token():
    llm = model(otherwise={"a": 0.6, "c": 0.3, ".": 0.1})
    texts = [text_of(llm, CreativeWritingStrategy(llm), seed=s) for s in range(10)]
    assert all("a" not in text for text in texts)


def test_creative_writing_returns_to_its_last_risk_where_all_is_flat():
    flat = {piece.decode(): 1 / 12 for piece in VOCAB if piece not in (b"<p>",)}
    llm = model(
        otherwise={"a": 0.5, "c": 0.4, ".": 0.1}, c={"c": 0.6, " it": 0.4}, it={"<eos>": 0.9, "a": 0.1}, **{".": flat}
    )
    outcomes = []
    for seed in range(40):
        stream = BacktrackSampler(llm, CreativeWritingStrategy(llm, top_k_threshold_flat=8)).generate(
            "<p>", max_new_tokens=2, seed=seed
        )
        list(stream)
        outcomes.append(stream.outcome())
    assert any(outcome.n_undos for outcome in outcomes)
    # The unusual choice is that of the flat place itself (there the second best is written), or `.` before it (then c).
    assert {outcome.text[:1] for outcome in outcomes} == {"c", "."}
    assert {outcome.text for outcome in outcomes if outcome.text[0] == "."} == {". So"}


def test_adaptive_temperature_sharpens_flat_rows():
    flat = {piece.decode(): p for piece, p in zip(VOCAB[1:], [0.2] + [0.8 / 11] * 11, strict=True)}
    llm = model(otherwise=flat)
    n_plain = sum(text_of(llm, AntiSlopStrategy(llm, "zzz"), seed=s, max_new_tokens=8).count("a") for s in range(20))
    n_sharp = sum(text_of(llm, AdaptiveTemperatureStrategy(), seed=s, max_new_tokens=8).count("a") for s in range(20))
    assert n_sharp > 1.5 * n_plain


def test_debug_tells_the_two_best(capsys):
    llm = model(**SO)
    text_of(llm, DebugStrategy(llm), max_new_tokens=1)
    assert "Top 2 chars:  So it" in capsys.readouterr().out


def test_a_person_goes_back_and_the_stream_is_what_stays():
    """backtrack_sampler streams what was taken back."""
    llm = model(otherwise={"a": 0.5, "c": 0.3, ".": 0.2})
    choices = iter([0, 1, 3, 2, 0])  # a, c, back, '.', a
    seen = []

    def ask(options, text):
        seen.append((len(options), text))
        return next(choices)

    text = text_of(llm, HumanGuidanceStrategy(llm, ask=ask), max_new_tokens=3)
    assert text == "a.a"
    assert seen == [(3, ""), (4, "a"), (4, "ac"), (4, "a"), (4, "a.")]


def test_a_person_is_not_asked_about_what_is_certain_and_a_choice_is_the_choice():
    llm = model(otherwise={"a": 0.999, "c": 0.0006, ".": 0.0004})
    assert text_of(llm, HumanGuidanceStrategy(llm, min_autopass=0.9, ask=None), max_new_tokens=3) == "aaa"
    assert text_of(llm, HumanGuidanceStrategy(llm, ask=lambda options, text: 2), max_new_tokens=30) == "." * 30


def test_without_curses_only_the_menu_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "curses", None)
    with pytest.raises(BackendUnavailable, match="windows-curses"):
        menu.choose_in_terminal([("a", 1.0)], "")


# ---- strategies and providers of users


class NoRepeat(BaseStrategy):
    """As in backtrack_sampler's README: takes back a token that repeats the one before, and bans it there."""

    def __init__(self, provider):
        self.provider = provider
        self.n_resets = 0
        self.reset()

    def reset(self):
        self.n_resets += 1
        self.banned, self.keep = None, 0

    def get_keep_index(self):
        return self.keep

    def on_logits(self, logits, continuation_tokens):
        assert logits.shape == (1, len(VOCAB))
        if self.banned is not None:
            logits[:, self.banned] = float("-inf")
        return logits

    def on_probs(self, probs, continuation_tokens):
        assert probs.shape == (1, len(VOCAB)) and abs(float(probs.sum()) - 1) < 1e-4
        return probs

    def on_next_token(self, continuation_tokens, probs):
        self.keep = len(continuation_tokens) - 1

    def backtrack(self, continuation_tokens):
        self.banned = None
        if len(continuation_tokens) > 1 and continuation_tokens[-1] == continuation_tokens[-2]:
            self.banned = continuation_tokens.pop()
        return continuation_tokens


def repeats(text):
    return any(a == b for a, b in itertools.pairwise(text))


@pytest.mark.thorough
@pytest.mark.parametrize("in_chain", [False, True])
def test_a_strategy_of_a_users_runs_alone_and_64_at_once(in_chain):
    llm = model(otherwise={"a": 0.5, " it": 0.3, ".": 0.2})
    own = NoRepeat(llm)
    strategy = ChainStrategy([own, AntiSlopStrategy(llm, " it.")])
    sampler = BacktrackSampler(llm, strategy if in_chain else own)

    async def one(seed):
        return [VOCAB[t].decode() async for t in sampler.generate("<p>", max_new_tokens=10, seed=seed)]

    async def all_at_once():
        together = await asyncio.gather(*(one(seed) for seed in range(64)))
        return together, [await one(seed) for seed in range(8)]

    together, alone = asyncio.run(all_at_once())
    assert together[:8] == alone
    assert all(len(text) == 10 and not repeats(text) for text in together)
    assert any(" it." in "".join(text) for text in together) != in_chain


class Asks(ChainStrategy):
    """A chain that is used through its methods, and so are its members."""

    def backtrack(self, continuation_tokens):
        return super().backtrack(continuation_tokens)


class Twice(NoRepeat):
    """At most two a in a text."""

    def reset(self):
        super().reset()
        self.n_a = 0

    def on_logits(self, logits, continuation_tokens):
        if self.n_a == 2:
            logits[:, VOCAB.index(b"a")] = float("-inf")
        return super().on_logits(logits, continuation_tokens)

    def on_next_token(self, continuation_tokens, probs):
        self.n_a += VOCAB[continuation_tokens[-1]] == b"a"
        super().on_next_token(continuation_tokens, probs)


@pytest.mark.parametrize("kinds", [(None, ChainStrategy), (ChainStrategy, None), (ChainStrategy, ChainStrategy)])
def test_a_strategy_in_two_chains_at_once_is_not_shared(kinds):
    llm = model(otherwise={"a": 0.5, " it": 0.3, ".": 0.2})
    own = Twice(llm)
    samplers = [BacktrackSampler(llm, own if kind is None else kind([own])) for kind in kinds]
    together, alone = asyncio.run(_together_and_alone(samplers))
    assert together == alone and max(text.count("a") for text in together) == 2


def test_a_strategy_of_ours_in_two_chains_of_a_users_is_not_shared():
    llm = model(otherwise={"a": 0.5, " it": 0.3, ".": 0.2})
    ours = ReplaceStrategy(llm, "it", "So me")
    together, alone = asyncio.run(_together_and_alone([BacktrackSampler(llm, Asks([ours])) for _ in range(2)]))
    assert together == alone and any("So me" in "".join(text) for text in together)


async def _together_and_alone(samplers, n_texts=4):
    async def one(sampler, seed):
        return [VOCAB[t].decode() async for t in sampler.generate("<p>", max_new_tokens=10, seed=seed)]

    asked = [(sampler, 10 * i + n) for n in range(n_texts) for i, sampler in enumerate(samplers)]
    together = await asyncio.gather(*(one(*each) for each in asked))
    return together, [await one(*each) for each in asked]


class Writes(BaseStrategy):
    """Takes a token back and forces others in its place, as backtrack_sampler's ReplaceStrategy does."""

    def __init__(self, find, text):
        self.find, self.ids = VOCAB.index(find), Words().encode(text)
        self.reset()

    def reset(self):
        self.pending, self.keep, self.n_told = [], 0, 0

    def get_keep_index(self):
        return self.keep

    def on_logits(self, logits, continuation_tokens):
        if self.pending:
            logits = torch.full_like(logits, float("-inf"))
            logits[:, self.pending[0]] = 0.0
        return logits

    def on_probs(self, probs, continuation_tokens):
        return probs

    def on_next_token(self, continuation_tokens, probs):
        self.n_told += 1
        self.keep = len(continuation_tokens) - 1
        self.pending = self.pending[1:]

    def backtrack(self, continuation_tokens):
        if continuation_tokens[-1] != self.find:
            return continuation_tokens
        self.pending = list(self.ids)
        return continuation_tokens[:-1]


@pytest.mark.parametrize("nested", [False, True])
def test_of_several_strategies_of_users_that_fire_only_the_first_in_the_list_acts(nested):
    """Asked after another has acted, the second would write its own text, in backtrack_sampler by lot."""
    llm = model(otherwise={" So": 1.0}, it={"<eos>": 1.0}, me={"<eos>": 1.0})
    for texts, expected in (((" But let me", " it"), " But let me<eos>"), ((" it", " But let me"), " it<eos>")):
        own = [Writes(b" So", text) for text in texts]
        second = ChainStrategy(own[1:]) if nested else own[1]
        assert text_of(llm, ChainStrategy([own[0], second])) == expected
    asked_all = [Writes(b" So", text) for text in (" But let me", " it")]

    class AsksAll(ChainStrategy):
        def backtrack(self, continuation_tokens):
            for strategy in self.strategies:
                kept = strategy.backtrack(list(continuation_tokens))
            return kept

    assert text_of(llm, AsksAll(asked_all)) != " But let me<eos>", "the mutant: all are asked"


@pytest.mark.parametrize("ours_first", [False, True])
def test_in_a_chain_of_a_users_strategy_and_one_of_ours_the_first_acts(ours_first):
    llm = model(otherwise={" So": 1.0}, it={"<eos>": 1.0}, me={"<eos>": 1.0}, So={".": 1.0})
    user, ours = Writes(b".", " it"), ReplaceStrategy(llm, "So.", " But let me")
    chain = ChainStrategy([ours, user] if ours_first else [user, ours])
    assert text_of(llm, chain) == (" But let me<eos>" if ours_first else " So it<eos>")


def test_a_strategy_of_a_users_that_did_not_act_is_told_of_every_token():
    llm = model(otherwise={" So": 1.0}, it={"<eos>": 1.0})
    counts = []

    class Counts(Writes):
        def reset(self):
            counts.append(getattr(self, "n_told", 0))
            super().reset()

    chain = ChainStrategy([Writes(b" So", " it"), Counts(b"c", "")])
    assert text_of(llm, chain) == " it<eos>"
    assert max(counts) == 3, "the one taken back, what was written, and the end"


def test_a_strategy_that_builds_on_one_of_ours():
    class Louder(AntiSlopStrategy):
        n_calls = 0

        def on_next_token(self, continuation_tokens, probs):
            Louder.n_calls += 1
            super().on_next_token(continuation_tokens, probs)

    llm = model(**SO)
    assert {text_of(llm, Louder(llm, "So"), seed=s) for s in range(6)} == {" it.<eos>"}
    assert Louder.n_calls > 12


@pytest.mark.parametrize("chained", [False, True])
def test_a_reset_that_a_subclass_of_ours_changes_is_called_for_each_text(chained):
    n_resets = 0

    class Counts(ChainStrategy if chained else AntiSlopStrategy):
        def reset(self):
            nonlocal n_resets
            n_resets += 1
            super().reset()

    llm = model(**SO)
    counts = Counts([AntiSlopStrategy(llm, "So")]) if chained else Counts(llm, "So")
    n_before = n_resets
    assert {text_of(llm, counts, seed=s) for s in range(3)} == {" it.<eos>"}
    assert n_resets == n_before + 6, "before each text and after it"


def test_a_person_is_asked_also_where_a_subclass_changes_reset():
    class Fresh(HumanGuidanceStrategy):
        def reset(self):
            super().reset()

    llm = model(otherwise={"a": 0.5, "c": 0.3, ".": 0.2})
    assert text_of(llm, Fresh(llm, ask=lambda options, text: 2), max_new_tokens=9) == "." * 9


def test_a_chain_whose_on_logits_a_user_changes():
    class Without(ChainStrategy):
        def on_logits(self, logits, continuation_tokens):
            logits = super().on_logits(logits, continuation_tokens)
            logits[:, VOCAB.index(b"a")] = float("-inf")
            return logits

    llm = model(otherwise={"a": 0.9, "c": 0.1})
    assert text_of(llm, Without([AdaptiveTemperatureStrategy()])) == "c" * 8


class Rows(BaseProvider):
    """A provider with a cache of its own, which it checks."""

    def __init__(self):
        self.cached, self.n_resets = [], 0

    def encode(self, text, add_special_tokens=True):
        return Words().encode(text)

    def decode(self, tokens):
        return Words().decode(tokens)

    def generate(self, input_ids, *args, **kwargs):
        assert input_ids[: len(self.cached)] == self.cached and len(input_ids) > len(self.cached)
        self.cached = list(input_ids)
        row = torch.full((1, len(VOCAB)), -20.0)
        row[0, 2], row[0, 11] = 2.0, 0.0
        return row

    def get_eos_token_id(self):
        return EOS

    def remove_latest_cache(self, nr):
        self.cached = self.cached[: len(self.cached) - nr]

    def reset(self):
        self.cached = []
        self.n_resets += 1


def test_a_provider_of_a_users():
    provider = Rows()
    sampler = BacktrackSampler(provider, AntiSlopStrategy(provider, "So"))
    tokens = list(sampler.generate("<p>", max_new_tokens=5, seed=0))
    assert provider.decode(tokens) == " it" * 5
    sampler.llm.close()


def test_samplers_of_one_provider_share_its_cache():
    provider = Rows()

    def sampler(slop):
        return BacktrackSampler(provider, AntiSlopStrategy(provider, slop))

    first = sampler("So")
    assert len(list(first.generate("<p>", max_new_tokens=4, seed=0))) == 4
    second = sampler("c")  # the first has left something in the cache
    streams = [each.generate("<p>", max_new_tokens=6, seed=1) for each in (first, second)]
    texts = [provider.decode(tokens) for tokens in zip(*zip(*streams, strict=True), strict=True)]
    assert texts[0] == " it" * 6 and " So" in texts[1]
    first.llm.close()
    assert len(list(second.generate("<p> it", max_new_tokens=4, seed=1))) == 4
    second.llm.close()
    assert len(list(sampler("So").generate("<p>", max_new_tokens=4, seed=1))) == 4


def test_a_new_sampler_sees_a_provider_as_it_is():
    class Biased(Rows):
        bias = 0.0

        def generate(self, input_ids, *args, **kwargs):
            row = super().generate(input_ids)
            row[0, 1] += self.bias
            return row

    provider = Biased()
    before = BacktrackSampler(provider, AntiSlopStrategy(provider, "So"))
    assert text_of(provider, AntiSlopStrategy(provider, "So")) == " it" * 8
    provider.bias = 100.0
    assert text_of(provider, AntiSlopStrategy(provider, "So")) == "a" * 8
    before.llm.close()


def test_a_strategy_that_holds_a_provider_of_a_users_serves_several_texts():
    class Locked(Rows):
        def __init__(self):
            super().__init__()
            self.lock = threading.Lock()  # like much that models hold, it cannot be copied

    provider = Locked()
    own = NoRepeat(provider)
    sampler = BacktrackSampler(provider, own)
    together, alone = asyncio.run(_together_and_alone([sampler]))
    assert together == alone and not any(repeats(text) for text in together)
    sampler.llm.close()


def test_what_is_no_provider_or_strategy_is_refused():
    with pytest.raises(TypeError, match="provider"):
        BacktrackSampler(object(), AntiSlopStrategy(None, "a"))
    with pytest.raises(TypeError, match="strategy"):
        BacktrackSampler(model(**SO), object())


# ---- the sampler


def test_reading_early_to_a_stop_leaves_nothing_behind():
    llm = model(otherwise={"a": 0.5, "c": 0.5})
    strategy = NoRepeat(llm)
    n_before = strategy.n_resets
    for token in BacktrackSampler(llm, strategy).generate("<p>", max_new_tokens=10, seed=0):
        assert token in (1, 12)
        break
    stream = BacktrackSampler(llm, strategy).generate("<p>", max_new_tokens=10, seed=0)
    next(stream)
    stream.close()
    assert list(stream) == []
    assert strategy.n_resets >= n_before + 3
    assert len(list(BacktrackSampler(llm, strategy).generate("<p>", max_new_tokens=10, seed=0))) == 10


def test_the_iterator_works_inside_a_running_loop():
    llm = model(**SO)

    async def inside():
        return list(BacktrackSampler(llm, AntiSlopStrategy(llm, "So")).generate("<p>", max_new_tokens=8, seed=0))

    assert Words().decode(asyncio.run(inside())) == " it.<eos>"


@pytest.mark.thorough
@pytest.mark.parametrize("end", [list.clear, lambda streams: streams[0].close(), lambda streams: next(streams[0])])
def test_a_stream_begun_outside_a_running_loop_goes_on_and_ends_inside_one(end):
    llm = model(**SO)
    streams = [BacktrackSampler(llm, AntiSlopStrategy(llm, "So")).generate("<p>", max_new_tokens=8, seed=0)]
    assert next(streams[0]) == VOCAB.index(b" it")

    async def inside():
        end(streams)
        gc.collect()

    asyncio.run(inside())
    for stream in streams:
        stream.close()
        assert list(stream) == []


def test_lengths():
    llm = model(otherwise={"a": 1.0})
    sampler = BacktrackSampler(llm, AntiSlopStrategy(llm, "zzz"))
    assert len(list(sampler.generate("<p>a", max_length=5))) == 3
    assert len(list(sampler.generate("<p>a", max_length=5, max_new_tokens=2))) == 2
    assert list(sampler.generate("<p>a", max_length=1)) == []


@pytest.mark.parametrize("greedy", [{"temperature": 0}, {"top_k": 1}])
def test_greedy_with_a_strategy(greedy):
    llm = model(**SO)
    assert {text_of(llm, AntiSlopStrategy(llm, "So"), seed=s, **greedy) for s in range(4)} == {" it.<eos>"}


def test_filters_leave_out_what_they_say():
    llm = model(otherwise={"a": 0.5, "c": 0.3, ".": 0.2})
    for options, allowed in (
        ({"top_k": 2}, "ac"),
        ({"top_p": 0.7}, "ac"),
        ({"min_p": 0.55}, "ac"),
        ({"top_p": 0.4}, "a"),
    ):
        text = text_of(llm, AntiSlopStrategy(llm, "zzz"), max_new_tokens=40, **options)
        assert set(text) == set(allowed), options
