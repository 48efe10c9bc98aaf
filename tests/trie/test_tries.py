"""TokenCharacterTrie and its parallel form: structure, masses, what goes in and what comes out."""

from __future__ import annotations

import copy
import math
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genlm_backend.errors import DuplicateWord, InvalidDevice, NoSuchNode, WeightsMismatch
from genlm_backend.tokenization import Token
from genlm_backend.trie import ParallelTokenCharacterTrie, TokenCharacterTrie
from genlm_backend.trie.sums import DeviceSums
from tests.trie.oracle import FOUR_WORDS, log_weights, node_weights, vocabularies

REDUCTIONS = ("sum", "max", "logsumexp")


def on_tensors(decode: Any) -> TokenCharacterTrie:
    """A trie that computes as on a GPU, on CPU tensors."""
    trie = ParallelTokenCharacterTrie(decode, device="cpu")
    trie._sums = DeviceSums(trie.layout, torch.device("cpu"))
    return trie


KINDS: dict[str, Callable[[Any], TokenCharacterTrie]] = {
    "sequential": TokenCharacterTrie,
    "parallel": ParallelTokenCharacterTrie,
    "tensors": on_tensors,
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Callable[[Any], TokenCharacterTrie]:
    """Each implementation."""
    return KINDS[request.param]


class End:
    """An end-of-sequence object: iterating it gives itself."""

    def __iter__(self) -> Any:
        return iter([self])


def reduce(trie: TokenCharacterTrie, weights: Any, reduction: str) -> Any:
    return getattr(trie, f"weight_{reduction}")(weights)


def batch_reduce(trie: TokenCharacterTrie, weights: Any, reduction: str) -> Any:
    return getattr(trie, f"batch_weight_{reduction}")(weights)


# ---- structure


def test_the_four_words_have_thirteen_nodes_with_these_masses(kind: Callable[[Any], TokenCharacterTrie]) -> None:
    trie = kind(FOUR_WORDS)
    masses = trie.mass_sum(p_llm=[0.4, 0.1, 0.3, 0.2])
    assert masses.shape == (13,) and len(trie.children) == trie.n_nodes == 13
    by_prefix = {bytes(trie.node2prefix[n]): masses[n] for n in trie.ordering}
    expected = {b"": 1.0, b"cats": 0.1, b"dogs": 0.2}
    expected |= dict.fromkeys((b"c", b"ca", b"cat", b"d", b"do", b"dog"), 0.5)
    assert by_prefix == pytest.approx(expected)
    leaves = {word: masses[leaf] for word, leaf in trie.word2leaf.items()}
    assert leaves == pytest.approx(dict(zip(FOUR_WORDS, [0.4, 0.1, 0.3, 0.2], strict=True)))


def test_attributes_have_the_names_and_meanings_of_genlm_backend() -> None:
    trie = TokenCharacterTrie(FOUR_WORDS)
    assert trie.decode is FOUR_WORDS
    assert trie.root == 12
    assert trie.word2leaf == {b"cat": 0, b"cats": 1, b"dog": 6, b"dogs": 7}
    assert trie.leaf2word == {0: b"cat", 1: b"cats", 6: b"dog", 7: b"dogs"}
    assert trie.idx_to_leaf.tolist() == [[0, 0], [1, 1], [2, 6], [3, 7]] and trie.idx_to_leaf.dtype == np.int32
    assert trie.children[12] == {ord("c"): 5, ord("d"): 11}
    assert list(trie.children[3].items()) == [((None, 0), 0), (ord("s"), 2)]
    assert trie.children[0] == {}
    assert [jump.tolist() for jump in trie.jump[:4]] == [[], [], [1], [0, 2]] and trie.jump[3].dtype == np.int32
    assert trie.ordering.tolist() == [2, 3, 4, 5, 8, 9, 10, 11, 12]
    assert trie.node2prefix[3] == trie.node2prefix[0] == list(b"cat")
    assert dict(trie.node2prefix)[12] == [] and len(trie.node2prefix) == 13
    with pytest.raises(KeyError):
        trie.node2prefix[13]


def test_children_stand_in_the_order_of_the_vocabulary() -> None:
    trie = TokenCharacterTrie([b"ba", b"a", b"bb", b"b"])
    assert list(trie.children[trie.root]) == [ord("b"), ord("a")]
    below_b = trie.children[trie.children[trie.root][ord("b")]]
    assert list(below_b) == [ord("a"), ord("b"), (None, 3)]


def test_tokens_are_keyed_by_bytes_and_id_and_everything_else_by_itself() -> None:
    end = End()
    trie = TokenCharacterTrie([Token(7, b"ab"), b"ab", end, "ab", (1, "x")])
    assert set(trie.word2leaf) == {(b"ab", 7), b"ab", end, "ab", (1, "x")}
    assert trie.children[trie.root][end] == trie.word2leaf[end] + 1
    assert trie.find([end]) == trie.word2leaf[end] + 1
    assert trie.find("ab") != trie.find(b"ab") is not None
    assert trie.weight_sum([1, 2, 4, 8, 16])[[trie.root, trie.find(b"ab"), trie.find([1, "x"])]].tolist() == [31, 3, 16]


def test_tokens_with_equal_bytes_keep_separate_leaves(kind: Callable[[Any], TokenCharacterTrie]) -> None:
    trie = kind([Token(3, b"a"), Token(5, b"a"), Token(9, b""), Token(11, b"")])
    sums = trie.weight_sum([1.0, 2.0, 4.0, 8.0])
    assert [sums[trie.word2leaf[key]] for key in ((b"a", 3), (b"a", 5), (b"", 9), (b"", 11))] == [1, 2, 4, 8]
    assert sums[trie.find(b"a")] == 3 and sums[trie.root] == 15


@pytest.mark.parametrize(
    "decode",
    [
        [Token(1, b"a"), Token(1, b"a")],
        [b"a", b"b", b"a"],
        ["x", Token(1, b"x"), "x"],
        [Token(1, b"a"), Token(1, b"a"), b"c"],
    ],
)
def test_the_same_word_twice_is_refused(decode: list[Any]) -> None:
    with pytest.raises(DuplicateWord, match="Duplicate word in vocabulary") as caught:
        TokenCharacterTrie(decode)
    assert isinstance(caught.value, ValueError)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_one_id_with_two_byte_strings_is_two_words() -> None:
    assert set(TokenCharacterTrie([Token(1, b"a"), Token(1, b"b")]).word2leaf) == {(b"a", 1), (b"b", 1)}


def test_plain_bytes_bring_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    TokenCharacterTrie(FOUR_WORDS)
    assert not recwarn.list


def test_tokens_of_ten_thousand_bytes(kind: Callable[[Any], TokenCharacterTrie]) -> None:
    trie = kind([b"a" * 10_000, b"a" * 9_999, b"b" * 10_000])
    sums = trie.weight_sum([1.0, 2.0, 4.0])
    assert trie.n_nodes == 20_004
    assert sums[trie.find(b"a" * 9_999)] == 3 and sums[trie.find(b"a" * 10_000)] == 1 and sums[trie.root] == 7
    assert trie.node2prefix[trie.word2leaf[b"b" * 10_000]] == list(b"b" * 10_000)


def test_a_comb_of_tokens_each_one_byte_longer(kind: Callable[[Any], TokenCharacterTrie]) -> None:
    trie = kind([b"a" * n for n in range(1, 400)])
    sums = trie.weight_sum(np.ones(399))
    assert [sums[trie.find(b"a" * n)] for n in (0, 1, 200, 399)] == [399, 399, 200, 1]


def test_many_different_letters_below_one_node() -> None:
    words = [(n,) for n in range(20_000)]
    trie = TokenCharacterTrie(words)
    assert trie.weight_max(np.arange(20_000))[trie.root] == 19_999
    assert trie.find((777,)) == trie.word2leaf[(777,)] + 1


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_an_empty_vocabulary_has_a_root_only(kind: Callable[[Any], TokenCharacterTrie], reduction: str) -> None:
    trie = kind([])
    expected = 0.0 if reduction == "sum" else -math.inf
    assert reduce(trie, [], reduction).tolist() == [expected]
    assert batch_reduce(trie, np.empty((2, 0)), reduction).tolist() == [[expected]] * 2
    assert trie.children == [{}] and trie.word2leaf == {} and trie.find(b"") == 0


def test_a_trie_is_copied_and_pickled(kind: Callable[[Any], TokenCharacterTrie]) -> None:
    trie = kind([Token(0, b"a"), Token(1, b"ab")])
    for other in (pickle.loads(pickle.dumps(trie)), copy.deepcopy(trie)):
        assert other.weight_sum([1, 2]).tolist() == trie.weight_sum([1, 2]).tolist()
        assert other.word2leaf == trie.word2leaf


# ---- values


@settings(deadline=None, max_examples=30)
@given(vocabularies, st.data())
def test_every_node_has_the_weight_of_the_tokens_below_it(vocabulary: list[Token], data: st.DataObject) -> None:
    rows = data.draw(
        st.lists(st.lists(log_weights, min_size=len(vocabulary), max_size=len(vocabulary)), min_size=1, max_size=6)
    )
    weights = np.array(rows, np.float64).reshape(len(rows), len(vocabulary))
    for make in KINDS.values():
        trie = make(vocabulary)
        for reduction in REDUCTIONS:
            expected = np.array([node_weights(trie, row, reduction) for row in weights])
            scale = np.array([node_weights(trie, np.abs(row), "sum") for row in weights])  # of a sum that cancels
            np.testing.assert_allclose(
                batch_reduce(trie, weights, reduction), expected, rtol=1e-12, atol=1e-12 * _finite(scale)
            )
            np.testing.assert_array_equal(
                np.stack([reduce(trie, row, reduction) for row in weights]), batch_reduce(trie, weights, reduction)
            )


def _finite(scale: Any) -> float:
    return float(np.max(scale[np.isfinite(scale)], initial=0.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_all_types_give_what_float64_gives(
    kind: Callable[[Any], TokenCharacterTrie], dtype: torch.dtype, reduction: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    vocabulary = [
        Token(i, bytes(word)) for i, word in enumerate(torch.randint(97, 100, (300, 4), generator=generator).tolist())
    ]
    rows = (torch.randn(5, 300, generator=generator) * 9).to(dtype)
    trie = kind(vocabulary)
    expected = TokenCharacterTrie(vocabulary)
    for row in rows:
        exact = reduce(expected, row.double().numpy(), reduction)
        scale = reduce(expected, row.double().abs().numpy(), reduction)
        assert np.all(np.abs(reduce(trie, row, reduction) - exact) <= 2e-6 * np.abs(scale) + 1e-12)
    exact = batch_reduce(expected, rows.double(), reduction)
    np.testing.assert_allclose(batch_reduce(trie, rows, reduction), exact, rtol=1e-4, atol=1e-4)
    if dtype != torch.bfloat16:
        np.testing.assert_array_equal(batch_reduce(trie, rows.numpy(), reduction), batch_reduce(trie, rows, reduction))


def test_lists_arrays_and_tensors_are_the_same(kind: Callable[[Any], TokenCharacterTrie]) -> None:
    trie = kind(FOUR_WORDS)
    nested = [[0.5, 0.25, 0.125, 0.125], [0.0, 1.0, 0.0, 0.0], [1.0, -2.0, 3.0, -4.0]]
    expected = trie.batch_mass_sum(nested)
    array = np.array(nested)
    forms = {
        "array": array,
        "tensor": torch.tensor(nested),
        "list of arrays": list(array),
        "list of tensors": [torch.tensor(row) for row in nested],
        "mixed": [torch.tensor(nested[0]), array[1], nested[2]],
        "tuple": tuple(map(tuple, nested)),
        "transposed": np.asfortranarray(array),
        "strided": np.repeat(array, 2, axis=1)[:, ::2],
        "big-endian": array.astype(">f8"),
        "long double": array.astype(np.longdouble),
        "needs a gradient": torch.tensor(nested, requires_grad=True),
        "expanded": torch.tensor(nested)[:, :, None].expand(3, 4, 2)[..., 1],
    }
    backwards = array[::-1, ::-1].copy()[::-1, ::-1]
    packed = np.zeros(array.shape, "u1, f8")
    packed["f1"] = array
    forms |= {"backwards": backwards, "rows backwards": list(backwards), "packed": packed["f1"]}
    forms["mixed, backwards"] = [torch.tensor(nested[0]), backwards[1], nested[2]]
    read_only = array.copy()
    read_only.flags.writeable = False
    for name, form in (forms | {"read-only": read_only}).items():
        np.testing.assert_array_equal(trie.batch_mass_sum(form), expected, name)
    np.testing.assert_array_equal(trie.batch_mass_sum(array[:1][::-1]), expected[:1], "one row, backwards")
    np.testing.assert_array_equal(trie.mass_sum(backwards[0]), expected[0])
    assert trie.batch_mass_sum([]).shape == (0, 13)
    assert trie.batch_weight_max(np.empty((0, 4))).shape == (0, 13)


def test_weights_are_left_as_they_are_and_results_are_new(kind: Callable[[Any], TokenCharacterTrie]) -> None:
    trie, weights = kind(FOUR_WORDS), np.array([1.0, 2.0, 3.0, 4.0])
    first = trie.weight_sum(weights)
    before = first.copy()
    second = trie.weight_sum(weights * 2)
    second[:] = 7
    assert weights.tolist() == [1, 2, 3, 4] and np.array_equal(first, before)


def test_the_memory_of_a_large_result_is_used_again_once_nothing_refers_to_it() -> None:
    trie = TokenCharacterTrie([b"a" * 10_000])
    first = trie.batch_weight_sum(np.ones((64, 1)))
    place = first.ctypes.data
    tensor, last_row = trie.weights_on_device(np.full((64, 1), 2.0)), first[-1]
    del first
    others = [trie.batch_weight_max(np.full((64, 1), 3.0)) for _ in range(3)]
    assert np.all(last_row == 1) and bool((tensor == 2).all()) and all(np.all(other == 3) for other in others)
    del last_row
    again = trie.batch_weight_max(np.full((64, 1), 5.0))
    assert again.ctypes.data == place
    assert np.all(again == 5) and bool((tensor == 2).all()) and all(np.all(other == 3) for other in others)
    smaller = trie.batch_weight_sum(np.ones((60, 1)))
    assert smaller.shape == (60, 10_002) and np.all(smaller == 1) and np.all(again == 5)
    del tensor
    two_thirds = trie.batch_weight_sum(np.ones((54, 1)))
    assert two_thirds.flags.writeable and np.all(two_thirds == 1) and np.all(smaller == 1)


def test_single_rows_do_not_take_the_memory_of_batches_between_them() -> None:
    trie, one, batch = TokenCharacterTrie([b"a" * 600_000]), np.ones(1), np.ones((4, 1))  # results of 4.8 and 19 MB
    place_of_batch = trie.batch_weight_sum(batch).ctypes.data
    place_of_row = trie.weight_sum(one).ctypes.data
    for _ in range(3):
        assert trie.weight_max(one).ctypes.data == place_of_row
        assert trie.batch_weight_max(batch).ctypes.data == place_of_batch


def test_large_results_of_many_threads_share_no_memory() -> None:
    trie = TokenCharacterTrie([b"a" * 10_000])

    def ask(value: int) -> bool:
        rows = [trie.batch_weight_sum(np.full((64, 1), float(value + i))) for i in range(3)]
        return all(np.all(row == value + i) for i, row in enumerate(rows))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(ask, range(0, 80, 10)))


def test_results_are_float64_and_of_the_weights_type_in_the_parallel_trie() -> None:
    single = torch.ones(4)
    assert TokenCharacterTrie(FOUR_WORDS).weight_sum(single).dtype == np.float64
    for trie in (ParallelTokenCharacterTrie(FOUR_WORDS, "cpu"), on_tensors(FOUR_WORDS)):
        assert [trie.weight_sum(w).dtype for w in (single, single.half(), single.double())] == [
            np.float32,
            np.float32,
            np.float64,
        ]


@pytest.mark.parametrize(
    "weights",
    [
        [1.0, 2.0, 3.0],
        [1.0] * 5,
        [[1.0] * 4],
        1.0,
        [],
        torch.ones(1, 4),
        "abcd",
        [1j] * 4,
        [None] * 4,
        [[1.0], [2.0, 3.0]],
    ],
)
def test_weights_of_another_length_or_kind_are_refused(kind: Callable[[Any], TokenCharacterTrie], weights: Any) -> None:
    trie = kind(FOUR_WORDS)
    with pytest.raises(WeightsMismatch) as caught:
        trie.weight_sum(weights)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    "weights",
    [
        [1.0] * 4,
        [[1.0] * 3],
        [[1.0] * 4, [1.0] * 3],
        torch.ones(2, 5),
        [torch.ones(4), torch.ones(3)],
        np.ones((1, 1, 4)),
    ],
)
def test_batches_of_another_shape_are_refused(kind: Callable[[Any], TokenCharacterTrie], weights: Any) -> None:
    with pytest.raises(WeightsMismatch):
        kind(FOUR_WORDS).batch_weight_max(weights)


def test_sparse_and_complex_tensors_are_refused() -> None:
    for weights in (torch.ones(4).to_sparse(), torch.ones(4, dtype=torch.complex64)):
        with pytest.raises(WeightsMismatch):
            TokenCharacterTrie(FOUR_WORDS).weight_sum(weights)


def test_maxima_of_negative_weights_are_negative(kind: Callable[[Any], TokenCharacterTrie]) -> None:
    trie = kind(FOUR_WORDS)
    tops = trie.weight_max([-3.0, -1.0, -math.inf, -math.inf])
    assert tops[trie.root] == -1 and tops[trie.find(b"c")] == -1 and tops[trie.find(b"dog")] == -math.inf
    log_sums = trie.weight_logsumexp([-3.0, -math.inf, -math.inf, -math.inf])
    assert log_sums[trie.root] == -3 and log_sums[trie.find(b"d")] == -math.inf


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nan_and_infinity_reach_their_ancestors_only(kind: Callable[[Any], TokenCharacterTrie], reduction: str) -> None:
    trie = kind(FOUR_WORDS)
    for odd in (math.nan, math.inf):
        for position in range(2):
            weights = [1.0, 1.0, 1.0, 1.0]
            weights[position] = odd
            for found in (reduce(trie, weights, reduction), *batch_reduce(trie, [weights] * 5, reduction)):
                np.testing.assert_equal(found[[trie.root, trie.find(b"cat")]], [odd, odd])
                assert np.isfinite(found[trie.find(b"d")])


def test_log_masses_are_right_where_masses_underflow(kind: Callable[[Any], TokenCharacterTrie]) -> None:
    trie = kind(FOUR_WORDS)
    log_masses = trie.weight_logsumexp([0.0, -1.0, -2000.0, -2001.0])
    expected = -2000 + math.log1p(math.exp(-1))
    assert log_masses[trie.find(b"d")] == pytest.approx(expected, rel=1e-12)
    assert log_masses[trie.root] == pytest.approx(math.log1p(math.exp(-1)))


def random_vocabulary(n: int, seed: int = 0) -> list[Token]:
    rng = np.random.default_rng(seed)
    lengths = rng.geometric(0.25, n)
    letters = (rng.random(lengths.sum()) ** 3 * 60 + 60).astype(np.uint8)
    return [Token(i, word.tobytes()) for i, word in enumerate(np.split(letters, np.cumsum(lengths)[:-1]))]


def test_precision_on_a_peaked_row(kind: Callable[[Any], TokenCharacterTrie]) -> None:
    vocabulary = random_vocabulary(20_000)
    trie, exact = kind(vocabulary), TokenCharacterTrie(vocabulary)
    logits = np.random.default_rng(1).normal(0, 8, (2, 20_000))
    rows = np.exp(logits - logits.max(1, keepdims=True)).astype(np.float32)
    expected = exact.batch_weight_sum(rows.astype(np.float64))
    starts, ends = exact.layout.leaf_range
    tokens = exact.layout.token_of_leaf_position
    for node in np.random.default_rng(2).integers(0, exact.n_nodes, 200).tolist():
        assert expected[0, node] == pytest.approx(
            math.fsum(rows[0, tokens[starts[node] : ends[node]]].tolist()), rel=1e-13
        )
    tolerance = 2e-6 if trie._sums.__class__ is DeviceSums else 3e-7
    np.testing.assert_allclose(trie.batch_weight_sum(rows), expected, rtol=tolerance)
    repeated = trie.batch_weight_sum(rows)
    np.testing.assert_array_equal(repeated, trie.batch_weight_sum(rows))


# ---- devices


def test_the_parallel_trie_is_a_trie_on_a_device() -> None:
    trie = ParallelTokenCharacterTrie(FOUR_WORDS)
    assert isinstance(trie, TokenCharacterTrie)
    assert trie.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert ParallelTokenCharacterTrie(FOUR_WORDS, device=torch.device("cpu")).device == torch.device("cpu")


@pytest.mark.parametrize("device", ["nowhere", "cuda:99", "", 1.5])
def test_a_device_that_is_not_there_is_refused(device: Any) -> None:
    with pytest.raises(InvalidDevice, match="Invalid device"):
        ParallelTokenCharacterTrie(FOUR_WORDS, device=device)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_results_stay_on_the_device_on_request(kind: Callable[[Any], TokenCharacterTrie], reduction: Any) -> None:
    trie = kind(FOUR_WORDS)
    row, rows = torch.rand(4), torch.rand(3, 4)
    assert torch.equal(trie.weights_on_device(row, reduction), torch.from_numpy(reduce(trie, row, reduction)))
    assert torch.equal(trie.weights_on_device(rows, reduction), torch.from_numpy(batch_reduce(trie, rows, reduction)))
    with pytest.raises(ValueError, match="Unknown reduction"):
        trie.weights_on_device(row, "mean")  # type: ignore[arg-type]


# ---- a few nodes


@settings(deadline=None, max_examples=15)
@given(vocabularies, st.data())
def test_a_few_nodes_have_the_weights_that_all_nodes_have(vocabulary: list[Token], data: st.DataObject) -> None:
    weights = np.array(data.draw(st.lists(log_weights, min_size=len(vocabulary), max_size=len(vocabulary))))
    for make in KINDS.values():
        trie = make(vocabulary)
        node = data.draw(st.integers(0, trie.n_nodes - 1))
        prefixes = [*vocabulary, b"", b"a", b"zz\xff"]
        for reduction in REDUCTIONS:
            everywhere = reduce(trie, weights, reduction)
            scale = _finite(np.abs(weights).sum(keepdims=True) if len(weights) else np.zeros(1))
            close = {"rtol": 1e-12, "atol": 1e-12 * max(scale, 1000.0)}
            of_children = trie.children_weights(weights, node, reduction)
            np.testing.assert_allclose(of_children, everywhere[list(trie.children[node].values())], **close)
            nodes = [trie.find(prefix) for prefix in prefixes]
            nothing = 0.0 if reduction == "sum" else -math.inf
            expected = [nothing if n is None else everywhere[n] for n in nodes]
            np.testing.assert_allclose(trie.prefix_weights(weights, prefixes, reduction), expected, **close)
            batch = trie.prefix_weights(np.stack([weights, weights]), prefixes, reduction)
            np.testing.assert_allclose(batch, [expected, expected], **close)


def test_find_gives_the_node_of_a_prefix() -> None:
    trie = TokenCharacterTrie(FOUR_WORDS)
    assert trie.find(b"") == trie.root
    assert trie.node2prefix[trie.find(b"do")] == list(b"do")
    assert trie.find(np.frombuffer(b"do", np.uint8)) == trie.find(b"do")
    assert trie.find(b"cow") is trie.find(b"catsx") is trie.find("do") is trie.find([b"d", 300, -1]) is None


def test_find_follows_every_prefix_to_the_node_of_its_letters() -> None:
    trie = TokenCharacterTrie([*random_vocabulary(2_000), b"", "ab", (1, "x")])
    for node in trie.ordering.tolist():
        prefix = trie.node2prefix[node]
        assert trie.find(prefix) == node
        if all(isinstance(letter, int) for letter in prefix):
            assert trie.find(bytes(prefix)) == node and trie.find(b"\xff" + bytes(prefix)) is None


def test_children_of_a_node_that_is_not_there_are_refused() -> None:
    trie = TokenCharacterTrie(FOUR_WORDS)
    for node in (13, -1):
        with pytest.raises(NoSuchNode):
            trie.children_weights([1, 2, 3, 4], node)
    assert trie.children_weights([1, 2, 3, 4], 0).shape == (0,)


# ---- threads and processes


def test_any_number_of_threads_may_ask_at_once() -> None:
    vocabulary = random_vocabulary(3_000)
    trie = TokenCharacterTrie(vocabulary)
    rows = np.random.default_rng(0).random((16, 5, 3_000))
    expected = [trie.batch_weight_logsumexp(batch) for batch in rows]
    barrier = threading.Barrier(8)

    def ask(batch: Any) -> Any:
        return trie.batch_weight_logsumexp(batch)

    def first(batch: Any) -> Any:
        barrier.wait()
        return ask(batch)

    with ThreadPoolExecutor(8) as threads:
        found = [*threads.map(first, rows[:8]), *threads.map(ask, rows[8:])]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.thorough
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_computes_too() -> None:
    script = """
import asyncio, os, threading, warnings
import numpy as np
from genlm_backend.trie import AsyncTokenCharacterTrie, TokenCharacterTrie
warnings.simplefilter("ignore")
trie = TokenCharacterTrie([b"cat", b"cats", b"dog", b"dogs"])
shared = AsyncTokenCharacterTrie(trie)
async def ask():
    return (await shared.weight_sum([1, 2, 3, 4]))[trie.root]
before = asyncio.run(ask())
thread = threading.Thread(target=lambda: trie.batch_weight_max(np.ones((9, 4))))
thread.start(), thread.join()
pid = os.fork()
if not pid:
    fine = trie.weight_sum([1, 2, 3, 4])[trie.root] == 10 == asyncio.run(ask())
    fine = fine and TokenCharacterTrie([b"a"]).weight_logsumexp([0.0])[0] == 0
    os._exit(0 if fine else 1)
assert before == 10 and os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert asyncio.run(ask()) == 10
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=100)


@pytest.mark.slow
def test_importing_the_package_compiles_nothing() -> None:
    script = "import sys, genlm_backend.trie; assert 'numba' not in sys.modules and 'graphviz' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=100)
