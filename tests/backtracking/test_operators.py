"""backtracking-llm's operators and generator: its meaning, and each of its defects."""

from __future__ import annotations

import asyncio
import logging
import math

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from genlm_backend.backtracking import (
    ChatPipeline,
    EntropyThreshold,
    GenerationSession,
    Generator,
    LogitThreshold,
    Never,
    NGramOverlap,
    Operator,
    ProbabilityDrop,
    ProbabilityMargin,
    ProbabilityThreshold,
    ProbabilityTrend,
    Repetition,
    Retract,
    Token,
    operator_rule,
    walk,
)
from genlm_backend.backtracking.operators import OPERATORS
from genlm_backend.errors import InvalidQuery, RuleRefused
from genlm_backend.llm import AsyncLM, LogNormalizer, MockAsyncLM
from tests.backtracking.speaker import chooser, speaker

ALL = [kind() for kind in OPERATORS.values()]


def asked(operator, probabilities, position=0, token="a", logits=None):
    p = torch.tensor(probabilities)
    return operator(p.log() if logits is None else torch.tensor(logits), p, position, token)


# ---- each operator by itself, called as in backtracking-llm


def test_every_operator_is_an_operator_with_its_defaults():
    assert all(isinstance(operator, Operator) for operator in ALL)
    assert repr(ProbabilityThreshold()) == "ProbabilityThreshold(min_probability=0.05, backtrack_count=1)"
    assert repr(EntropyThreshold()) == "EntropyThreshold(max_entropy=0.2, backtrack_count=2)"
    assert ProbabilityTrend() == ProbabilityTrend(10, 0.5, 1) != ProbabilityTrend(11)
    assert len({Repetition(), Repetition(3), Repetition(4)}) == 2


@pytest.mark.parametrize(
    ("operator", "fires", "keeps"),
    [
        (ProbabilityThreshold(0.1), ([0.95, 0.05], 1), ([0.95, 0.05], 0)),
        (EntropyThreshold(0.5), ([0.5, 0.5], 0), ([0.95, 0.05], 1)),
        (ProbabilityMargin(0.1), ([0.52, 0.48], 0), ([0.9, 0.1], 1)),
    ],
)
def test_operators_without_a_state(operator, fires, keeps):
    assert asked(operator, *fires) == operator.backtrack_count
    assert asked(operator, *keeps) == 0


def test_margin_keeps_where_there_is_one_token():
    assert asked(ProbabilityMargin(), [1.0]) == 0


def test_logit_threshold_reads_the_logit_of_the_token():
    operator = LogitThreshold(min_logit=-5.0)
    assert asked(operator, [0.9, 0.1], 1, logits=[3.0, -6.0]) == 1
    assert asked(operator, [0.9, 0.1], 0, logits=[3.0, -6.0]) == 0


class RowsOnly(AsyncLM):
    """An engine that gives log-probabilities and nothing else."""

    def query(self, token_ids, query, lora_name=None):
        if isinstance(query, LogNormalizer):
            raise InvalidQuery("LogNormalizer is not answered here")
        return super().query(token_ids, query, lora_name)


@pytest.mark.parametrize(
    ("operator", "name"), [(LogitThreshold(), "LogitThreshold"), (lambda *_: 0, "<lambda>"), (Never(), None)]
)
def test_what_looks_at_logits_is_refused_by_name_where_there_are_none(operator, name):
    llm = speaker(VOCAB, chooser(**EVEN))
    llm.__class__ = RowsOnly
    if name is None:
        assert run(Generator(llm), operator).is_complete
        return
    with pytest.raises(RuleRefused, match=f"^{name} cannot be used with RowsOnly: .* take a rule that looks at prob"):
        run(Generator(llm), operator)


def test_drop_compares_with_the_last_token_that_stayed():
    operator = ProbabilityDrop(0.5)
    assert asked(operator, [0.8, 0.2], 0) == 0
    assert asked(operator, [0.8, 0.2], 1) == 1
    operator.backtrack(1)
    assert asked(operator, [0.8, 0.2], 1) == 1, "0.3.1 accepts anything right after its own rejection"


def test_trend_needs_half_a_window():
    operator = ProbabilityTrend(4, 0.5)
    assert [asked(operator, [0.9, 0.1], i) for i in (0, 1)] == [0, 0]
    assert asked(operator, [0.9, 0.1], 1) == 1
    operator.backtrack(1)
    assert asked(operator, [0.9, 0.1], 0) == 0


def test_repetition_takes_back_the_whole_run():
    operator = Repetition(2)
    assert [asked(operator, [1.0], token=t) for t in "abbb"] == [0, 0, 0, 3]
    operator.backtrack(3)
    assert [asked(operator, [1.0], token=t) for t in "bbb"] == [0, 0, 3]


def test_ngrams_are_remembered_across_a_rollback():
    operator = NGramOverlap(2)
    assert [asked(operator, [1.0], token=t) for t in "abcab"] == [0, 0, 0, 0, 1]
    operator.backtrack(1)
    assert asked(operator, [1.0], token="b") == 1, "0.3.1 forgets all it has seen"
    operator.backtrack(4)  # back to "ab": the rest of the window is there again
    assert asked(operator, [1.0], token="c") == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: ProbabilityThreshold(0.0),
        lambda: ProbabilityThreshold(1.0),
        lambda: ProbabilityThreshold(backtrack_count=0),
        lambda: EntropyThreshold(-1.0),
        lambda: ProbabilityMargin(1.5),
        lambda: ProbabilityDrop(-0.1),
        lambda: ProbabilityTrend(1),
        lambda: ProbabilityTrend(drop_threshold=1.0),
        lambda: Repetition(0),
        lambda: NGramOverlap(1),
        lambda: operator_rule(Never(), every_n=0),
    ],
)
def test_arguments_out_of_range_are_refused(make):
    with pytest.raises(ValueError):
        make()


# ---- in a generator

VOCAB = [b"<p>", b"a", b"b", b"c", b"```\n", b"<eos>", b" d"]


def generator(**likely) -> Generator:
    return Generator(speaker(VOCAB, chooser(**likely)))


def run(model: Generator, operator=None, **options):
    options = {"max_new_tokens": 6, "seed": 0, "eos": [5]} | options
    return asyncio.run(model.arun([0], operator, **options))


EVEN = {"otherwise": {"a": 0.6, "b": 0.3, "c": 0.1}}


def test_generate_is_agenerate_also_inside_a_running_loop():
    model = generator(**EVEN)
    plain = model.generate([0], max_new_tokens=5, seed=3)

    async def inside():
        return model.generate([0], max_new_tokens=5, seed=3), await model.agenerate([0], max_new_tokens=5, seed=3)

    assert asyncio.run(inside()) == (plain, plain) == (model([0], max_new_tokens=5, seed=3), plain)


def test_the_first_token_can_be_rejected_and_the_model_sees_the_prompt_once():
    llm = speaker(VOCAB, chooser(otherwise={"a": 0.9, "b": 0.1}))
    outcome = run(Generator(llm), lambda logits, p, position, token: int(token == "a"))
    assert set(outcome.text) == {"b"} and outcome.n_undos > 0
    asked_for = llm._service.engine.asked
    assert all(context[0] == 0 and 0 not in context[1:] for context in asked_for)
    assert len(set(asked_for)) == len(asked_for), "no prefix was computed twice: what was removed costs no forward"


@pytest.mark.parametrize(
    "operator", [EntropyThreshold(0.0), ProbabilityMargin(1.0), Repetition(1), lambda *_: 1, lambda *_: 3]
)
def test_an_operator_that_always_objects_comes_to_an_end(operator):
    outcome = run(generator(**EVEN), operator)
    assert outcome.n_draws < 200


def test_an_operator_that_judges_places_leaves_them():
    """After a both b and c are as good: a flat place, which the walk does not come back to."""
    model = generator(otherwise={"a": 0.5, "b": 0.5}, a={"b": 0.5, "c": 0.5}, b={" d": 1.0}, **{" d": {" d": 1.0}})
    for seed in range(10):
        outcome = run(model, EntropyThreshold(0.3), max_new_tokens=3, seed=seed)
        assert outcome.text == "b d d"


@pytest.mark.parametrize("greedy", [{"temperature": 0}, {"top_k": 1}, {"temperature": 0, "top_k": 1}])
def test_greedy_with_an_operator_takes_the_best_it_accepts(greedy):
    model = generator(**EVEN)
    texts = {run(model, lambda lo, p, i, token: int(token == "a"), seed=s, **greedy).text for s in range(5)}
    assert texts == {"bbbbbb"}
    assert run(model, seed=1, **greedy).text == "aaaaaa"


def test_an_operator_sees_scaled_logits_probabilities_rank_and_text():
    seen = []
    model = generator(**EVEN)

    def look(logits, probabilities, position, token):
        seen.append((logits, probabilities, position, token))
        return 0

    run(model, look, top_k=2, temperature=2.0, max_new_tokens=3)
    for logits, probabilities, position, token in seen:
        assert logits.shape == probabilities.shape == (2,)
        assert torch.allclose(torch.softmax(logits, 0), probabilities, atol=1e-5)
        assert probabilities[0] / probabilities[1] == pytest.approx(math.sqrt(2.0), rel=1e-3)
        assert logits[0] == pytest.approx(math.log(0.6) / 2, abs=1e-3), "the model's own logit, divided"
        assert token == "ab"[position]


def test_an_operator_that_remembers_is_told_what_is_gone():
    class Counts:
        def __init__(self):
            self.tokens, self.told = [], []

        def __call__(self, logits, probabilities, position, token):
            self.tokens.append(token)
            return 2 if self.tokens[-2:] == ["a", "a"] else 0

        def backtrack(self, n_tokens):
            self.told.append(n_tokens)
            del self.tokens[len(self.tokens) - n_tokens :]

    operator = Counts()
    outcome = run(generator(otherwise={"a": 0.6, "b": 0.4}), operator)
    assert "aa" not in outcome.text and outcome.is_complete
    assert operator.told[:-1] == [2] * outcome.n_undos, "clipped numbers, one per rollback"
    assert operator.tokens == [], "and at the end it is as it was: nothing leaks into the next text"


def test_an_operator_without_backtrack_and_one_as_a_rule():
    assert run(generator(**EVEN), lambda *_: 0).is_complete
    llm = speaker(VOCAB, chooser(**EVEN))
    outcome = asyncio.run(_finished(walk(llm, [0], operator_rule(ProbabilityThreshold(0.2)), eos=[5], seed=0)))
    assert "c" not in outcome.text


async def _finished(walking):
    return await walking


def test_every_nth_token_only():
    outcome = run(generator(**EVEN), lambda lo, p, i, token: int(token != "c"), backtrack_every_n=3, max_new_tokens=6)
    assert outcome.text[2] == outcome.text[5] == "c" and set(outcome.text) != {"c"}
    with pytest.raises(ValueError, match="backtrack_every_n"):
        run(generator(**EVEN), Never(), backtrack_every_n=0)


def test_asked_at_every_nth_token_an_operator_has_followed_the_others():
    """0.3.1 counts tokens as consecutive that were not."""
    model = generator(otherwise={"a": 1.0}, a={"b": 1.0}, b={"a": 1.0})
    assert run(model, Repetition(1), backtrack_every_n=2, max_new_tokens=8).n_undos == 0
    same = generator(otherwise={"a": 0.9, "b": 0.1})
    outcome = run(same, Repetition(1), backtrack_every_n=2, max_new_tokens=8)
    assert outcome.n_undos > 0 and all(outcome.text[i] != outcome.text[i + 1] for i in range(0, 8, 2))


def test_parts_of_characters_are_told_apart_by_their_bytes():
    """Decoded alone, both halves are the replacement character, and 0.3.1 takes them for one token twice."""
    vocab = [b"<p>", "é".encode()[:1], "é".encode()[1:], b"<eos>"]
    llm = speaker(vocab, lambda text: {vocab[2 if text.endswith(vocab[1]) else 1]: 1.0})
    outcome = run(Generator(llm), Repetition(1), eos=[3])
    assert (outcome.text, outcome.n_undos) == ("ééé", 0)


def test_the_model_is_asked_for_the_text_as_it_stands():
    """Before 0.3, what was taken back stayed in the context."""
    llm = speaker(VOCAB, chooser(**EVEN))
    outcome = run(Generator(llm), ProbabilityThreshold(0.5))
    text, stood = [0], {(0,)}
    for event in outcome.events:
        if isinstance(event, Token):
            text.append(event.token_id)
            stood.add(tuple(text))
        elif isinstance(event, Retract):
            del text[len(text) - event.n :]
    assert outcome.n_undos > 0 and text == [0, *outcome.token_ids]
    assert set(llm._service.engine.asked) <= stood


def test_a_stop_string_that_ends_inside_a_token_is_cut_off():
    model = generator(otherwise={"a": 1.0}, a={"```\n": 1.0})
    outcome = asyncio.run(model.arun([0], stop_sequences=["```"], seed=0, eos=[5]))
    assert (outcome.text, outcome.reason) == ("a", "stop")
    spanning = generator(otherwise={"b": 1.0}, b={" d": 1.0})
    assert asyncio.run(spanning.arun([0], stop_sequences=["b d", "x"], seed=0)).text == ""


def test_an_end_token_can_be_taken_back():
    model = generator(otherwise={"<eos>": 0.9, "a": 0.1})
    outcome = run(model, lambda lo, p, i, token: int(token == "<eos>"))
    assert outcome.text == "aaaaaa" and outcome.reason == "length"


def test_generations_share_no_state_and_run_together():
    model = generator(**EVEN)
    operators = [NGramOverlap(2), ProbabilityTrend(2), Repetition(1), ProbabilityDrop(0.5)]

    async def both():
        calls = [(operator, seed) for operator in operators for seed in range(4)]
        options = {"max_new_tokens": 8, "eos": [5]}
        together = await asyncio.gather(*(model.agenerate([0], o, seed=s, **options) for o, s in calls))
        alone = [await model.agenerate([0], o, seed=s, **options) for o, s in calls]
        return together, alone

    together, alone = asyncio.run(both())
    assert together == alone


class Limit:
    """Objects to the third a."""

    def __init__(self):
        self.seen = []

    def __call__(self, logits, probabilities, position, token):
        self.seen.append(token)
        return int(self.seen.count("a") > 2)

    def backtrack(self, n):
        del self.seen[-n:]


@pytest.mark.thorough
def test_a_remembering_operator_serves_many_at_once():
    model, operator = generator(**EVEN), Limit()

    async def many():
        return await asyncio.gather(*(model.agenerate([0], operator, max_new_tokens=8, seed=s) for s in range(64)))

    texts = asyncio.run(many())
    assert max(text.count("a") for text in texts) == 2 and len(set(texts)) > 10


def test_the_copy_of_an_operator_at_work_has_seen_nothing():
    model, operator = generator(**EVEN), Limit()

    async def two():
        first = asyncio.create_task(model.agenerate([0], operator, max_new_tokens=60, seed=0))
        while operator.seen.count("a") < 2:
            await asyncio.sleep(0)
        assert not first.done()
        second = await model.agenerate([0], operator, max_new_tokens=8, seed=1)
        assert (await first).count("a") == 2
        return second, await model.agenerate([0], Limit(), max_new_tokens=8, seed=1)

    second, alone = asyncio.run(two())
    assert second == alone


class Tally:
    def __init__(self):
        self.n_seen = 0

    def __call__(self, logits, probabilities, position, token):
        self.n_seen += 1
        return 0


@pytest.mark.parametrize("wrong", [{"backtrack_every_n": 0}, {"temperature": -1.0}])
def test_an_operator_given_with_a_wrong_argument_is_not_in_use_afterwards(wrong):
    model, operator = generator(**EVEN), Tally()
    with pytest.raises(ValueError, match=next(iter(wrong))):
        model.generate([0], operator, **wrong)
    model.generate([0], operator, max_new_tokens=3, seed=0)
    assert operator.n_seen == 3, "not a copy"


def test_an_operator_whose_backtrack_fails_is_not_in_use_afterwards():
    class Sulks(Tally):
        def backtrack(self, n_tokens):
            raise RuntimeError("no")

    model, operator = generator(**EVEN), Sulks()
    for n_seen in (3, 6):
        with pytest.raises(RuntimeError, match="no"):
            model.generate([0], operator, max_new_tokens=3, seed=0)
        assert operator.n_seen == n_seen


def test_a_subclass_of_ours_that_changes_only_backtrack_is_told():
    told = []

    class Told(ProbabilityThreshold):
        def backtrack(self, n_tokens):
            told.append(n_tokens)
            super().backtrack(n_tokens)

    outcome = run(generator(**EVEN), Told(0.5))
    assert set(outcome.text) == {"a"} and outcome.n_undos > 0
    assert told == [1] * outcome.n_undos + [6], "each rollback, and the end"


def test_each_rollback_is_one_info_record(caplog):
    with caplog.at_level(logging.INFO, "genlm_backend.backtracking"):
        outcome = run(generator(**EVEN), ProbabilityThreshold(0.5))
    assert [r.levelname for r in caplog.records] == ["INFO"] * outcome.n_undos
    assert "ProbabilityThreshold" in caplog.records[0].getMessage()


def test_a_walk_that_gives_up_warns_once_and_says_why(caplog):
    with caplog.at_level(logging.WARNING, "genlm_backend.backtracking"):
        outcome = run(generator(**EVEN), lambda *_: 1)
    assert [r.levelname for r in caplog.records] == ["WARNING"] and outcome.text == ""
    assert f"ended by {outcome.reason} after {outcome.n_draws} draws" in caplog.records[0].getMessage()


def test_a_session_steps_takes_back_and_goes_on():
    session = GenerationSession(speaker(VOCAB, chooser(**EVEN)), prompt=[0], max_new_tokens=3, seed=0, top_k=2)
    results = [session.step() for _ in range(3)]
    assert session.done and session.generated_token_count == 3 and session.prompt_length == 1
    assert session.token_ids.tolist() == [[0, *(r.token_id for r in results)]]
    assert all(r.probabilities.shape == (2,) and r.backtrack_count == 0 for r in results)
    with pytest.raises(RuntimeError, match="done"):
        session.step()
    session.backtrack(100)
    assert not session.done and session.generated_token_count == 0 and session.get_decoded_text() == ""
    session.step()
    assert session.generated_token_count == 1


def test_a_session_tells_what_the_operator_asks_and_does_nothing_by_itself():
    session = GenerationSession(speaker(VOCAB, chooser(**EVEN)), prompt=[0], operator=lambda *_: 2, seed=0)
    assert [session.step().backtrack_count for _ in range(3)] == [2, 2, 2]
    assert session.generated_token_count == 3
    assert GenerationSession(speaker(VOCAB, chooser(**EVEN)), None, [0], Repetition(1)).step().backtrack_count == 0


# ---- chat


@pytest.fixture
def chatty(tiny_tokenizer_512: PreTrainedTokenizerFast):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer_512._tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return MockAsyncLM(tokenizer)


def test_a_turn_leaves_the_history_alone_and_has_one_bos(chatty):
    pipeline, history = ChatPipeline(Generator(chatty)), [{"role": "system", "content": "brief"}]
    answer, new = pipeline.run_turn("Who?", history, max_new_tokens=4, seed=1)
    assert history == [{"role": "system", "content": "brief"}]
    assert new == [*history, {"role": "user", "content": "Who?"}, {"role": "assistant", "content": answer}]
    assert pipeline.prompt_ids(new).count(chatty.tokenizer.bos_token_id) == 1


def test_a_model_without_a_chat_template_is_named(chatty):
    chatty.tokenizer.chat_template = None
    chatty.tokenizer.name_or_path = "plain-model"
    with pytest.raises(ValueError, match="plain-model"):
        ChatPipeline(Generator(chatty)).run_turn("Who?", [])


def test_a_model_without_its_tokenizer_is_refused():
    with pytest.raises(TypeError, match="tokenizer"):
        Generator(object())
