"""decode_vocab on small made-up tokenizers; each past defect of other decoders has a test."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from genlm_backend.errors import VocabularyError
from genlm_backend.tokenization import Token, decode_vocab, get_byte_vocab
from genlm_backend.tokenization.byte_decoders import byte_level_alphabet

ALPHABET = {byte: character for character, byte in sorted(byte_level_alphabet().items(), key=lambda item: item[1])}


def spelled(byte_string: bytes) -> str:
    return "".join(ALPHABET[byte] for byte in byte_string)


def byte_level(pieces: Iterable[str] = (), vocab: Mapping[str, int] | None = None) -> Tokenizer:
    """A byte-level BPE of the 256 bytes and `pieces`, or of exactly `vocab`."""
    if vocab is None:
        vocab = {piece: token_id for token_id, piece in enumerate([*ALPHABET.values(), *pieces])}
    tokenizer = Tokenizer(models.BPE(vocab=dict(vocab), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_fallback(pieces: Iterable[str]) -> Tokenizer:
    """A SentencePiece BPE as Llama-2 has it: `<unk>`, the 256 bytes, then `pieces`."""
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocab = {name: token_id for token_id, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def unigram(pieces: Iterable[str], **options: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), *((piece, -1.0) for piece in pieces)], unk_id=0, **options))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def bytes_by_piece(tokenizer: Tokenizer) -> dict[str, bytes]:
    byte_vocab = decode_vocab(tokenizer)[0]
    return {piece: byte_vocab[token_id].byte_string for piece, token_id in tokenizer.get_vocab().items()}


# --- the form of the answer ------------------------------------------------------------------------------------------


def test_both_lists_are_indexed_by_token_id() -> None:
    tokenizer = byte_level(["Ġhello", spelled("é".encode())])
    byte_vocab, str_vocab = decode_vocab(tokenizer)
    assert len(byte_vocab) == len(str_vocab) == 258
    assert [token.token_id for token in byte_vocab] == list(range(258))
    assert [token.byte_string for token in byte_vocab] == [*(bytes([b]) for b in range(256)), b" hello", "é".encode()]
    assert all(isinstance(token, Token) for token in byte_vocab)
    assert str_vocab[256:] == [" hello", "é"]
    assert get_byte_vocab(tokenizer) == [token.byte_string for token in byte_vocab]


@pytest.mark.parametrize(
    ("fallback", "text"), [("tokenizer", "ĠÃ"), ("latin1", " Ã"), ("replace", " \N{REPLACEMENT CHARACTER}")]
)
def test_fallbacks_write_what_is_no_utf8(fallback: str, text: str) -> None:
    tokenizer = byte_level(["ĠÃ"])
    byte_vocab, str_vocab = decode_vocab(tokenizer, byte2str_fallback=fallback)
    assert (byte_vocab[256].byte_string, str_vocab[256]) == (b" \xc3", text)


def test_an_unknown_fallback_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="byte2str_fallback"):
        decode_vocab(byte_level(), byte2str_fallback="utf8")


def test_holes_keep_their_places() -> None:
    """Past defect: an id without a token was a TypeError, and ids above the number of tokens were cut off."""
    byte_vocab, str_vocab = decode_vocab(byte_level(vocab={"a": 0, "b": 3, "Ġ": 7}))
    assert [token.byte_string for token in byte_vocab] == [b"a", b"", b"", b"b", b"", b"", b"", b" "]
    assert [token.token_id for token in byte_vocab if token.is_hole] == [1, 2, 4, 5, 6]
    assert "" not in str_vocab


def test_added_tokens_widen_the_vocabulary() -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens(["<tool>"])
    tokenizer.add_special_tokens(["<|end|>"])
    byte_vocab, _ = decode_vocab(tokenizer)
    assert len(byte_vocab) == 258
    assert (byte_vocab[256].byte_string, byte_vocab[256].is_special) == (b"<tool>", False)
    assert (byte_vocab[257].byte_string, byte_vocab[257].is_special) == (b"<|end|>", True)


def test_tokens_that_share_bytes_keep_their_ids() -> None:
    tokenizer = byte_fallback(["▁", "A"])
    byte_vocab, _ = decode_vocab(tokenizer)
    vocab = tokenizer.get_vocab()
    for twin, byte_string in (("A", b"A"), ("<0x41>", b"A"), ("▁", b" "), ("<0x20>", b" ")):
        assert byte_vocab[vocab[twin]].byte_string == byte_string
        assert byte_vocab[vocab[twin]].token_id == vocab[twin]


def test_no_string_is_empty() -> None:
    """A dependant looks at the first character of every string."""
    _, str_vocab = decode_vocab(unigram(["", "▁a"]))
    assert all(str_vocab)
    _, str_vocab = decode_vocab(byte_fallback(["▁"]), byte2str_fallback="replace")
    assert all(str_vocab)


def test_special_tokens_of_the_wrapper_are_flagged() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(["<s>"]), bos_token="<s>", pad_token="<pad>")
    byte_vocab, _ = decode_vocab(tokenizer)
    assert [token.byte_string for token in byte_vocab if token.is_special] == [b"<s>", b"<pad>"]


def test_the_unknown_token_is_special() -> None:
    for tokenizer in (byte_fallback(["▁a"]), unigram(["▁a"])):
        assert [token.byte_string for token in decode_vocab(tokenizer)[0] if token.is_special] == [b"<unk>"]


# --- pieces to bytes -------------------------------------------------------------------------------------------------


def test_a_byte_spelled_inside_a_longer_piece_is_text() -> None:
    """Past defect: `x<0x41>y` became b"xAy"."""
    by_piece = bytes_by_piece(byte_fallback(["x<0x41>y", "<0x41>y", "<0x41><0x42>", "▁<0x41>"]))
    assert by_piece["x<0x41>y"] == b"x<0x41>y"
    assert by_piece["<0x41>y"] == b"<0x41>y"
    assert by_piece["<0x41><0x42>"] == b"<0x41><0x42>"
    assert by_piece["▁<0x41>"] == b" <0x41>"
    assert by_piece["<0x41>"] == b"A"


def test_a_piece_that_only_looks_like_a_byte_is_text() -> None:
    """Past defect: `<0xZZ>` raised a bare ValueError."""
    by_piece = bytes_by_piece(byte_fallback(["<0xZZ>", "<0x1>", "<0x123>", "<0x4 >"]))
    for piece in ("<0xZZ>", "<0x1>", "<0x123>", "<0x4 >"):
        assert by_piece[piece] == piece.encode()


def test_the_mark_of_a_space_stays_in_the_name_of_a_special_token() -> None:
    """Past defect: `▁` became a space inside added tokens too."""
    tokenizer = byte_fallback(["▁", "▁a"])
    tokenizer.add_special_tokens(["<｜end▁of▁text｜>"])
    assert bytes_by_piece(tokenizer)["<｜end▁of▁text｜>"] == "<｜end▁of▁text｜>".encode()


def test_an_added_token_stands_for_the_text_it_is_found_in() -> None:
    tokenizer = unigram(["▁", "a"])
    tokenizer.add_tokens([AddedToken("a▁b", normalized=False)])
    assert bytes_by_piece(tokenizer)["a▁b"] == "a▁b".encode()
    tokenizer = byte_level()
    tokenizer.add_tokens(["éa", "Ġx", "two words"])
    by_piece = bytes_by_piece(tokenizer)
    assert (by_piece["éa"], by_piece["Ġx"], by_piece["two words"]) == ("éa".encode(), "Ġx".encode(), b"two words")


def test_an_added_token_that_is_also_a_byte_is_refused() -> None:
    """The id stands for the byte 0xE9 in one text and for the two bytes of `é` in another."""
    tokenizer = byte_level()
    tokenizer.add_tokens(["é"])
    with pytest.raises(VocabularyError, match="join to other bytes"):
        decode_vocab(tokenizer)


def test_an_added_piece_of_the_model_stands_for_what_the_model_spells() -> None:
    """Gemma declares its runs of `▁` as added tokens; they are runs of spaces."""
    tokenizer = byte_fallback(["▁", "▁▁"])
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.add_tokens([AddedToken("▁▁", normalized=True)])
    assert bytes_by_piece(tokenizer)["▁▁"] == b"  "


def test_an_added_token_takes_along_the_space_that_the_normaliser_puts_before_its_name() -> None:
    """Past defect: "say foo" came back as "sayfoo"."""
    tokenizer = byte_fallback(["▁"])
    tokenizer.add_tokens(["foo", "two words", "▁x", AddedToken("bar", normalized=False)])
    byte_vocab, _ = decode_vocab(tokenizer)
    for text in ("say foo", "foo", "sayfoo", "say  foo", "foo foo", "say two words", "a ▁x", "say bar", "saybar"):
        token_ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert b"".join(byte_vocab[i] for i in token_ids) == f" {text}".replace("▁", " ").encode()
    assert [token.byte_string for token in byte_vocab[-4:]] == [b" foo", b" two words", b"  x", b"bar"]


def test_a_byte_level_piece_outside_the_alphabet_is_text() -> None:
    assert bytes_by_piece(byte_level(["日本"]))["日本"] == "日本".encode()


def test_unigram_pieces_are_text() -> None:
    by_piece = bytes_by_piece(unigram(["▁hello", "wör", "▁", "<0x41>"]))
    assert (by_piece["▁hello"], by_piece["wör"], by_piece["▁"]) == (b" hello", "wör".encode(), b" ")
    assert by_piece["<0x41>"] == b"<0x41>"  # its decoder knows no bytes


def test_unigram_with_byte_fallback() -> None:
    tokenizer = unigram(["▁hello", *(f"<0x{byte:02X}>" for byte in range(256))], byte_fallback=True)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    by_piece = bytes_by_piece(tokenizer)
    assert (by_piece["▁hello"], by_piece["<0xE4>"]) == (b" hello", b"\xe4")


def test_the_pre_tokenizer_tells_where_there_is_no_decoder() -> None:
    tokenizer = byte_level(["Ġhello"])
    tokenizer.decoder = None
    assert bytes_by_piece(tokenizer)["Ġhello"] == b" hello"


def test_truncation_and_padding_left_on_do_not_matter() -> None:
    tokenizer = byte_level(["Ġhello"])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4, pad_id=0, pad_token=ALPHABET[0])
    assert bytes_by_piece(tokenizer)["Ġhello"] == b" hello"
    tokenizer.no_truncation()
    assert bytes_by_piece(tokenizer)["Ġhello"] == b" hello"


def test_merges_are_left_out_of_what_is_parsed() -> None:
    tokenizer = byte_level(vocab={**{c: i for i, c in enumerate(ALPHABET.values())}, "Ġ]": 256, ',"merges":[': 257})
    tokenizer.model = models.BPE(
        vocab={**{c: i for i, c in enumerate(ALPHABET.values())}, "Ġ]": 256, ',"merges":[': 257}, merges=[("Ġ", "]")]
    )
    by_piece = bytes_by_piece(tokenizer)
    assert (by_piece["Ġ]"], by_piece[',"merges":[']) == (b" ]", b',"merges":[')


# --- refusals --------------------------------------------------------------------------------------------------------


def test_word_pieces_are_refused() -> None:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "hello": 1, "##s": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(VocabularyError, match="Could not decode byte representation") as raised:
        decode_vocab(tokenizer)
    assert isinstance(raised.value, ValueError)


def test_a_tokenizer_without_a_rule_for_spaces_is_refused() -> None:
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    with pytest.raises(VocabularyError, match="where spaces are"):
        decode_vocab(tokenizer)


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.BPEDecoder(),
        decoders.CTC(),
        decoders.Replace(Regex("[▁_]"), " "),
        decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")]),
        decoders.Strip(" ", 1, 0),
    ],
)
def test_steps_that_lose_bytes_are_refused(decoder: Any) -> None:
    tokenizer = byte_level()
    tokenizer.decoder = decoder
    with pytest.raises(VocabularyError, match="step"):
        decode_vocab(tokenizer)


def test_a_byte_level_vocabulary_under_the_wrong_decoder_is_refused() -> None:
    """transformers 5 loads DeepSeek's files as a SentencePiece tokenizer when they name the Llama class."""
    tokenizer = byte_level(["Ġhello", "Ġworld", "<｜end▁of▁text｜>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    with pytest.raises(VocabularyError, match="begin with 'Ġ'"):
        decode_vocab(tokenizer)


def test_text_that_comes_back_as_other_bytes_is_refused() -> None:
    """The pre-tokenizer drops a character, which no single piece shows."""
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("x", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    with pytest.raises(VocabularyError, match="join to other bytes"):
        decode_vocab(tokenizer)


def test_a_piece_that_is_decoded_to_other_text_is_refused() -> None:
    tokenizer = byte_fallback(["▁", "ab"])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip("a", 1, 0)]
    )
    with pytest.raises(VocabularyError, match="is decoded to"):
        decode_vocab(tokenizer)


def test_what_is_no_tokenizer_is_refused() -> None:
    with pytest.raises(VocabularyError, match="object"):
        decode_vocab(object())


def test_an_empty_tokenizer_is_refused() -> None:
    with pytest.raises(VocabularyError, match="no tokens"):
        decode_vocab(byte_level(vocab={}))


# --- tokenizers that hold their bytes --------------------------------------------------------------------------------


class SlowByteLevel:
    """The shape of a slow byte-level tokenizer."""

    byte_decoder = byte_level_alphabet()
    all_special_ids = (257,)

    def __init__(self, *pieces: str) -> None:
        self._vocab = {piece: i for i, piece in enumerate([*ALPHABET.values(), *pieces])}

    def get_vocab(self) -> dict[str, int]:
        return self._vocab

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return list(text.encode())


def test_a_slow_tokenizer_with_a_byte_alphabet() -> None:
    byte_vocab, str_vocab = decode_vocab(SlowByteLevel("Ġhello", "<end of text>"))
    assert (byte_vocab[256].byte_string, str_vocab[256]) == (b" hello", " hello")
    assert (byte_vocab[257].byte_string, byte_vocab[257].is_special) == (b"<end of text>", True)
    with pytest.raises(VocabularyError, match="byte alphabet"):
        decode_vocab(SlowByteLevel("two words"))


def test_a_tiktoken_encoding_with_a_hole() -> None:
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {bytes([byte]): byte for byte in range(256)} | {b" \xc3": 256, b"hi": 258}
    encoding = tiktoken.Encoding("test", pat_str=r".|\n", mergeable_ranks=ranks, special_tokens={"<|end|>": 260})
    byte_vocab, str_vocab = decode_vocab(encoding)
    assert (len(byte_vocab), byte_vocab[256].byte_string, byte_vocab[258].byte_string) == (261, b" \xc3", b"hi")
    assert (byte_vocab[260].byte_string, byte_vocab[260].is_special) == (b"<|end|>", True)
    assert [token.token_id for token in byte_vocab if token.is_hole] == [257, 259]
    assert str_vocab[256] == "ĠÃ"


@pytest.fixture(scope="module")
def processor() -> Any:
    """A small SentencePiece Unigram model with byte fallback, a control token and one of the user."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the river is wide where the city is"] * 20),
        model_writer=model,
        vocab_size=290,
        model_type="unigram",
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        control_symbols=["[INST]"],
        user_defined_symbols=["<tool>"],
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def test_a_sentencepiece_model(processor: Any) -> None:
    byte_vocab, str_vocab = decode_vocab(processor)
    assert len(byte_vocab) == processor.get_piece_size()
    assert [token.byte_string for token in byte_vocab if token.is_special] == [b"<unk>", b"<s>", b"</s>", b"[INST]"]
    assert byte_vocab[processor.piece_to_id("<0xE4>")].byte_string == b"\xe4"
    assert byte_vocab[processor.piece_to_id("<tool>")].byte_string == b"<tool>"
    assert not byte_vocab[processor.piece_to_id("<tool>")].is_special
    text = "the river is  wïde\n"
    assert b"".join(byte_vocab[i] for i in processor.encode(text)) == b" " + text.encode()
    assert all(str_vocab)


class Wrapped:
    """The shape of a slow transformers tokenizer that shifts the ids of its SentencePiece model and adds a token."""

    def __init__(self, processor: Any, extra: str = "") -> None:
        self.sp_model = processor
        size = processor.get_piece_size()
        self._vocab = {processor.id_to_piece(i): i + 1 for i in range(size)} | {"<pad>": 0, "<mask▁>": size + 1}
        if extra:
            self._vocab[extra] = size + 2
        self.all_special_ids = [0, size + 1]
        self.added_tokens_decoder = {0: AddedToken("<pad>"), size + 1: AddedToken("<mask▁>", special=True)}

    def get_vocab(self) -> dict[str, int]:
        return self._vocab


def test_a_wrapper_that_shifts_the_ids_of_its_model(processor: Any) -> None:
    inner, _ = decode_vocab(processor)
    outer, _ = decode_vocab(Wrapped(processor))
    assert [token.byte_string for token in outer[1:-1]] == [token.byte_string for token in inner]
    assert (outer[0].byte_string, outer[0].is_special) == (b"<pad>", True)
    assert (outer[-1].byte_string, outer[-1].is_special) == ("<mask▁>".encode(), True)
    with pytest.raises(VocabularyError, match="neither a piece"):
        decode_vocab(Wrapped(processor, extra="unheard"))
