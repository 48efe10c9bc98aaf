"""LanguageModel: a language model with a prompt, as a potential."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch

from genlm_backend.errors import InvalidPotential
from genlm_backend.llm.base import AsyncLM
from genlm_backend.llm.queries import Logprobs
from genlm_backend.potentials.base import Potential, State
from genlm_backend.sampling import with_temperature

_ROWS_AT_ONCE = 64  # while a long sequence is scored with a temperature: 13 MB of a vocabulary of 49,152


class LanguageModel(Potential):
    """The probability that a model continues a prompt with a sequence.

    Weights are normalised: each row sums to 1, with the mass of all end tokens in the column `end`.

    Args:
        llm: The model.
        prompt: Text, encoded as its tokenizer does (with the special tokens it puts first), or token ids.
        temperature: Divides the log-probabilities of every step, which are then normalised; 0 is greedy: weight 1 for
            the one text of the most probable tokens, and 0 for all others.
        eos_token_ids: Tokens that end a text; None takes the tokenizer's. Without any, no text ever ends.
        lora_name: The adapter.

    Attributes:
        prompt_ids: The prompt as token ids.

    Raises:
        InvalidPotential: The prompt has no token, the temperature is negative or not finite, or an end token is none
            of this vocabulary.
    """

    def __init__(
        self,
        llm: AsyncLM,
        prompt: str | Sequence[int],
        *,
        temperature: float = 1.0,
        eos_token_ids: Collection[int] | None = None,
        lora_name: str | None = None,
    ) -> None:
        self.llm = llm
        self.n_tokens = len(llm.byte_vocab)
        self.prompt_ids: tuple[int, ...] = tuple(llm.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)
        self.temperature = float(temperature)
        self.lora_name = lora_name
        self.eos_token_ids = _end_tokens(llm, eos_token_ids)
        if not self.prompt_ids:
            raise InvalidPotential("a prompt without a token", "at least one, such as the tokenizer's bos_token_id")
        if not 0 <= self.temperature < math.inf:
            raise InvalidPotential(f"the temperature {temperature!r}", "a finite number >= 0")
        if unknown := [token_id for token_id in self.eos_token_ids if not 0 <= token_id < self.n_tokens]:
            raise InvalidPotential(f"the end tokens {unknown}", f"token ids from 0 to {self.n_tokens - 1}")
        self._ends = torch.tensor(sorted(self.eos_token_ids), dtype=torch.int64)
        self._greedy: list[int] = []  # the one sequence of temperature 0, as far as it was asked for

    def start(self) -> State:
        return ()

    def extend(self, state: State, token_id: int) -> State:
        return (*state, token_id)

    def context(self, state: State) -> tuple[int, ...]:
        """The token ids to ask the model about: the prompt and the sequence."""
        return (*self.prompt_ids, *state)

    async def prefix(self, state: State) -> float:
        if self._is_over(state):
            return -math.inf
        if self.temperature == 1.0:
            return await self.llm.sequence_logprob(self.prompt_ids, state, self.lora_name)
        if self.temperature == 0.0:
            return 0.0 if await self._is_greedy(state) else -math.inf
        total = 0.0
        for first in range(0, len(state), _ROWS_AT_ONCE):
            ends = range(first, min(first + _ROWS_AT_ONCE, len(state)))
            rows = await self.batch_logw_next([state[:end] for end in ends])
            chosen = torch.tensor([state[end] for end in ends], device=rows.device)
            total += float(rows.gather(1, chosen[:, None]).double().sum())
        return total

    async def complete(self, state: State) -> float:
        begun = await self.prefix(state)
        return begun if begun == -math.inf else begun + float((await self.logw_tokens(state, [self.end]))[0])

    async def logw_next(self, state: State) -> torch.Tensor:
        return (await self.batch_logw_next([state]))[0]

    async def logw_tokens(self, state: State, symbols: Sequence[int]) -> torch.Tensor:
        if self.temperature != 1.0 or self._is_over(state):
            row = await self.logw_next(state)
            return row[torch.tensor(symbols, dtype=torch.int64, device=row.device)]
        asked = [*(0 if symbol == self.end else symbol for symbol in symbols), *self.eos_token_ids]
        logprobs: torch.Tensor = await self.llm.query(self.context(state), Logprobs(asked), self.lora_name)
        chosen = logprobs[: len(symbols)].clone()
        for i, symbol in enumerate(symbols):
            if symbol == self.end:
                chosen[i] = logprobs[len(symbols) :].logsumexp(0)
            elif symbol in self.eos_token_ids:
                chosen[i] = -math.inf
        return chosen

    async def batch_logw_next(self, states: Sequence[State]) -> torch.Tensor:
        if not states:
            return torch.empty(0, self.n_tokens + 1)
        rows = await self._rows(states)
        if self.temperature == 0.0:
            rows[[i for i, state in enumerate(states) if not await self._is_greedy(state)]] = -math.inf
        return rows

    async def _rows(self, states: Sequence[State]) -> torch.Tensor:
        """What follows each, were it alive."""
        contexts = [self.context(state) for state in states]
        logprobs = await self.llm.batch_next_token_logprobs(contexts, self.lora_name)
        if self.temperature != 1.0:
            logprobs = with_temperature(logprobs, self.temperature)
        rows = torch.empty(len(states), self.n_tokens + 1, device=logprobs.device)
        rows[:, : self.end] = logprobs
        ends = self._ends.to(logprobs.device)
        rows[:, self.end] = logprobs[:, ends].logsumexp(1) if len(ends) else -math.inf
        rows[:, ends] = -math.inf
        rows[[i for i, state in enumerate(states) if self._is_over(state)]] = -math.inf
        return rows

    async def _is_greedy(self, state: State) -> bool:
        """Whether each token is the most probable one; at temperature 0 any other sequence is dead."""
        known = self._greedy
        while (first := len(known)) < len(state) and known == list(state[:first]):
            ends = range(first, min(first + _ROWS_AT_ONCE, len(state)))
            rows = await self._rows([state[:end] for end in ends])
            for end, best in zip(ends, rows.argmax(1).tolist(), strict=True):
                if known == list(state[:end]):
                    known.append(best)
        return known[: len(state)] == list(state)

    def _is_over(self, state: State) -> bool:
        return not self.eos_token_ids.isdisjoint(state)


def _end_tokens(llm: AsyncLM, eos_token_ids: Collection[int] | None) -> frozenset[int]:
    if eos_token_ids is not None:
        return frozenset(eos_token_ids)
    eos = getattr(llm.tokenizer, "eos_token_id", None)
    return frozenset() if eos is None else frozenset([eos])
