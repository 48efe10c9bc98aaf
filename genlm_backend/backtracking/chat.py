"""ChatPipeline: turns of a conversation over the model's chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from genlm_backend.backtracking.generator import Generator
from genlm_backend.batching import run_sync
from genlm_backend.errors import InvalidRequest, UnsupportedModel

Message = dict[str, str]


class ChatPipeline:
    """Answers in a conversation; the caller keeps the history.

    Args:
        generator: Generates the answers.
    """

    def __init__(self, generator: Generator) -> None:
        self.generator = generator

    def run_turn(
        self, question: str, history: Sequence[Message], **generation_kwargs: Any
    ) -> tuple[str, list[Message]]:
        """`arun_turn` for callers that cannot await; works inside a running event loop."""
        return run_sync(self.arun_turn(question, history, **generation_kwargs))

    async def arun_turn(
        self, question: str, history: Sequence[Message], **generation_kwargs: Any
    ) -> tuple[str, list[Message]]:
        """The answer, and the history with question and answer.

        Args:
            question: What the user says.
            history: Messages with `role` and `content`, a system message first if there is one; not changed.
            generation_kwargs: For `Generator.agenerate`.

        Raises:
            UnsupportedModel, InvalidRequest: See `prompt_ids`.
            GenlmError: As `walk`.
        """
        asked = [*history, {"role": "user", "content": question}]
        answer = await self.generator.agenerate(self.prompt_ids(asked), **generation_kwargs)
        return answer, [*asked, {"role": "assistant", "content": answer}]

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of a conversation up to where the answer begins; the template alone says where a BOS is.

        Raises:
            UnsupportedModel: The model has no chat template.
            InvalidRequest: Its template refuses this conversation, such as for a system message.
        """
        tokenizer, name = self.generator.tokenizer, self.generator.name
        if not getattr(tokenizer, "chat_template", None):
            raise UnsupportedModel(f"{name} has no chat template", "use a model that was made for conversations")
        from jinja2 import TemplateError  # what transformers writes the prompt with

        try:
            ids: list[int] = tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except TemplateError as error:
            raise InvalidRequest(f"the chat template of {name} refuses these messages: {error}") from error
        return ids
