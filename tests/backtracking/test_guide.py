"""Guided text is in the grammar or says that it is not, from language models, functions and servers."""

from __future__ import annotations

import asyncio
import inspect
import json
import re
import sys
import threading
from collections.abc import Iterator
from html import unescape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import openai
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import genlm_backend.backtracking as backtracking
from genlm_backend.backtracking import (
    OpenAICompatible,
    Outcome,
    aguide,
    choose_candidate,
    guide,
    load_parser,
    obtain_correction_pairs,
    walk,
)
from genlm_backend.backtracking.writing import bytes_of, whole_characters
from genlm_backend.errors import InvalidGrammar, InvalidQuery
from genlm_backend.llm import AsyncLM, AsyncTransformer, MockAsyncLM
from genlm_backend.potentials import Limits
from tests.backtracking.speaker import chooser, reciter, speaker

LETTERS = [bytes([i]) for i in range(32, 127)]
SQL = "SELECT * FROM students WHERE name SIMILAR TO 'Dan%';"


class Scripted:
    """Says what it was told to, one answer after the other, then nothing."""

    def __init__(self, *answers: str) -> None:
        self.answers = list(answers)
        self.prompts: list[str] = []

    def __call__(self, prompt: str) -> str:
        self.prompts.append(prompt)
        return self.answers.pop(0) if self.answers else ""


def test_guide_is_the_function() -> None:
    assert callable(backtracking.guide) and backtracking.guide is guide


def test_a_fault_is_corrected_and_the_rest_put_back() -> None:
    model = Scripted(SQL[len("SELECT") :], "LIKE 'x'", "")  # the only beginning there is, is written for it
    result = guide(model, load_parser("sql"), "Names like Dan:\n")
    assert result.valid and result.num_grammar_corrections == 1
    correction = result.correction_log[0]
    assert correction.original_pred == SQL and correction.selected_candidate == "LIKE"
    assert result.response.startswith("SELECT * FROM students WHERE name LIKE 'Dan%'")
    assert result.to_list()[0]["selected_candidate"] == "LIKE"


def test_a_word_in_excess_is_replaced_and_the_rest_put_back() -> None:
    result = guide(Scripted("(1 plus 2)", "+"), load_parser("arithmetic"), "")
    assert (result.response, result.valid) == ("(1 + 2)", True)
    assert result.correction_log[0].type == "draft_gen_middle_fill"


def test_a_terminal_is_opened_where_a_function_says_none_of_it() -> None:
    """Only a string may come, and the function says a number: the quotation mark is written, and it goes on."""
    parser = load_parser('start: "{" NAME ":" STRING "}"\nNAME: /[a-z]+/\nSTRING: /"[^"]*"/\n')
    result = guide(Scripted("age:36}", "36", '"}'), parser, "")
    assert (result.response, result.valid, result.num_grammar_corrections) == ('{age:"36}"}', True, 1)


@pytest.mark.parametrize(("answers", "whole"), [(("5x", "kg"), "5kg"), (("5x", "m"), "5m"), (("ax", "m"), "am")])
def test_a_word_follows_a_word_without_a_blank_where_the_grammar_takes_none(
    answers: tuple[str, ...], whole: str
) -> None:
    parser = load_parser('start: /[0-9]+/ ("kg" | "m" | "lb") | "a" "m"\n')
    result = guide(Scripted(*answers), parser, "")
    assert (result.response, result.valid, result.num_grammar_corrections) == (whole, True, 1)


JSON_OF_LARKS_DOCUMENTATION = """
    start: value
    ?value: object | array | string | SIGNED_NUMBER | "true" | "false" | "null"
    array: "[" [value ("," value)*] "]"
    object: "{" [pair ("," pair)*] "}"
    pair: string ":" value
    string: ESCAPED_STRING
    %import common.ESCAPED_STRING
    %import common.SIGNED_NUMBER
    %import common.WS
    %ignore WS
"""


async def test_strings_of_larks_library_are_chosen() -> None:
    """By functions and by language models, though the expression looks behind."""
    parser = load_parser(JSON_OF_LARKS_DOCUMENTATION)
    async with reciter({b", ": b'"', b'"': b"b", b"b": b'"', b'b"': b":"}, *LETTERS) as llm:
        for drafter in (Scripted('"b": 2}'), llm):
            result = await aguide(Scripted('{"a": 1, b: 2}', ": 2}"), parser, "", draft_model=drafter)
            assert (result.response, result.valid) == ('{"a": 1, "b": 2}', True)
            assert result.correction_log[0].selected_candidate == '"b"'


async def test_a_candidate_that_cannot_be_compiled_leaves_the_others() -> None:
    """llguidance reads this terminal from the grammar, and not lark's expression of it."""
    parser = load_parser('start: "<" (KEY | /[0-9]+/) ">"\nKEY: ESCAPED_STRING ":"\n%import common.ESCAPED_STRING\n')
    assert any("(?<!" in candidate.pattern for candidate in parser.expected("<").candidates)
    async with reciter({b"<": b"7", b"7": b">"}, *LETTERS) as llm:
        result = await aguide(Scripted("x", ">"), parser, "", draft_model=llm)
    assert (result.response, result.valid) == ("<7>", True)


def test_a_single_candidate_needs_no_model() -> None:
    model = Scripted("ab")
    result = guide(model, load_parser('start: "a" ":" "b"'), "")
    assert (result.response, result.valid) == ("a:b", True)
    assert result.correction_log[0].type == "single_candidate_middle_fill" and len(model.prompts) <= 2


def test_unfinished_text_costs_no_correction() -> None:
    result = guide(Scripted('{"na', 'me": [1, ', "2]}", ""), load_parser("json"), "")
    assert (result.response, result.num_grammar_corrections, result.valid) == ('{"name": [1, 2]}', 0, True)


def test_a_grammar_of_nothing_too_has_a_text() -> None:
    result = guide(Scripted(""), load_parser('start: "a"?'), "")
    assert (result.response, result.valid) == ("", True)


def test_text_after_the_end_is_cut_off() -> None:
    result = guide(Scripted('{"a": 1}\n\nThat is it.'), load_parser("json"), "")
    assert result.response.strip() == '{"a": 1}' and result.valid and not result.correction_log


def test_what_is_outside_the_grammar_is_never_said_to_be_in_it() -> None:
    """And what is returned is at least a beginning."""
    parser = load_parser("json")
    for corrections in range(4):
        model = Scripted(*["[[ this is no JSON"] * 10)
        result = guide(model, parser, "", max_grammar_corrections=corrections)
        assert result.valid == parser.is_valid(result.response)
        assert parser.is_viable(result.response)
        assert result.num_grammar_corrections <= corrections


def test_stops_and_seeds() -> None:
    result = guide(Scripted(' "b"]```and more'), load_parser("json"), "", seed_str='["a",', stop_at="```")
    assert (result.response, result.valid) == ('["a", "b"]', True)
    with pytest.raises(InvalidGrammar, match="seed_str"):
        guide(Scripted(), load_parser("json"), "", seed_str="x")
    with pytest.raises(InvalidQuery, match="function"):
        guide(3, load_parser("json"), "")
    with pytest.raises(InvalidQuery):
        guide(Scripted(), load_parser("json"), "", max_new_tokens=0)


def test_the_picture_shows_text_and_nothing_else() -> None:
    result = guide(Scripted('["<b>", oops', "1", ""), load_parser("json"), "a < b")
    assert result.html is not None and "<b>" not in result.html and "&lt;b&gt;" in result.html
    assert "line-through" in result.html
    assert guide(Scripted("1"), load_parser("json"), "", save_html=False).html is None


def test_a_function_may_echo_its_prompt_or_be_async() -> None:
    async def model(prompt: str) -> str:
        await asyncio.sleep(0)
        return f"{prompt}12" if prompt == "Number: " else ""

    result = guide(model, load_parser("json"), "Number: ")
    assert (result.response, result.valid) == ("12", True)


def test_candidates_are_chosen_by_what_the_model_says() -> None:
    assert choose_candidate(["LIKE", "BETWEEN"], "name ", Scripted("BETWEEN 1 AND 2")) == "BETWEEN"
    assert choose_candidate(["LIKE", "BETWEEN"], "name ", Scripted("LIMIT")) == "LIKE"
    with pytest.raises(InvalidQuery):
        choose_candidate([], "", Scripted())


def test_candidates_of_a_grammar_are_chosen_by_what_they_match() -> None:
    """Those that a caller writes are texts, also where they look like expressions."""
    prefix, candidates = obtain_correction_pairs('{"a": ,', load_parser("json"))
    assert choose_candidate(candidates, prefix, Scripted("-3, ")) == "-3"
    assert choose_candidate(candidates, prefix, Scripted("null")) == "null"
    assert choose_candidate(["[0-9]+", "x"], "", Scripted("7")) == "[0-9]+"
    prefix, candidates = obtain_correction_pairs("5", load_parser('start: /[0-9]/ "KG"i\n'))
    assert choose_candidate(candidates, prefix, Scripted("kG")) == "kG"


@pytest.mark.parametrize(("expression", "said", "response"), [(r"\p{L}+", "été", "été"), ("(a|aa)+b", "a" * 60, "c")])
def test_expressions_are_matched_as_lark_does_and_in_bounded_time(expression: str, said: str, response: str) -> None:
    parser = load_parser(f'start: /{expression}/ | "c"\n', limits=Limits(lark_s=0.2))
    result = guide(Scripted("!", said), parser, "")
    assert (result.response, result.valid, result.num_grammar_corrections) == (response, True, 1)


@pytest.mark.parametrize("grammar", ["json", "arithmetic", "robot"])
@pytest.mark.parametrize("heals", [True, False])
async def test_a_language_model_of_noise_stays_a_beginning(
    tiny_tokenizer_512: PreTrainedTokenizerFast, grammar: str, heals: bool
) -> None:
    parser = load_parser(grammar)
    async with MockAsyncLM(tiny_tokenizer_512) as llm:
        many = [
            aguide(llm, parser, "x", max_new_tokens=5, seed=i, token_healing=heals, max_grammar_corrections=4)
            for i in range(4)
        ]
        results = await asyncio.gather(*many)
        again = await aguide(llm, parser, "x", max_new_tokens=5, seed=2, token_healing=heals, max_grammar_corrections=4)
        assert again.response == results[2].response, "the same alone as among others"
        for result in results:
            assert parser.is_viable(result.response) and result.valid == parser.is_valid(result.response)
        chosen = choose_candidate(["river", "island"], "the ", llm)
        assert chosen in ("river", "island")


def spans(html: str | None) -> list[tuple[str, str]]:
    """Kind and text of the spans before the legend."""
    assert html is not None
    picture = html.split("</pre>")[0]
    return [
        (how, unescape(text)) for how, text in re.findall(r'<span title="([^"]*)"[^>]*>(.*?)</span>', picture, re.S)
    ]


async def test_the_picture_shows_what_was_healed(tiny_tokenizer_512: PreTrainedTokenizerFast) -> None:
    """What was not taken back is the response; only with healing has some of it other tokens than it had at first."""
    parser = load_parser("robot")
    async with MockAsyncLM(tiny_tokenizer_512) as llm:
        kinds: dict[bool, set[str]] = {}
        for heals in (True, False):
            many = [
                aguide(llm, parser, "x", max_new_tokens=5, seed=i, token_healing=heals, max_grammar_corrections=4)
                for i in range(8)
            ]
            results = await asyncio.gather(*many)
            for result in results:
                standing = [text for how, text in spans(result.html) if how != "taken back"]
                assert "".join(standing) == result.response
            kinds[heals] = {how for result in results for how, _ in spans(result.html)}
            assert all("healed</span>" in str(result.html).split("</pre>")[1] for result in results), "in the legend"
    assert "healed" in kinds[True] and "healed" not in kinds[False]


async def test_several_tokens_are_healed_at_one_seam() -> None:
    """Two tokens too many were dropped in others' code where more than one was healed: the context was not the text."""
    vocab = [b"<p>", b"S", b"E", b"L", b"SEL", b"ECT", b" x", b"<eos>", b" y"]
    longest = {b"<p>SEL": [0, 1, 2, 3], b"<p>SELECT": [0, 4, 5], b"<p>SELECT x": [0, 4, 5, 6]}

    class Letters:
        eos_token_id = 7

        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return longest[text.encode()]

    says = chooser(
        otherwise={"SEL": 0.9, "S": 0.1}, S={"E": 1.0}, SE={"L": 1.0}, SEL={"ECT": 1.0}, SELECT={" x": 1.0},
        **{" x": {"<eos>": 1.0}},
    )  # fmt: skip
    for heals in (True, False):
        llm = speaker(vocab, says, [b"<p>", b"<eos>"])
        llm.tokenizer = Letters()
        parser = load_parser('start: "SELECT x"')
        result = await aguide(llm, parser, "<p>", seed_str="SEL", token_healing=heals, temperature=0.0)
        assert (result.response, result.valid, result.num_grammar_corrections) == ("SELECT x", True, 0)
        asked = llm._service.engine.asked  # type: ignore[attr-defined]
        assert ((0, 4) in asked) == heals, "the three letters became the one token that the model prefers"
        assert ((0, 1, 2, 3) in asked) != heals
        assert all(b"<p>SELECT x<eos>".startswith(b"".join(vocab[i] for i in ids)) for ids in asked)
        assert (("healed", "SEL") in spans(result.html)) == heals
        await llm.aclose()


class Recorded(NamedTuple):
    """One stretch: the tokens it continued, and what came."""

    token_ids: list[int]
    outcome: Outcome


@pytest.fixture
def stretches(monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    """The walks of `guide`, in order."""
    seen: list[Recorded] = []
    module = sys.modules["genlm_backend.backtracking.guide"]

    async def recording(llm: AsyncLM, token_ids: list[int], *args: Any, **options: Any) -> Outcome:
        outcome = await walk(llm, token_ids, *args, **options)
        seen.append(Recorded(list(token_ids), outcome))
        return outcome

    monkeypatch.setattr(module, "walk", recording)
    return seen


@pytest.mark.thorough
@pytest.mark.parametrize("heals", [True, False])
@pytest.mark.parametrize("prompt", ["x", "Of river and island: "])
async def test_a_stretch_is_as_long_as_asked_and_healed_over_several_tokens(
    tiny_tokenizer_512: PreTrainedTokenizerFast, stretches: list[Recorded], heals: bool, prompt: str
) -> None:
    """Any text is in this grammar, so each stretch goes on from the one before, over a seam of up to three tokens."""
    parser = load_parser("start: ANY?\nANY: /(.|\\n)+/\n")
    n_left_out, n_otherwise = [], 0
    async with MockAsyncLM(tiny_tokenizer_512) as llm:
        for seed in range(4):
            stretches.clear()
            result = await aguide(
                llm, parser, prompt, max_new_tokens=4, seed=seed, token_healing=heals, top_p=1.0, temperature=2.0
            )
            text = prompt
            for token_ids, outcome in stretches:
                usual = list(llm.tokenizer.encode(text))
                kept = bytes_of(llm, token_ids)
                assert text.encode().startswith(kept) and usual[: len(token_ids)] == token_ids
                n_healed = len(text.encode()) - len(kept)
                n_left_out.append(len(usual) - len(token_ids))
                ends = np.cumsum([len(llm.byte_vocab[i].byte_string) for i in outcome.token_ids])
                n_new = int((ends > n_healed).sum())
                assert n_new == 4 or outcome.reason == "eos"
                n_otherwise += usual[len(token_ids) :] != outcome.token_ids[: len(usual) - len(token_ids)]
                whole = kept + bytes_of(llm, outcome.token_ids)
                n_bytes = len(whole) if outcome.reason == "eos" else whole_characters(whole)
                text = whole[:n_bytes].decode("utf-8", "replace")
            assert prompt + result.response == text, "the response is without the prompt"
    if heals:
        assert max(n_left_out) == 3 and n_otherwise > 0
        assert n_left_out[0] == min(3, len(tiny_tokenizer_512.encode(prompt)) - 1), "the prompt's tail is healed too"
    else:
        assert set(n_left_out) == {0}


def test_the_signature_is_the_one_that_is_known() -> None:
    known = (
        "model, parser, prompt, tokenizer=None, draft_model=None, seed_str=None, max_grammar_corrections=3, "
        "stop_at=None, token_healing=True, top_p=0.9, temperature=0.6, max_new_tokens=32, save_html=True, verbose=False"
    )
    for function in (guide, aguide):
        parameters = list(inspect.signature(function).parameters.values())
        by_place = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        told = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in by_place]
        assert ", ".join(told) == known
        assert [p.name for p in parameters if p not in by_place] == ["seed"]
    drafter = Scripted("-")
    result = guide(Scripted("(1 plus 2)"), load_parser("arithmetic"), "", None, drafter, None, 3, None, True, 0.9)
    assert result.response == "(1 - 2)" and drafter.prompts, "the fifth is the draft model"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> tuple[list[AsyncLM], list[AsyncLM]]:
    """Language models that were made, and that were closed."""
    made: list[AsyncLM] = []
    closed: list[AsyncLM] = []
    init, close = AsyncLM.__init__, AsyncLM.close

    def recording_init(self: AsyncLM, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        made.append(self)

    def recording_close(self: AsyncLM) -> None:
        close(self)
        closed.append(self)

    monkeypatch.setattr(AsyncLM, "__init__", recording_init)
    monkeypatch.setattr(AsyncLM, "close", recording_close)
    return made, closed


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["loaded", "folder", "draft", "chosen", "failed"])
def test_what_guide_opens_it_closes(
    opened: tuple[list[AsyncLM], list[AsyncLM]],
    kind: str,
    tiny_llama: PreTrainedModel,
    tiny_tokenizer_512: PreTrainedTokenizerFast,
    tiny_model_folder: Path,
) -> None:
    made, closed = opened
    parser, short = load_parser("robot"), {"max_new_tokens": 3, "max_grammar_corrections": 1, "seed": 1}
    if kind == "loaded":
        result = guide(tiny_llama, parser, "go: ", tiny_tokenizer_512, **short)
    elif kind == "folder":
        result = guide(str(tiny_model_folder), parser, "go: ", **short)
    elif kind == "draft":
        result = guide(Scripted("move up 3"), parser, "go: ", draft_model=str(tiny_model_folder), **short)
        assert result.num_grammar_corrections == 1
    elif kind == "chosen":
        assert choose_candidate(["river", "island"], "the ", str(tiny_model_folder)) in ("river", "island")
    else:
        with pytest.raises(InvalidQuery, match="function"):
            guide(tiny_llama, parser, "go: ", tiny_tokenizer_512, draft_model=3, **short)
    if kind in ("loaded", "folder", "draft"):
        assert parser.is_viable(result.response)
    assert len(made) == 1 and closed == made


@pytest.mark.thorough
async def test_a_model_of_the_callers_stays_open(
    opened: tuple[list[AsyncLM], list[AsyncLM]],
    tiny_llama: PreTrainedModel,
    tiny_tokenizer_512: PreTrainedTokenizerFast,
) -> None:
    """Also one that shares its engine with what `guide` opens and closes on the same loaded model."""
    made, closed = opened
    parser = load_parser("robot")
    async with AsyncTransformer(tiny_llama, tiny_tokenizer_512) as llm:
        before = await llm.next_token_logprobs([1, 2])
        for model in (tiny_llama, llm):
            for draft_model in (None, llm):
                await aguide(
                    model, parser, "go: ", tiny_tokenizer_512, draft_model, max_new_tokens=2, max_grammar_corrections=1
                )
        assert llm not in closed and len(made) == 3 and closed == made[1:]
        assert torch.equal(before, await llm.next_token_logprobs([1, 2]))


@pytest.fixture
def server(tiny_tokenizer_512: PreTrainedTokenizerFast) -> Iterator[Any]:
    """A server on loopback that speaks the protocol, serving our own model; it refuses its first request."""
    llm = MockAsyncLM(tiny_tokenizer_512)

    class Handler(BaseHTTPRequestHandler):
        seen: list[dict[str, Any]] = []
        running = most = 0
        lock = threading.Lock()
        others = threading.Condition(lock)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with Handler.lock:
                Handler.seen.append({"path": self.path, **body})
                Handler.running += 1
                Handler.most = max(Handler.most, Handler.running)
                Handler.others.notify_all()
                # Whoever sends three at a time sends them while this one waits.
                Handler.others.wait_for(lambda: Handler.running > 2, timeout=0.1)
                is_first = len(Handler.seen) == 1
            if is_first:
                self.answer(503, {"error": {"message": "busy"}})
            else:
                prompt = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
                asked = llm.sample(llm.tokenizer.encode(prompt), body["max_tokens"], [2], body["temperature"], seed=1)
                text = llm.tokenizer.decode(asyncio.run(asked))
                choice = {"index": 0, "finish_reason": "stop", "logprobs": None}
                choice |= {"message": {"role": "assistant", "content": text}} if "messages" in body else {"text": text}
                kind = "chat.completion" if "messages" in body else "text_completion"
                self.answer(200, {"id": "1", "object": kind, "created": 1, "model": "mock", "choices": [choice]})

        def answer(self, status: int, value: Any) -> None:
            data = json.dumps(value).encode()
            with Handler.lock:  # whoever has the answer may send the next request before this thread goes on
                Handler.running -= 1
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}/v1", Handler
    http.shutdown()
    http.server_close()
    thread.join()
    llm.close()


@pytest.mark.parametrize("is_chat", [False, True])
@pytest.mark.thorough
async def test_a_server_is_a_model(server: Any, is_chat: bool) -> None:
    url, handler = server
    model = OpenAICompatible(
        "mock", base_url=url, api_key="none", max_tokens=6, is_chat=is_chat, n_at_once=2, timeout_s=20
    )
    parser = load_parser("json")
    results = await asyncio.gather(*(aguide(model, parser, f"JSON {i}:") for i in range(3)))
    for result in results:
        assert parser.is_viable(result.response) and result.valid == parser.is_valid(result.response)
    assert handler.seen[0]["path"] == ("/v1/chat/completions" if is_chat else "/v1/completions")
    assert handler.seen[0]["max_tokens"] == 6 and handler.most <= 2
    assert len(handler.seen) > 3, "the refused request was sent again"
    await model.aclose()


@pytest.mark.thorough
async def test_a_server_that_does_not_answer_is_given_up() -> None:
    """It takes the connection and says nothing; each of two attempts has its time."""
    n_accepted = 0
    release = asyncio.Event()

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal n_accepted
        n_accepted += 1
        await release.wait()
        writer.close()

    listening = await asyncio.start_server(hang, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    model = OpenAICompatible(
        "mock", base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout_s=0.2, max_retries=1
    )
    with pytest.raises(openai.APITimeoutError):
        await asyncio.wait_for(model("x"), timeout=30)
    assert n_accepted == 2
    release.set()
    await model.aclose()
    listening.close()
    await listening.wait_closed()


async def test_a_server_that_is_not_there_is_told() -> None:
    model = OpenAICompatible("mock", base_url="http://127.0.0.1:9/v1", api_key="none", max_retries=0, timeout_s=2)
    with pytest.raises(openai.APIConnectionError):
        await aguide(model, load_parser("json"), "x")
    await model.aclose()
