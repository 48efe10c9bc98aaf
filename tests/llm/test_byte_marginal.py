"""`ByteMarginal`: next-byte masses as a query, for a whole batch at once."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest
import torch

from genlm_backend.errors import InvalidQuery
from genlm_backend.llm import ByteMarginal, MockAsyncLM
from genlm_backend.trie import NextByteTokens, TokenCharacterTrie


@pytest.fixture
def llm(tiny_tokenizer_512: Any) -> Any:
    with_rows = MockAsyncLM(tiny_tokenizer_512)
    yield with_rows
    with_rows.close()


def plain_masses(llm: Any, row: torch.Tensor, prefix: bytes) -> torch.Tensor:
    masses = torch.full((256,), -math.inf, dtype=torch.float64)
    for token, logprob in zip(llm.byte_vocab, row.double(), strict=True):
        if not token.is_special and token.startswith(prefix) and len(token) > len(prefix):
            masses[token[len(prefix)]] = torch.logaddexp(masses[token[len(prefix)]], logprob)
    return masses


@pytest.mark.parametrize("prefix", [b"", b" ", b"t"])
async def test_it_equals_a_plain_sum_over_tokens(llm: Any, prefix: bytes) -> None:
    tokens = NextByteTokens(TokenCharacterTrie(llm.byte_vocab), prefix)
    contexts = [[1], [2, 3], [4, 5, 6]]
    rows = [await llm.next_token_logprobs(context) for context in contexts]
    llm.clear_cache()
    before = llm.statistics().batches
    answers = await asyncio.gather(*(llm.query(context, ByteMarginal(tokens)) for context in contexts))
    assert llm.statistics().batches == before + 1
    for row, answer in zip(rows, answers, strict=True):
        torch.testing.assert_close(answer.log_masses.double(), plain_masses(llm, row, prefix), rtol=0, atol=2e-5)
        if not prefix:
            whole = torch.cat((answer.log_masses, answer.log_ends[None], answer.log_no_text[None])).logsumexp(0)
            assert whole.item() == pytest.approx(0.0, abs=1e-5)


async def test_prefixes_of_their_own_share_a_batch(llm: Any) -> None:
    trie = TokenCharacterTrie(llm.byte_vocab)
    asked = [NextByteTokens(trie, prefix) for prefix in (b"", b" ", b"")]
    row = await llm.next_token_logprobs([7])
    answers = await asyncio.gather(*(llm.query([7], ByteMarginal(tokens)) for tokens in asked))
    for tokens, answer in zip(asked, answers, strict=True):
        torch.testing.assert_close(answer.log_masses.double(), plain_masses(llm, row, tokens.prefix), rtol=0, atol=2e-5)


async def test_a_trie_of_another_vocabulary_is_refused(llm: Any) -> None:
    tokens = NextByteTokens(TokenCharacterTrie([b"a", b"b"]))
    with pytest.raises(InvalidQuery, match="NextByteTokens"):
        await llm.query([1], ByteMarginal(tokens))
    with pytest.raises(InvalidQuery, match="NextByteTokens"):
        await llm.query([1], ByteMarginal(b"t"))  # type: ignore[arg-type]
