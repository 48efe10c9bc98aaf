"""Vocabularies as exact bytes: `decode_vocab` and `Token`."""

from genlm_backend.tokenization.token import Token
from genlm_backend.tokenization.vocabulary import decode_vocab, get_byte_vocab

__all__ = ["Token", "decode_vocab", "get_byte_vocab"]
