"""A model that says what a test wants: a function from the text so far to the tokens that may come."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from genlm_backend.llm.base import AsyncLM
from genlm_backend.llm.service import Context, Engine
from genlm_backend.testing import fake_language_model
from genlm_backend.tokenization import Token

Says = Callable[[bytes], Mapping[bytes, float]]


class Speaker(Engine):
    def __init__(self, vocab: Sequence[bytes], says: Says) -> None:
        self.vocab, self.says = list(vocab), says
        self.asked: list[tuple[int, ...]] = []

    def evaluate(self, contexts: Sequence[Context]) -> torch.Tensor:
        return torch.stack([self._row(context.token_ids) for context in contexts])

    def _row(self, token_ids: tuple[int, ...]) -> torch.Tensor:
        self.asked.append(token_ids)
        probabilities = self.says(b"".join(self.vocab[i] for i in token_ids))
        row = torch.full((len(self.vocab),), 1e-9)
        for piece, p in probabilities.items():
            row[self.vocab.index(piece)] = p
        return row.log()


def speaker(vocab: Sequence[bytes], says: Says, special: Sequence[bytes] = ()) -> AsyncLM:
    """Token i has the bytes `vocab[i]`; token 0 is the prompt."""
    llm = fake_language_model(Speaker(vocab, says), len(vocab))
    llm.byte_vocab = [Token(i, piece, is_special=piece in special) for i, piece in enumerate(vocab)]
    llm.str_vocab = [piece.decode("latin-1") for piece in vocab]
    return llm


def chooser(**likely: Mapping[str, float]) -> Says:
    """`chooser(X={"a": 1})`: after a text that ends in X comes a; after all others, as given for `otherwise`."""

    def says(text: bytes) -> dict[bytes, float]:
        ends = [key for key in likely if key != "otherwise" and text.decode("utf-8", "replace").endswith(key)]
        key = max(ends, key=len, default="otherwise")
        return {piece.encode(): p for piece, p in likely[key].items()}

    return says


class Spelling:
    """Text to the longest tokens that fit, from the left, after the token of a beginning."""

    def __init__(self, vocab: Sequence[bytes]) -> None:
        self._vocab = vocab
        self.eos_token_id = vocab.index(b"<eos>")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        rest, token_ids = text.encode(), [0] if add_special_tokens else []
        while rest:
            token_ids.append(
                max(range(len(self._vocab)), key=lambda i: rest.startswith(self._vocab[i]) * len(self._vocab[i]))
            )
            rest = rest[len(self._vocab[token_ids[-1]]) :]
        return token_ids


def reciter(follows: Mapping[bytes, bytes], *more: bytes) -> AsyncLM:
    """After a text that ends in a key comes its token, by the longest key; after any other, the end."""

    def says(text: bytes) -> dict[bytes, float]:
        key = max((key for key in follows if text.endswith(key)), key=len, default=b"")
        return {follows.get(key, b"<eos>"): 1.0}

    vocab = [b"<p>", *dict.fromkeys([*follows.values(), *more]), b"<eos>"]
    llm = speaker(vocab, says, [b"<p>", b"<eos>"])
    llm.tokenizer = Spelling(vocab)
    return llm
