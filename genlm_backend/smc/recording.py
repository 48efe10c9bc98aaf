"""Recording: every answer a run got from its models and every draw it made, to run it again, bit for bit, anywhere.

Rows of one model differ in the last digits between machines, thread counts and batches, and now and then that turns a
draw. A run against a recording asks no model and draws nothing: program, weights and resampling run again on the same
numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import torch

from genlm_backend.errors import NoTokenAllowed, ReplayMismatch
from genlm_backend.llm.base import AsyncLM
from genlm_backend.llm.queries import Draw, LogNormalizer, Logprobs, Query, Row, TopK
from genlm_backend.packed_mask import PackedMask
from genlm_backend.smc import plain
from genlm_backend.smc.proposals import Proposed
from genlm_backend.smc.resampling import Resampled

Where = tuple[int, int, int]
_FORM = "genlm_backend.smc recording 2"


class Recording:
    """What a run asked and drew.

    Make one, pass it to `smc(..., recording=...)`, `save` it; `Recording.load` gives one that answers instead.

    Args:
        models: Names of the models. Those that have none are told apart by the order in which they are first asked,
            which must then be the same each time: name them where that depends on the run, or where it is resumed.

    Attributes:
        is_replay: Whether it answers, and asks nothing.
    """

    def __init__(self, models: Mapping[str, AsyncLM] | None = None) -> None:
        self.is_replay = False
        self._names = dict(models or {})
        self._models = dict(self._names)
        self._answers: dict[str, Any] = {}
        self._draws: dict[Where, Proposed] = {}
        self._resampled: dict[int, Resampled] = {}

    def replay(self) -> Recording:
        """The same record, as one that answers."""
        other = Recording(self._names)
        other.is_replay = True
        other._answers, other._draws, other._resampled = self._answers, self._draws, self._resampled
        return other

    def save(self, path: str | FilePath) -> None:
        """Write it as JSON; rows as base64 of float32.

        Raises:
            TypeError: A drawn value is not plain data.
        """
        plain.save(
            path,
            _FORM,
            {
                "answers": [[key, answer] for key, answer in self._answers.items()],
                "draws": [[list(where), drawn.value, drawn.log_weight] for where, drawn in self._draws.items()],
                "resampled": [
                    [step, [int(i) for i in drawn.ancestors], drawn.log_weights.tolist()]
                    for step, drawn in self._resampled.items()
                ],
            },
        )

    @classmethod
    def load(cls, path: str | FilePath, models: Mapping[str, AsyncLM] | None = None) -> Recording:
        """A saved recording, as one that answers.

        Args:
            path: Where it was saved.
            models: As for the recording that was saved.

        Raises:
            ValueError: The file is not a recording.
        """
        data = plain.load(path, _FORM)
        loaded = cls(models)
        loaded.is_replay = True
        loaded._answers = dict(data["answers"])
        loaded._draws = {tuple(where): Proposed(value, weight) for where, value, weight in data["draws"]}
        loaded._resampled = {
            step: Resampled(np.array(ancestors, np.int64), np.array(log_weights, np.float64))
            for step, ancestors, log_weights in data["resampled"]
        }
        return loaded

    async def answer(self, llm: AsyncLM, token_ids: tuple[int, ...], query: Query, lora_name: str | None) -> Any:
        """The model's answer, kept; or the kept one.

        Raises:
            ReplayMismatch: It was not asked when this was recorded.
        """
        key = self._key(llm, token_ids, query, lora_name)
        if key in self._answers:
            answer = self._answers[key]
        elif self.is_replay:
            raise ReplayMismatch("a question to the model", key, "no answer to it")
        else:
            try:
                answer = await llm.query(token_ids, query, lora_name)
            except NoTokenAllowed as error:
                answer = ["NoTokenAllowed", *error.data]
            self._answers[key] = answer
        if isinstance(answer, list) and answer and answer[0] == "NoTokenAllowed":
            raise NoTokenAllowed(*answer[1:])
        return answer.clone() if isinstance(answer, torch.Tensor) else answer

    def row_again(self, llm: AsyncLM, token_ids: tuple[int, ...], lora_name: str | None) -> torch.Tensor:
        """A row that a particle was given before, for its copies.

        Raises:
            ReplayMismatch: It was not asked when this was recorded.
        """
        key = self._key(llm, token_ids, Row(), lora_name)
        if key in self._answers:
            row: torch.Tensor = self._answers[key].clone()
            return row
        if self.is_replay:
            raise ReplayMismatch("a question to the model", key, "no answer to it")
        row = llm.next_token_logprobs_sync(token_ids, lora_name)  # given before this recording began
        self._answers[key] = row
        return row.clone()

    def known_draw(self, where: Where) -> Proposed | None:
        """The recorded draw of this step, particle and key; None where it is to be made.

        Raises:
            ReplayMismatch: This draw was not made when this was recorded.
        """
        if not self.is_replay:
            return None
        if where not in self._draws:
            raise ReplayMismatch(f"step {where[0]}, particle {where[1]}", "a draw", "no such draw")
        return self._draws[where]

    def keep_draw(self, where: Where, drawn: Proposed) -> None:
        """Record a draw."""
        self._draws[where] = drawn

    def known_resampling(self, step: int) -> Resampled | None:
        """The recorded resampling of this step; None where there was none, or where it is to be made."""
        return self._resampled.get(step) if self.is_replay else None

    def keep_resampling(self, step: int, drawn: Resampled) -> None:
        """Record a resampling."""
        self._resampled[step] = drawn

    def _key(self, llm: AsyncLM, token_ids: tuple[int, ...], query: Query, lora_name: str | None) -> str:
        model = next((name for name, known in self._models.items() if known is llm), None)
        if model is None:
            model = str(len(self._models))
            self._models[model] = llm
        return f"{model}|{lora_name}|{_named(query)}|{token_ids}"


def _named(query: Query) -> str:
    match query:
        case Row() | LogNormalizer() | TopK() | Logprobs():
            return repr(query)
        case Draw(key, temperature, mask, top_k, top_p, min_p):
            filters = "" if query.kept is None else f", {top_k}, {top_p}, {min_p}"
            return f"Draw({key}, {temperature}, {_digest(mask)}{filters})"
    return f"{type(query).__name__}({_digest(query[0])})"


def _digest(mask: Any) -> str:
    """What a mask allows, in 16 hexadecimal digits."""
    from hashlib import blake2b

    if mask is None:
        return "None"
    if isinstance(mask, PackedMask):
        mask = mask.unpacked()
    if not isinstance(mask, torch.Tensor | np.ndarray):
        raise TypeError(f"a question about {type(mask).__name__} cannot be recorded; use ctx.recorded for it")
    packed = np.packbits(np.asarray(mask, np.bool_)).tobytes()
    return blake2b(packed, digest_size=8).hexdigest()
