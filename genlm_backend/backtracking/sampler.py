"""BacktrackSampler: backtrack_sampler's way to generate, token by token as they become final; and many at once."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self, TypeVar

from genlm_backend.backtracking.operators import InUse, rules_of
from genlm_backend.backtracking.providers import model_of
from genlm_backend.backtracking.strategies import BaseStrategy, remembering, rule_of
from genlm_backend.backtracking.walk import Budget, Outcome, Walk, walk

_UNBOUNDED = 1 << 40
_IN_USE: InUse[BaseStrategy] = InUse()

T = TypeVar("T")


class BacktrackSampler:
    """Tokens of a text, under a strategy that may take some back before anyone has seen them.

    Args:
        provider: An AsyncLM, a TransformersProvider, or a provider of a user's.
        strategy: What to take back.
    """

    def __init__(self, provider: Any, strategy: BaseStrategy) -> None:
        self.provider, self.strategy = provider, strategy
        self.llm = model_of(provider)
        rule_of(strategy)  # a wrong one is told here

    def generate(
        self,
        prompt: str,
        max_length: int | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = 50,
        top_p: float | None = None,
        min_p: float | None = None,
        *args: Any,
        **options: Any,
    ) -> TokenStream:
        """The tokens of one text: iterate with `for`, or with `async for` beside others.

        Args:
            prompt: Text; its special tokens are those that it names.
            max_length: Most tokens of prompt and text.
            max_new_tokens: Most tokens of the text.
            temperature: Divides the logits; 0 takes the best token.
            top_k, top_p, min_p: Filters, as in `walk`.
            args: Not used; backtrack_sampler gave them to its provider.
            options: For `walk`: `seed`, `rules`, `stop`, `budget`, ...

        Raises:
            GenlmError: As `walk`, when it is iterated.
        """
        prompt_ids = self.llm.encode(prompt, add_special_tokens=False)
        bounds = [
            n for n in (max_new_tokens, None if max_length is None else max_length - len(prompt_ids)) if n is not None
        ]
        n_most = max(0, min(bounds, default=_UNBOUNDED))
        options.setdefault("budget", Budget(undos=1000 + 10 * min(n_most, 1 << 20)))
        settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        return TokenStream(self, prompt_ids, {"max_new_tokens": n_most} | settings | options)


class TokenStream:
    """Token ids as they become final; an end token is the last one.

    Reading early to a stop (`break`, `close`, cancellation) leaves nothing behind.
    """

    def __init__(self, sampler: BacktrackSampler, prompt_ids: list[int], options: dict[str, Any]) -> None:
        self._sampler, self._prompt_ids, self._options = sampler, prompt_ids, options
        self._walk: Walk | None = None
        self._strategy: BaseStrategy | None = None
        self._n_read = 0
        self._runner: asyncio.Runner | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._is_closed = False

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        try:
            if self._runner is None:
                self._runner = asyncio.Runner()
            token_id: int = self._call(self._runner.run, self.__anext__())
            return token_id
        except StopAsyncIteration:
            self.close()
            raise StopIteration from None
        except BaseException:
            self.close()
            raise

    def __aiter__(self) -> AsyncIterator[int]:
        return self

    async def __anext__(self) -> int:
        if self._is_closed:
            raise StopAsyncIteration
        try:
            walking = self._begun()
            while self._n_read >= walking.n_final:
                if walking.is_done:
                    raise StopAsyncIteration
                await walking.advance()
        except BaseException:
            self._finish()
            raise
        self._n_read += 1
        return walking.token_ids[self._n_read - 1]

    def outcome(self) -> Outcome:
        """What the walk came to, or where it is."""
        return self._begun().outcome()

    def close(self) -> None:
        """Read no more."""
        self._finish()
        runner, self._runner = self._runner, None
        if runner is not None:
            self._call(runner.close)
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    async def aclose(self) -> None:
        """`close`, for `contextlib.aclosing`."""
        self._finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def _begun(self) -> Walk:
        if self._walk is None:
            strategy = self._sampler.strategy
            if remembering(strategy):
                strategy = self._strategy = _taken(strategy)
                strategy.reset()
            options = dict(self._options)
            rules = [rule_of(strategy), *rules_of(options.pop("rules", ()))]
            self._walk = walk(self._sampler.llm, self._prompt_ids, rules, **options)
        return self._walk

    def _finish(self) -> None:
        self._is_closed = True
        strategy, self._strategy = self._strategy, None
        if strategy is not None:
            try:
                strategy.reset()
            finally:
                _IN_USE.give_back(strategy)

    def _call(self, work: Callable[..., T], *arguments: Any) -> T:
        """Call what runs this stream's own loop, in another thread where this one's loop is running."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return work(*arguments)
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "genlm-token-stream")
        return self._thread.submit(work, *arguments).result()


def _taken(strategy: BaseStrategy) -> BaseStrategy:
    """A strategy for one text: a copy of it where another text uses it, or a part of it."""
    if _IN_USE.take(remembering(strategy), strategy) is not None:
        strategy = copy.deepcopy(strategy)
        _IN_USE.take(remembering(strategy), strategy)
    return strategy
