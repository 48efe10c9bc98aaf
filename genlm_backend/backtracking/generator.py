"""Generator and GenerationSession: backtracking-llm's way to generate, on any AsyncLM; and many at once."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, NamedTuple, Self

import torch

from genlm_backend.backtracking.operators import CallableRule, is_pure, operator_rule, rules_of
from genlm_backend.backtracking.rules import EVERYTHING, Keep, Rule, Sees, Step, Verdict
from genlm_backend.backtracking.walk import Budget, Outcome, Walk, walk
from genlm_backend.batching import run_sync
from genlm_backend.llm import AsyncTransformer, load_model_by_name
from genlm_backend.llm.base import AsyncLM

logger = logging.getLogger(__name__)


class StepResult(NamedTuple):
    """One step of a session.

    Attributes:
        token_id: What was drawn.
        backtrack_count: How many tokens the operator asks to take back; `session.backtrack` does it.
        probabilities: (k,) of the tokens it was drawn from, most probable first.
    """

    token_id: int
    backtrack_count: int
    probabilities: torch.Tensor


class Generator:
    """Text from prompts, with an operator that may take tokens back.

    Args:
        model: An AsyncLM, or a transformers model.
        tokenizer: Of a transformers model; an AsyncLM has its own.
    """

    def __init__(self, model: Any, tokenizer: Any = None) -> None:
        self.llm = as_language_model(model, tokenizer)
        self.model = model
        self.tokenizer = self.llm.tokenizer if tokenizer is None else tokenizer

    @classmethod
    def from_pretrained(cls, model_name_or_path: str, **model_kwargs: Any) -> Self:
        """A generator for a model by name.

        Args:
            model_name_or_path: 'smollm2', a Hugging Face id, a local folder or a `.gguf` path.
            model_kwargs: For transformers' `from_pretrained`, such as `dtype`; `device` and `backend` choose where it
                runs and what runs it.

        Raises:
            GenlmError: As `load_model_by_name`.
        """
        backend = model_kwargs.pop("backend", None)
        device = model_kwargs.pop("device", None)
        options: dict[str, Any] = {}
        if device is not None:
            options["device"] = str(device)
        if model_kwargs:
            options["hf_opts"] = model_kwargs
        generator = cls(load_model_by_name(model_name_or_path, backend=backend, llm_opts=options))
        generator._name = model_name_or_path
        return generator

    _name: str | None = None

    @property
    def name(self) -> str:
        """The model's name, for messages."""
        if self._name is not None:
            return self._name
        return str(getattr(self.tokenizer, "name_or_path", "") or type(self.model).__name__)

    def generate(
        self,
        prompt: str | Sequence[int],
        operator: Any = None,
        max_new_tokens: int = 100,
        backtrack_every_n: int = 1,
        temperature: float = 1.0,
        top_k: int | None = 50,
        stop_sequences: Sequence[str] | None = None,
        **options: Any,
    ) -> str:
        """`agenerate` for callers that cannot await; works inside a running event loop."""
        return run_sync(
            self.agenerate(
                prompt, operator, max_new_tokens, backtrack_every_n, temperature, top_k, stop_sequences, **options
            )
        )

    __call__ = generate

    async def agenerate(
        self,
        prompt: str | Sequence[int],
        operator: Any = None,
        max_new_tokens: int = 100,
        backtrack_every_n: int = 1,
        temperature: float = 1.0,
        top_k: int | None = 50,
        stop_sequences: Sequence[str] | None = None,
        **options: Any,
    ) -> str:
        """The new text, up to a stop sequence or an end token, both left out.

        Args:
            prompt: Text, or token ids.
            operator: Says how many tokens to take back, see `genlm_backend.backtracking.operators`; None keeps all. One
                object may serve many generations at once: one that remembers is copied for the second, and the copy
                told by `backtrack` that all it has seen is gone.
            max_new_tokens: Most tokens of the text; those taken back do not count.
            backtrack_every_n: The operator is asked at every n-th token.
            temperature: Divides the logits; 0 takes the best token.
            top_k: Draws among so many tokens; None is all.
            stop_sequences: Strings before which the text ends.
            options: For `walk`: `seed`, `rules` (besides the operator), `mode`, `budget`, `top_p`, ...

        Raises:
            ValueError: An argument is out of its range.
            GenlmError: As `walk`.
        """
        outcome = await self.arun(
            prompt, operator, max_new_tokens, backtrack_every_n, temperature, top_k, stop_sequences, **options
        )
        return outcome.text

    async def arun(
        self,
        prompt: str | Sequence[int],
        operator: Any = None,
        max_new_tokens: int = 100,
        backtrack_every_n: int = 1,
        temperature: float = 1.0,
        top_k: int | None = 50,
        stop_sequences: Sequence[str] | None = None,
        **options: Any,
    ) -> Outcome:
        """`agenerate` with all that is known of the text; arguments as there."""
        with operator_in_use(operator, self._decode, backtrack_every_n) as rules:
            options |= {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k}
            options["rules"] = [*rules, *rules_of(options.get("rules", ()))]
            outcome = await walk(self.llm, prompt, stop=stop_sequences or (), **options)
        _tell(outcome)
        return outcome

    @asynccontextmanager
    async def walking(
        self, prompt: str | Sequence[int], operator: Any = None, backtrack_every_n: int = 1, **options: Any
    ) -> AsyncGenerator[Walk, None]:
        """The walk of one text, to iterate over; `options` are those of `walk`."""
        with operator_in_use(operator, self._decode, backtrack_every_n) as rules:
            options["rules"] = [*rules, *rules_of(options.get("rules", ()))]
            walking = walk(self.llm, prompt, **options)
            yield walking
        if walking.is_done and logger.isEnabledFor(logging.DEBUG):
            _tell(walking.outcome())

    def _decode(self, token_id: int) -> str:
        return decoded(self.llm, token_id)

    def __repr__(self) -> str:
        return f"Generator({self.name!r})"


class GenerationSession:
    """One generation, a step at a time; the caller decides what is taken back.

    Args:
        model: As for `Generator`.
        tokenizer: As for `Generator`.
        prompt: Text, or token ids.
        operator, backtrack_every_n, max_new_tokens, temperature, top_k, stop_sequences: As `Generator.agenerate`.
        seed: Equal seeds give equal texts.

    Raises:
        ValueError: An argument is out of its range.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        prompt: str | Sequence[int] = "",
        operator: Any = None,
        backtrack_every_n: int = 1,
        max_new_tokens: int = 100,
        temperature: float = 1.0,
        top_k: int | None = 50,
        stop_sequences: Sequence[str] | None = None,
        seed: int | None = None,
    ) -> None:
        self.llm = as_language_model(model, tokenizer)
        self.model, self.tokenizer, self.prompt, self.operator = model, tokenizer, prompt, operator
        self.max_new_tokens = max_new_tokens
        self.stop_sequences = list(stop_sequences or [])
        self._watch = _Watch(operator, lambda token_id: decoded(self.llm, token_id), backtrack_every_n)
        self._walk = walk(
            self.llm,
            prompt,
            [self._watch],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            stop=self.stop_sequences,
            budget=Budget(None, None, None),
            mode="none",
            seed=seed,
        )
        self._prompt_ids = list(self._walk.prompt_ids)

    @property
    def done(self) -> bool:
        """Whether an end token, a stop sequence or the length has ended it."""
        return self._walk.is_done

    @property
    def token_ids(self) -> torch.Tensor:
        """`(1, n)` int64: prompt and text."""
        return torch.tensor([[*self._prompt_ids, *self._walk.token_ids]])

    @property
    def generated_token_count(self) -> int:
        """Tokens of the text."""
        return len(self._walk.token_ids)

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return len(self._prompt_ids)

    def step(self) -> StepResult:
        """`astep` for callers that cannot await."""
        return run_sync(self.astep())

    async def astep(self) -> StepResult:
        """Draw one token; what the operator says about it is told, not done.

        Raises:
            RuntimeError: The generation is done.
            GenlmError: As `walk`.
        """
        if self.done:
            raise RuntimeError("cannot step: the generation is done; backtrack(n) re-opens it")
        before = len(self._walk.token_ids)
        while len(self._walk.token_ids) == before and not self.done:
            await self._walk.advance()
        if len(self._walk.token_ids) >= self.max_new_tokens and not self.done:
            await self._walk.advance()  # no token follows: this ends it
        ids, dist = self._walk.token_ids, self._walk.last
        probabilities = torch.empty(0) if dist is None else torch.from_numpy(dist.probabilities.astype("float32"))
        return StepResult(ids[-1] if ids else -1, self._watch.asked, probabilities)

    def backtrack(self, n_tokens: int) -> None:
        """Take back tokens, at most all of the text; a finished session is open again, and the operator is told."""
        if n_tokens > 0:
            self._walk.take_back(n_tokens)
            self._watch.rewind(len(self._walk.token_ids))

    def get_decoded_text(self) -> str:
        """The text without the prompt."""
        return self._walk.outcome().text

    def __repr__(self) -> str:
        n = f"{self.generated_token_count}/{self.max_new_tokens}"
        return f"<GenerationSession generated={n}, done={self.done}, prompt_len={self.prompt_length}>"


class _Watch(Rule[Any]):
    """Asks an operator and objects to nothing."""

    sees = Sees.LOGITS
    reach = EVERYTHING

    def __init__(self, operator: Any, decode: Callable[[int], str], every_n: int) -> None:
        self._rule = operator_rule((lambda *_: 0) if operator is None else operator, decode, every_n)
        self.asked = 0

    def init(self, prompt: Any) -> Any:
        return self._rule.init(prompt)

    def step(self, state: Any, step: Step) -> tuple[Any, Verdict]:
        state, verdict = self._rule.step(state, step)
        self.asked = getattr(verdict, "n", 0)
        return state, Keep()

    def rewind(self, n_tokens: int) -> None:
        if isinstance(self._rule, CallableRule):
            self._rule.rewind(n_tokens)


@contextmanager
def operator_in_use(operator: Any, decode: Callable[[int], str], every_n: int) -> Iterator[list[Rule[Any]]]:
    """The rules of an operator for one generation; one that remembers begins each as it was before the first."""
    if operator is None or is_pure(operator):
        yield [] if operator is None else [operator_rule(operator, decode, every_n)]
        return
    rule = operator_rule(operator, decode, every_n)  # what it refuses was never in use
    assert isinstance(rule, CallableRule)
    rule.take()
    try:
        yield [rule]
    finally:
        rule.give_back()


def _tell(outcome: Outcome) -> None:
    """One record of what a text came to."""
    n = len(outcome.token_ids)
    logger.debug("%d tokens, %d drawn, %d rollbacks; ended by %s", n, outcome.n_draws, outcome.n_undos, outcome.reason)


def as_language_model(model: Any, tokenizer: Any = None) -> AsyncLM:
    """An AsyncLM from one, or from a transformers model and its tokenizer.

    Raises:
        TypeError: A transformers model came without its tokenizer.
    """
    if isinstance(model, AsyncLM):
        return model
    if tokenizer is None:
        raise TypeError(
            f"{type(model).__name__} came without a tokenizer; expected an AsyncLM, or a model and tokenizer"
        )
    return AsyncTransformer(model, tokenizer)


def decoded(llm: AsyncLM, token_id: int) -> str:
    """The text of one token, as its tokenizer decodes it."""
    if llm.tokenizer is None:
        return llm.str_vocab[token_id]
    text: str = llm.tokenizer.decode([token_id])
    return text
