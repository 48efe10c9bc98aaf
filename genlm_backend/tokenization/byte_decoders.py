"""The bytes of every token, read from what a tokenizer says about itself; one reader per family, each proven at load.

A tokenizer of the `tokenizers` library (every fast one of transformers) is read from its own serialised form: its
decoder says how a piece becomes text, so byte-level BPE, SentencePiece BPE with byte fallback and Unigram are told
apart by what they do and never by the name of a class. The others hold their bytes themselves: sentencepiece,
tiktoken, and the tekken files of mistral-common.

A piece is the spelling of a token in the vocabulary's own alphabet, such as `Ġhello`, `▁hello` or `<0x0A>`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from genlm_backend.errors import VocabularyError


class Vocabulary(NamedTuple):
    """The tokens of a tokenizer by id: their bytes, their spellings, and which of them are no text.

    Plain dictionaries rather than one object per token: at 150,000 tokens that halves the time.
    """

    byte_strings: dict[int, bytes]
    pieces: dict[int, str]
    special_ids: set[int]


def read_vocabulary(tokenizer: Any) -> Vocabulary:
    """Every token of `tokenizer` by its id, each proven against the tokenizer.

    Raises:
        VocabularyError: The tokenizer is of no known family, or its bytes contradict what it does.
    """
    for candidate in _inner_tokenizers(tokenizer):
        for is_family, read in _FAMILIES:
            if is_family(candidate):
                return read(candidate, tokenizer)
    raise VocabularyError(
        f"{type(tokenizer).__name__} is neither a fast tokenizer nor made of sentencepiece, tiktoken or a byte decoder"
    )


def byte_level_alphabet() -> dict[str, int]:
    """The character that stands for each byte in byte-level BPE, (256,), as GPT-2 chose them: character to byte.

    Source: Radford et al. 2019, bytes_to_unicode of the released encoder: printable Latin-1 stands for itself, the
    other bytes, in order, for the characters from U+0100.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update((chr(0x100 + n), byte) for n, byte in enumerate(sorted(set(range(256)) - printable)))
    return alphabet


# --- the tokenizers library ------------------------------------------------------------------------------------------


class PieceDecoder(NamedTuple):
    """What the serialised decoder of a tokenizer does to one piece."""

    to_bytes: Callable[[str], bytes]
    drops_leading_space: bool  # the first space of a whole text is removed: the dummy prefix
    is_own: bool  # the tokenizer has this decoder itself; else it is implied by its pre-tokenizer
    spells_space_as: str  # "" where a space stands for itself


def read_fast(backend: Any, tokenizer: Any) -> Vocabulary:
    """The tokens of a `tokenizers.Tokenizer`; `tokenizer` is that of transformers around it, or itself."""
    state = _state_without_merges(backend.to_str())
    decoder = read_decoder(state)
    pieces = _model_pieces(state["model"])
    _require_one_alphabet(pieces.values(), decoder)
    added = {token["id"]: token for token in state["added_tokens"]}
    special_ids = {token_id for token_id, token in added.items() if token["special"]}
    special_ids |= _unknown_ids(state["model"]) | _declared_special_ids(tokenizer)
    vocabulary = Vocabulary({token_id: decoder.to_bytes(piece) for token_id, piece in pieces.items()}, pieces, set())
    for token_id in special_ids & pieces.keys():
        vocabulary.byte_strings[token_id] = pieces[token_id].encode()
    _prove_pieces(backend, decoder, vocabulary, special_ids)
    for token_id, token in added.items():
        content = token["content"]
        byte_string = content.encode()
        if token_id not in special_ids and decoder.to_bytes(content) != byte_string:
            in_model = pieces.get(token_id) == content
            byte_string = _bytes_of_added(backend, token_id, content, decoder, in_model)
        if token_id not in special_ids and token["normalized"]:
            byte_string = _with_space_in_front(backend, content, byte_string, decoder)
        vocabulary.byte_strings[token_id], vocabulary.pieces[token_id] = byte_string, content
    vocabulary.special_ids.update(special_ids & pieces.keys())
    # A SentencePiece model that has no piece for a single space spells it in bytes of the mark itself; a model of whole
    # words need not spell single characters.
    has_space = not decoder.spells_space_as or decoder.spells_space_as in pieces.values()
    if has_space and state["model"]["type"] in ("BPE", "Unigram"):
        _prove_text(_fast_encoder(backend, decoder), vocabulary)
    return vocabulary


def _state_without_merges(serialised: str) -> dict[str, Any]:
    """The serialised tokenizer, without the merges: they say nothing about bytes, and are most of what is to parse.

    In a large program the 150,000 small lists of merges cost half a second of garbage collection.
    """
    # inside a JSON string the quotes would be escaped, so this can only be the key; it is cut where it is the last one
    start = serialised.find(',"merges":[')
    if start >= 0 and serialised[serialised.rfind("]") :] == "]}}":
        serialised = serialised[:start] + "}}"
    state: dict[str, Any] = json.loads(serialised)
    return state


def read_decoder(state: Mapping[str, Any]) -> PieceDecoder:
    """The decoder of a serialised tokenizer as a function of one piece.

    Raises:
        VocabularyError: A piece alone does not determine its bytes, or a step is unknown.
    """
    model = state["model"]
    for affix in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(affix):
            raise VocabularyError(
                f"its {model['type']} model marks words with {affix} {model[affix]!r}: spaces are lost"
            )
    steps = list(_leaves(state["decoder"], "decoders"))
    is_own = bool(steps)
    if not is_own:
        before_model = _leaves(state["pre_tokenizer"], "pretokenizers")
        steps = [step for step in before_model if step["type"] in ("ByteLevel", "Metaspace")]
    if not steps:
        raise VocabularyError(f"its {model['type']} model has no decoder that tells where spaces are")
    functions: list[Callable[[str | bytes], str | bytes]] = []
    is_fused, drops_leading_space, space = False, False, ""
    for step in steps:
        kind = step["type"]
        if kind == "ByteLevel":
            functions.append(_from_byte_level)
        elif kind == "ByteFallback":
            functions.append(_from_byte_fallback)
        elif kind == "Fuse":
            is_fused = True
        elif kind == "Metaspace":
            functions.append(_replacing(step["replacement"], " "))
            drops_leading_space, space = True, step["replacement"]
        elif kind == "Replace" and _is_context_free(step, is_fused):
            functions.append(_replacing(step["pattern"]["String"], step["content"]))
            space = step["pattern"]["String"] if step["content"] == " " else space
        elif kind == "Strip" and is_fused:
            drops_leading_space = True
        else:
            raise VocabularyError(f"its decoder has the step {json.dumps(step, ensure_ascii=False)}, which loses bytes")
    return PieceDecoder(_composed(functions), drops_leading_space, is_own, space)


def _leaves(node: Mapping[str, Any] | None, children: str) -> Iterator[Mapping[str, Any]]:
    if node is None:
        return
    if node["type"] != "Sequence":
        yield node
        return
    for child in node[children]:
        yield from _leaves(child, children)


def _is_context_free(step: Mapping[str, Any], is_fused: bool) -> bool:
    # a longer pattern could match across the border of two pieces once they are fused
    pattern = step["pattern"].get("String")
    return bool(pattern) and (len(pattern) == 1 or not is_fused)


def _composed(functions: Sequence[Callable[[str | bytes], str | bytes]]) -> Callable[[str], bytes]:
    if functions == [_from_byte_level]:
        return _from_byte_level

    def to_bytes(piece: str) -> bytes:
        value: str | bytes = piece
        for function in functions:
            value = function(value)
        return value if isinstance(value, bytes) else value.encode()

    return to_bytes


def _replacing(pattern: str, content: str) -> Callable[[str | bytes], str | bytes]:
    def replace(value: str | bytes) -> str | bytes:
        return value if isinstance(value, bytes) else value.replace(pattern, content)

    return replace


_BYTE_OF_CHARACTER = byte_level_alphabet()
_BYTE_LEVEL_SPACE = "Ġ"


def _from_byte_level(value: str | bytes) -> bytes:
    # a piece with a character outside the alphabet is text as a whole: so does the ByteLevel decoder
    if isinstance(value, bytes):
        return value
    try:
        return bytes(map(_BYTE_OF_CHARACTER.__getitem__, value))
    except KeyError:
        return value.encode()


_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _from_byte_fallback(value: str | bytes) -> str | bytes:
    if isinstance(value, bytes):
        return value
    found = _BYTE_PIECE.fullmatch(value)
    return bytes.fromhex(found[1]) if found else value


def _model_pieces(model: Mapping[str, Any]) -> dict[int, str]:
    vocabulary = model["vocab"]
    if model["type"] == "Unigram":
        return {token_id: piece for token_id, (piece, _) in enumerate(vocabulary)}
    pieces = {token_id: piece for piece, token_id in vocabulary.items()}
    if len(pieces) < len(vocabulary):
        raise VocabularyError(f"{len(vocabulary) - len(pieces)} of its pieces share an id with another piece")
    return pieces


def _unknown_ids(model: Mapping[str, Any]) -> set[int]:
    if model["type"] == "Unigram":
        return set() if model["unk_id"] is None else {model["unk_id"]}
    unknown = model["vocab"].get(model.get("unk_token"))
    return set() if unknown is None else {unknown}


def _declared_special_ids(tokenizer: Any) -> set[int]:
    return set(getattr(tokenizer, "all_special_ids", None) or ())


def _require_one_alphabet(pieces: Iterable[str], decoder: PieceDecoder) -> None:
    """Refuses a decoder for `▁` over pieces that spell a space as `Ġ`: a byte-level model loaded by the wrong class."""
    space = decoder.spells_space_as
    if not space:
        return
    n_space = n_byte_level = 0
    for piece in pieces:
        n_space += piece.startswith(space)
        n_byte_level += piece.startswith(_BYTE_LEVEL_SPACE)
    if n_byte_level > n_space:
        raise VocabularyError(
            f"its decoder reads {space!r} as a space, but {n_byte_level} of its pieces begin with {_BYTE_LEVEL_SPACE!r}"
            f" and {n_space} with {space!r}: a byte-level vocabulary under a class for another kind; "
            "load it with transformers.PreTrainedTokenizerFast"
        )


def _bytes_of_added(backend: Any, token_id: int, content: str, decoder: PieceDecoder, in_model: bool) -> bytes:
    """The bytes of an added token whose name its decoder would rewrite: those of the text that encodes to it.

    An added token is found in the text by its name, so `▁▁` that was only added is these two characters; one that is
    also a piece of the model stands for the two spaces that the model spells so.
    """
    decoded = decoder.to_bytes(content)
    try:
        text = decoded.decode()
    except UnicodeDecodeError:
        return decoded if in_model else content.encode()
    is_reached = token_id in backend.encode(text, add_special_tokens=False).ids
    return decoded if is_reached else content.encode()


def _with_space_in_front(backend: Any, content: str, byte_string: bytes, decoder: PieceDecoder) -> bytes:
    """The bytes of an added token whose name is normalised as text is: `Prepend` puts a space before it, too.

    It is then found only behind a space, which it takes along.
    """
    found = _normalised(backend, content, decoder).encode()
    return found if found == b" " + byte_string else byte_string


def _normalised(backend: Any, text: str, decoder: PieceDecoder) -> str:
    """A text as the tokenizer looks for tokens in it, with plain spaces."""
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    return text.replace(decoder.spells_space_as, " ") if decoder.spells_space_as else text


def _prove_pieces(backend: Any, decoder: PieceDecoder, vocabulary: Vocabulary, special_ids: set[int]) -> None:
    """Every piece, decoded by the tokenizer alone, reads as its bytes do.

    A piece that ends or begins inside a character would read as U+FFFD whatever its bytes are, so it is decoded
    between single bytes that complete the character.
    """
    if not decoder.is_own:
        return
    decode = backend.decoder.decode
    piece_of_byte = {
        byte_string[0]: vocabulary.pieces[token_id]
        for token_id, byte_string in vocabulary.byte_strings.items()
        if len(byte_string) == 1
    }
    for token_id, byte_string in vocabulary.byte_strings.items():
        if token_id in special_ids:
            continue
        piece = vocabulary.pieces[token_id]
        pieces = [piece]
        try:
            text = byte_string.decode()
        except UnicodeDecodeError:
            before, after = _completion(byte_string)
            if piece_of_byte.keys() >= set(before + after):
                pieces = [*map(piece_of_byte.__getitem__, before), piece, *map(piece_of_byte.__getitem__, after)]
                byte_string = before + byte_string + after
            text = byte_string.decode(errors="replace")
        decoded = decode(pieces)
        if decoded != text and not (decoder.drops_leading_space and decoded == text.removeprefix(" ")):
            raise VocabularyError(f"token {token_id}, {piece!r}, reads as {text!r} but is decoded to {decoded!r}")


# the ways in which UTF-8 can begin a character that then needs one, two or three bytes, and can end one
_BEGINNINGS = (b"", b"\xc3", b"\xe1", b"\xe1\x80", b"\xf1", b"\xf1\x80", b"\xf1\x80\x80")
_ENDINGS = (b"", b"\x80", b"\x90", b"\xa0", b"\x80\x80", b"\x90\x80", b"\xa0\x80", b"\x80\x80\x80", b"\x90\x80\x80")


def _completion(byte_string: bytes) -> tuple[bytes, bytes]:
    """Bytes to put before and after so that all of it is UTF-8; empty where nothing can make it so."""
    for before in _BEGINNINGS:
        for after in _ENDINGS:
            try:
                (before + byte_string + after).decode()
            except UnicodeDecodeError:
                continue
            return before, after
    return b"", b""


def _fast_encoder(backend: Any, decoder: PieceDecoder) -> Callable[[str], tuple[list[int], str]]:
    def encode(text: str) -> tuple[list[int], str]:
        if backend.truncation is not None:  # left on by a call that asked for it; a cut text would prove nothing
            return [], ""
        encoding = backend.encode(text, add_special_tokens=False)
        token_ids = [i for i, is_token in zip(encoding.ids, encoding.attention_mask, strict=True) if is_token]
        return token_ids, _normalised(backend, text, decoder)

    return encode


# --- tokenizers that hold their bytes --------------------------------------------------------------------------------


def read_sentencepiece(processor: Any, tokenizer: Any) -> Vocabulary:
    """The tokens of a `sentencepiece.SentencePieceProcessor`, under the ids of the tokenizer around it."""
    vocabulary = Vocabulary({}, {}, set())
    for token_id in range(processor.get_piece_size()):
        piece = processor.id_to_piece(token_id)
        if processor.piece_to_id(piece) != token_id:
            raise VocabularyError(f"token {token_id}, {piece!r}, is found as token {processor.piece_to_id(piece)}")
        vocabulary.pieces[token_id] = piece
        if processor.is_control(token_id) or processor.is_unknown(token_id):
            vocabulary.byte_strings[token_id] = piece.encode()
            vocabulary.special_ids.add(token_id)
        elif processor.is_byte(token_id):
            vocabulary.byte_strings[token_id] = bytes.fromhex(piece[3:5])
        else:
            vocabulary.byte_strings[token_id] = piece.replace(_SPACE, " ").encode()
    decoded = processor.decode([[token_id] for token_id in vocabulary.pieces])
    for (token_id, byte_string), text in zip(vocabulary.byte_strings.items(), decoded, strict=True):
        expected = byte_string.decode(errors="replace")
        if token_id not in vocabulary.special_ids and text not in (expected, expected.removeprefix(" ")):
            piece = vocabulary.pieces[token_id]
            raise VocabularyError(f"token {token_id}, {piece!r}, reads as {expected!r} but is decoded to {text!r}")
    _prove_text(lambda text: (processor.encode(text), processor.normalize(text).replace(_SPACE, " ")), vocabulary)
    return _under_ids_of(tokenizer, vocabulary)


def read_tekken(tekkenizer: Any, tokenizer: Any) -> Vocabulary:
    """The tokens of a `mistral_common` Tekkenizer: the special ones come first, then those of tiktoken."""
    n_special = tekkenizer.num_special_tokens
    pieces = {token_id: tekkenizer.id_to_piece(token_id) for token_id in range(n_special)}
    byte_strings = {token_id: piece.encode() for token_id, piece in pieces.items()}
    for token_id in range(n_special, tekkenizer.n_words):
        byte_strings[token_id] = tekkenizer.id_to_byte_piece(token_id)
        pieces[token_id] = _byte_level_piece(byte_strings[token_id])
    vocabulary = Vocabulary(byte_strings, pieces, set(range(n_special)))
    _prove_text(lambda text: (tekkenizer.encode(text, bos=False, eos=False), text), vocabulary)
    return vocabulary


def read_tiktoken(encoding: Any, tokenizer: Any) -> Vocabulary:
    """The tokens of a `tiktoken.Encoding`, and those that the tokenizer around it added."""
    special_ids = {encoding.encode_single_token(name) for name in encoding.special_tokens_set}
    vocabulary = Vocabulary({}, {}, special_ids)
    for token_id in range(encoding.n_vocab):
        try:
            byte_string = encoding.decode_single_token_bytes(token_id)
        except KeyError:  # a hole
            continue
        if encoding.encode_single_token(byte_string) != token_id:
            raise VocabularyError(f"token {token_id}, {byte_string!r}, is found as another token")
        vocabulary.byte_strings[token_id] = byte_string
        is_special = token_id in special_ids
        vocabulary.pieces[token_id] = byte_string.decode() if is_special else _byte_level_piece(byte_string)
    _prove_text(lambda text: (encoding.encode_ordinary(text), text), vocabulary)
    _add_outer_tokens(tokenizer, vocabulary)
    return vocabulary


def read_byte_decoder(tokenizer: Any, outer: Any) -> Vocabulary:
    """The tokens of a tokenizer that spells bytes as characters and says how: `byte_decoder`, character to byte."""
    vocabulary = Vocabulary({}, {}, set())
    _add_outer_tokens(tokenizer, vocabulary)
    special_ids = _declared_special_ids(tokenizer)
    for piece, token_id in tokenizer.get_vocab().items():
        if token_id in vocabulary.pieces:
            continue
        vocabulary.pieces[token_id] = piece
        if token_id in special_ids:
            vocabulary.byte_strings[token_id] = piece.encode()
            vocabulary.special_ids.add(token_id)
            continue
        try:
            vocabulary.byte_strings[token_id] = bytes([tokenizer.byte_decoder[character] for character in piece])
        except (KeyError, ValueError) as cause:
            raise VocabularyError(f"token {token_id}, {piece!r}, is not spelled in its byte alphabet") from cause
    _prove_text(lambda text: (tokenizer.encode(text, add_special_tokens=False), text), vocabulary)
    return vocabulary


_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece spells a space
_CHARACTER_OF_BYTE = {byte: character for character, byte in _BYTE_OF_CHARACTER.items()}


def _byte_level_piece(byte_string: bytes) -> str:
    return "".join([_CHARACTER_OF_BYTE[byte] for byte in byte_string])


def _add_outer_tokens(tokenizer: Any, vocabulary: Vocabulary) -> None:
    """Adds the tokens that a slow transformers tokenizer keeps beside its model; they are found by their names."""
    special_ids = _declared_special_ids(tokenizer)
    added = getattr(tokenizer, "added_tokens_decoder", None)
    for token_id, token in added.items() if isinstance(added, Mapping) else ():
        vocabulary.byte_strings[token_id] = token.content.encode()
        vocabulary.pieces[token_id] = token.content
        if token.special or token_id in special_ids:
            vocabulary.special_ids.add(token_id)


def _under_ids_of(tokenizer: Any, inner: Vocabulary) -> Vocabulary:
    """`inner`, each token under the id that the tokenizer around it gives its piece, and what that one added."""
    get_vocab = getattr(tokenizer, "get_vocab", None)
    if get_vocab is None:
        return inner
    inner_ids = {piece: token_id for token_id, piece in inner.pieces.items()}
    outer = Vocabulary({}, {}, set())
    _add_outer_tokens(tokenizer, outer)
    for piece, token_id in get_vocab().items():
        if token_id in outer.pieces:
            continue
        if piece not in inner_ids:
            raise VocabularyError(f"token {token_id}, {piece!r}, is neither a piece of its model nor an added token")
        outer.byte_strings[token_id] = inner.byte_strings[inner_ids[piece]]
        outer.pieces[token_id] = piece
        if inner_ids[piece] in inner.special_ids:
            outer.special_ids.add(token_id)
    for token_id in _declared_special_ids(tokenizer) & outer.pieces.keys():
        outer.byte_strings[token_id] = outer.pieces[token_id].encode()
        outer.special_ids.add(token_id)
    return outer


# --- families --------------------------------------------------------------------------------------------------------


def _offers(*names: str) -> Callable[[Any], bool]:
    return lambda candidate: all(getattr(candidate, name, None) is not None for name in names)


_FAMILIES: tuple[tuple[Callable[[Any], bool], Callable[[Any, Any], Vocabulary]], ...] = (
    (_offers("to_str", "get_added_tokens_decoder", "encode_batch"), read_fast),
    (_offers("id_to_byte_piece", "num_special_tokens", "n_words"), read_tekken),
    (_offers("id_to_piece", "is_byte", "get_piece_size"), read_sentencepiece),
    (_offers("decode_single_token_bytes", "encode_ordinary", "n_vocab"), read_tiktoken),
    (_offers("byte_decoder", "get_vocab"), read_byte_decoder),
)

_INNER = ("backend_tokenizer", "sp_model", "tokenizer", "instruct_tokenizer", "encoding", "_model", "_tokenizer")
_MOST_NESTED = 4  # transformers -> mistral-common -> instruct tokenizer -> tokenizer -> model


def _inner_tokenizers(tokenizer: Any) -> list[Any]:
    """The tokenizer and those that it wraps, outermost first."""
    found = [tokenizer]
    layer = [tokenizer]
    for _ in range(_MOST_NESTED):
        layer = [inner for outer in layer for name in _INNER if (inner := getattr(outer, name, None)) is not None]
        found += layer
    return found


# --- proof by text ---------------------------------------------------------------------------------------------------


_PROBE = "".join(
    map(
        chr,
        [
            *range(0x80),
            *range(0x80, 0x800, 7),
            *range(0x800, 0xD800, 331),
            *range(0xE000, 0xFFFE, 331),
            *range(0x10000, 0x110000, 9973),
        ],
    )
).replace(_SPACE, "")


def _prove_text(encode: Callable[[str], tuple[Sequence[int], str]], vocabulary: Vocabulary) -> None:
    """A text whose characters can all be spelled in single bytes comes back from its tokens, up to a leading space.

    It holds every byte that UTF-8 can hold and the vocabulary has, so a wrong byte of a single-byte token shows here.

    Args:
        encode: Gives the token ids of a text without special tokens, and the text as the tokenizer normalises it.
        vocabulary: The tokens.

    Raises:
        VocabularyError: The bytes of the text's tokens are not those of the text.
    """
    single = {
        byte_string[0]
        for token_id, byte_string in vocabulary.byte_strings.items()
        if len(byte_string) == 1 and token_id not in vocabulary.special_ids
    }
    probe = "".join([character for character in _PROBE if single.issuperset(character.encode())])
    token_ids, text = encode(probe)
    if not vocabulary.special_ids.isdisjoint(token_ids):  # unknown characters, in spite of the bytes
        return
    expected = text.encode().removeprefix(b" ")
    got = b"".join([vocabulary.byte_strings[token_id] for token_id in token_ids]).removeprefix(b" ")
    if got != expected:
        at = next(
            (i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), min(len(got), len(expected))
        )
        raise VocabularyError(
            f"its tokens for a text of every byte join to other bytes: {got[at : at + 8]!r} "
            f"instead of {expected[at : at + 8]!r} after {expected[max(0, at - 8) : at]!r}"
        )
