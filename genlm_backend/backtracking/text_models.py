"""Text models: functions from a prompt to its continuation, and models behind an interface like OpenAI's."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from typing import Any

from genlm_backend.errors import BackendUnavailable

TextFunction = Callable[[str], str | Awaitable[str]]


async def continuation(function: TextFunction, prompt: str) -> str:
    """What a function, sync (then in a thread) or async, continues a prompt with; an echoed prompt is cut off."""
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
        outcome: Any = function(prompt)
    else:
        outcome = await asyncio.to_thread(function, prompt)
    text = str(await outcome if inspect.isawaitable(outcome) else outcome)
    return text[len(prompt) :] if prompt and text.startswith(prompt) else text


class OpenAICompatible:
    """A model behind a server that speaks OpenAI's protocol, as a function of a prompt.

    Args:
        model: Its name there.
        base_url: Of the server; None is OpenAI's own.
        api_key: None takes the environment variable OPENAI_API_KEY.
        max_tokens: Most tokens of one answer.
        temperature: Of its draws.
        is_chat: Ask `/chat/completions`, with the prompt as a user's message, and not `/completions`.
        timeout_s: For one attempt.
        max_retries: Further attempts after time-outs, refused connections and overloaded servers.
        n_at_once: Most requests that run at a time.
        **options: Further fields of each request, such as `stop` or `seed`.

    Raises:
        BackendUnavailable: openai is not installed.
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
        self._client = openai.AsyncOpenAI(
            base_url=base_url, api_key=api_key, timeout=timeout_s, max_retries=max_retries
        )
        self._fields = {"model": model, "max_tokens": max_tokens, "temperature": temperature, **options}
        self._is_chat = is_chat
        self._n_at_once = n_at_once
        self._slots: dict[asyncio.AbstractEventLoop, asyncio.Semaphore] = {}

    async def __call__(self, prompt: str) -> str:
        """The continuation of a prompt.

        Raises:
            openai.OpenAIError: The server refused, or did not answer after all attempts.
        """
        slots = self._slots.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(self._n_at_once))
        async with slots:
            if self._is_chat:
                messages: Any = [{"role": "user", "content": prompt}]
                answer: Any = await self._client.chat.completions.create(messages=messages, **self._fields)
                return answer.choices[0].message.content or ""
            answer = await self._client.completions.create(prompt=prompt, **self._fields)
            return answer.choices[0].text or ""

    async def aclose(self) -> None:
        """Close its connections."""
        await self._client.close()
