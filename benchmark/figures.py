"""The pictures of the documentation, always the same: `make figures` writes them to docs/figures."""

from __future__ import annotations

import asyncio
from pathlib import Path

from genlm_backend.llm import load_model_by_name
from genlm_backend.trie import TokenCharacterTrie

FOLDER = Path(__file__).parent.parent / "docs" / "figures"
PROMPT = "An apple a day keeps the"


def four_words() -> None:
    """The trie that the page explains, with the masses of its prefixes."""
    trie = TokenCharacterTrie([b"cat", b"cats", b"dog", b"dogs"])
    masses = trie.mass_sum(p_llm=[0.4, 0.1, 0.3, 0.2])
    trie.visualize(masses).render(outfile=FOLDER / "four_words.svg", cleanup=True)


async def next_bytes() -> None:
    """What SmolLM2 writes next, as the heaviest part of the trie of its vocabulary."""
    async with load_model_by_name("smollm2", "hf") as llm:
        row = await llm.next_token_logprobs(llm.tokenizer.encode(PROMPT))
        trie = TokenCharacterTrie(llm.byte_vocab)
        masses = trie.mass_sum(row.exp())
        picture = trie.visualize(masses, prefix=b" d", depth=4, n_children=3)
        picture.render(outfile=FOLDER / "next_bytes.svg", cleanup=True)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    four_words()
    asyncio.run(next_bytes())
