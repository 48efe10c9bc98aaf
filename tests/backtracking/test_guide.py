"""Guided text is in the grammar or says that it is not, from language models, functions and servers."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from html import unescape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import openai
import pytest
from transformers import PreTrainedTokenizerFast

import genlm_backend.backtracking as backtracking
from genlm_backend.backtracking import OpenAICompatible, aguide, choose_candidate, guide, load_parser
from genlm_backend.errors import InvalidGrammar, InvalidQuery
from genlm_backend.llm import MockAsyncLM
from tests.backtracking.speaker import chooser, speaker

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


@pytest.fixture
def server(tiny_tokenizer_512: PreTrainedTokenizerFast) -> Iterator[Any]:
    """A server on loopback that speaks the protocol, serving our own model; it refuses its first request."""
    llm = MockAsyncLM(tiny_tokenizer_512)

    class Handler(BaseHTTPRequestHandler):
        seen: list[dict[str, Any]] = []
        running = most = 0
        lock = threading.Lock()

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with Handler.lock:
                Handler.seen.append({"path": self.path, **body})
                Handler.running += 1
                Handler.most = max(Handler.most, Handler.running)
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
            with Handler.lock:
                Handler.running -= 1

        def answer(self, status: int, value: Any) -> None:
            data = json.dumps(value).encode()
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


async def test_a_server_that_is_not_there_is_told() -> None:
    model = OpenAICompatible("mock", base_url="http://127.0.0.1:9/v1", api_key="none", max_retries=0, timeout_s=2)
    with pytest.raises(openai.APIConnectionError):
        await aguide(model, load_parser("json"), "x")
    await model.aclose()
