"""Text models: functions from a prompt to its continuation, and models behind an interface like OpenAI's."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from genlm_backend.errors import BackendUnavailable, InvalidQuery

if TYPE_CHECKING:
    from openai import AsyncOpenAI

TextFunction = Callable[[str], str | Awaitable[str | None] | None]


async def continuation(function: TextFunction, prompt: str) -> str:
    """What a function, sync (then in a thread) or async, continues a prompt with; an echoed prompt is cut off.

    Raises:
        InvalidQuery: It answers with neither text nor None, which counts as an empty text.
    """
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
        outcome: Any = function(prompt)
    else:
        outcome = await asyncio.to_thread(function, prompt)
    text = await outcome if inspect.isawaitable(outcome) else outcome
    if text is None:
        return ""
    if not isinstance(text, str):
        raise InvalidQuery(
            f"the model, a function, answered with a {type(text).__name__}; expected a str, the continuation of its "
            "prompt, or None: let it return the text of the answer"
        )
    return text[len(prompt) :] if prompt and text.startswith(prompt) else text


class OpenAICompatible:
    """A model behind a server that speaks OpenAI's protocol, as a function of a prompt.

    It may be called from any event loop, in any thread. Each request has a connection of its own, because a connection
    that stays open belongs to one loop, and each call of `guide` makes a new loop.

    Args:
        model: Its name there.
        base_url: Of the server; None is OpenAI's own.
        api_key: None takes the environment variable OPENAI_API_KEY.
        max_tokens: Most tokens of one answer.
        temperature: Of its draws.
        is_chat: Ask `/chat/completions`, with the prompt as a user's message, and not `/completions`.
        timeout_s: For one attempt.
        max_retries: Further attempts after time-outs, refused connections and overloaded servers.
        n_at_once: Most requests that run at a time in one event loop.
        **options: Further fields of each request, such as `stop` or `seed`.

    Raises:
        BackendUnavailable: openai is not installed.
        InvalidQuery: `n_at_once` is less than 1.
        openai.OpenAIError: There is no key.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        max_tokens: int = 32,
        temperature: float = 0.6,
        is_chat: bool = False,
        timeout_s: float = 60.0,
        max_retries: int = 2,
        n_at_once: int = 16,
        **options: Any,
    ) -> None:
        try:
            import openai
        except ImportError as error:
            raise BackendUnavailable("openai", 'pip install "genlm-backend[openai]"') from error
        if n_at_once < 1:
            raise InvalidQuery(f"n_at_once is {n_at_once}; expected at least 1 request at a time")
        self._new_client = partial(
            openai.AsyncOpenAI,
            base_url=base_url,
            api_key=api_key,
            timeout=timeout_s,
            max_retries=max_retries,
            default_headers={"Connection": "close"},
        )
        self._new_client()  # a key that is missing is told now
        self._fields = {"model": model, "max_tokens": max_tokens, "temperature": temperature, **options}
        self._is_chat = is_chat
        self._n_at_once = n_at_once
        self._by_loop: dict[asyncio.AbstractEventLoop, tuple[AsyncOpenAI, asyncio.Semaphore]] = {}

    async def __call__(self, prompt: str) -> str:
        """The continuation of a prompt.

        Raises:
            openai.OpenAIError: The server refused, or did not answer after all attempts.
        """
        client, slots = self._of_this_loop()
        async with slots:
            if self._is_chat:
                messages: Any = [{"role": "user", "content": prompt}]
                answer: Any = await client.chat.completions.create(messages=messages, **self._fields)
                return (answer.choices[0].message.content or "") if answer.choices else ""
            answer = await client.completions.create(prompt=prompt, **self._fields)
            return (answer.choices[0].text or "") if answer.choices else ""

    def _of_this_loop(self) -> tuple[AsyncOpenAI, asyncio.Semaphore]:
        """The client of the running event loop, and its slots; those of closed loops are dropped."""
        for loop in list(self._by_loop):
            if loop.is_closed():
                self._by_loop.pop(loop, None)
        here = asyncio.get_running_loop()
        if here not in self._by_loop:
            self._by_loop[here] = self._new_client(), asyncio.Semaphore(self._n_at_once)
        return self._by_loop[here]

    async def aclose(self) -> None:
        """Close what it has in this event loop; another call opens it anew."""
        client, _ = self._by_loop.pop(asyncio.get_running_loop(), (None, None))
        if client is not None:
            await client.close()
