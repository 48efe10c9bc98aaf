"""What functions and servers answer is text, or said not to be."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from genlm_backend.backtracking import OpenAICompatible, guide, load_parser
from genlm_backend.backtracking.text_models import continuation
from genlm_backend.errors import InvalidQuery


@pytest.fixture
def server() -> Iterator[tuple[str, list[Any]]]:
    """A server on loopback whose connections stay open as long as a client wants; it answers what the list holds."""
    choices: list[Any] = [{"index": 0, "finish_reason": "stop", "logprobs": None, "text": "12"}]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            value = {"id": "1", "object": "text_completion", "created": 1, "model": "mock", "choices": choices}
            data = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}/v1", choices
    http.shutdown()
    http.server_close()
    thread.join()


def number_from(model: OpenAICompatible) -> str:
    return guide(model, load_parser("start: /[0-9]{4}/\n"), "Number: ").response


@pytest.mark.thorough
def test_a_server_is_asked_from_one_event_loop_after_another(server: tuple[str, list[Any]]) -> None:
    """Each call of `guide` has a loop of its own; nothing of those that are closed is kept."""
    model = OpenAICompatible("mock", base_url=server[0], api_key="none", max_retries=0, n_at_once=1)
    for _ in range(3):
        assert number_from(model) == "1212"
    assert len(model._by_loop) == 1
    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(number_from, [model] * 6)) == ["1212"] * 6


async def test_a_server_is_asked_again_after_its_connections_were_closed(server: tuple[str, list[Any]]) -> None:
    model = OpenAICompatible("mock", base_url=server[0], api_key="none", max_retries=0, n_at_once=1)
    await model.aclose()
    for _ in range(2):
        assert await asyncio.gather(model("x"), model("y")) == ["12", "12"]
        await model.aclose()


@pytest.mark.parametrize("is_chat", [False, True])
async def test_a_server_that_has_no_choice_says_nothing(server: tuple[str, list[Any]], is_chat: bool) -> None:
    url, choices = server
    choices.clear()
    model = OpenAICompatible("mock", base_url=url, api_key="none", max_retries=0, is_chat=is_chat)
    assert await model("x") == ""
    await model.aclose()


@pytest.mark.parametrize("n_at_once", [0, -1])
def test_requests_at_a_time_are_at_least_one(n_at_once: int) -> None:
    with pytest.raises(InvalidQuery, match=f"n_at_once is {n_at_once}; expected at least 1"):
        OpenAICompatible("mock", api_key="none", n_at_once=n_at_once)


async def test_an_answer_of_none_is_an_empty_text() -> None:
    async def nothing(prompt: str) -> None:
        return None

    assert await continuation(nothing, "x") == "" and await continuation(lambda prompt: None, "x") == ""


@pytest.mark.parametrize("answer", [b"12", {"text": "12"}, 12])
async def test_an_answer_that_is_no_text_is_refused(answer: Any) -> None:
    with pytest.raises(InvalidQuery, match=f"answered with a {type(answer).__name__}; expected a str"):
        await continuation(lambda prompt: answer, "x")
