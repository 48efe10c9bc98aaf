"""Tries over vocabularies: from the weights of tokens to the weights of all their byte prefixes."""

from genlm_backend.trie.next_bytes import NextBytes, NextByteTokens
from genlm_backend.trie.tries import AsyncTokenCharacterTrie, ParallelTokenCharacterTrie, TokenCharacterTrie

__all__ = ["AsyncTokenCharacterTrie", "NextByteTokens", "NextBytes", "ParallelTokenCharacterTrie", "TokenCharacterTrie"]
