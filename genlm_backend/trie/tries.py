"""TokenCharacterTrie and its parallel and awaited forms: token weights to the weights of every byte prefix."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch

from genlm_backend.batching import Batcher, Job
from genlm_backend.errors import BackendUnavailable, InvalidDevice, NoSuchNode, UnknownTrieBackend, WeightsMismatch
from genlm_backend.trie.layout import Int32s, Layout, word_keys
from genlm_backend.trie.sums import (
    CompiledSums,
    DeviceSums,
    NodeSums,
    Reduction,
    Segments,
    Weights,
    checked_reduction,
    plain_weights,
)

if TYPE_CHECKING:
    from genlm_backend.trie.drawing import TrieGraph

NodeWeights = npt.NDArray[np.floating[Any]]
"""One weight per node: (n_nodes,) or (batch, n_nodes)."""

BATCH_SIZE = 64  # requests of an AsyncTokenCharacterTrie in one batch: 64 x 150,000 nodes in float32 are 38 MB


class TokenCharacterTrie:
    """The trie of a vocabulary's bytes, and the weight of every node from the weights of the tokens below it.

    Node ids index the results. Children come before their parents and the root is last. Every token has a leaf of its
    own below the node of its bytes, so tokens that share their bytes stay apart.

    Weights are one number per entry of `decode`: a list, an array or a tensor of any real type, on any device. They may
    be negative or -inf. Results are new float64 arrays.

    Args:
        decode: The vocabulary: `Token`s, plain bytes, or other iterables of letters, such as an end-of-sequence object.

    Attributes:
        decode: The vocabulary, as given.
        root: The id of the root.
        n_nodes: How many nodes there are.
        device: Where it computes.
        idx_to_leaf: (n_tokens, 2) int32; position in `decode`, and leaf.

    Raises:
        DuplicateWord: The same token twice, or the same plain entry. Tokens with equal bytes but other ids are fine.

    Every method that takes weights raises:
        WeightsMismatch: They are not one real number per token.
    """

    _sums: NodeSums

    def __init__(self, decode: Sequence[Any]) -> None:
        self.decode = decode
        self.layout = Layout(decode)
        self.root = self.layout.root
        self.n_nodes = self.layout.n_nodes
        self.idx_to_leaf: Int32s = np.stack([np.arange(len(decode), dtype=np.int32), self.layout.leaf], axis=1)
        self._sums = CompiledSums(self.layout, np.float64)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._sums.device

    # ---- all nodes

    def weight_sum(self, ws: Weights) -> NodeWeights:
        """The sum of the weights below each node, (n_nodes,); that of a node is the sum of those of its children."""
        return self._one_row(ws, "sum")

    def weight_max(self, ws: Weights) -> NodeWeights:
        """The largest weight below each node, (n_nodes,)."""
        return self._one_row(ws, "max")

    def weight_logsumexp(self, ws: Weights) -> NodeWeights:
        """Log of the sum of exp(weight) below each node, (n_nodes,); from log-probabilities to log-masses.

        Each node is scaled by itself, so that it is as precise where the mass underflows as where it does not.
        """
        return self._one_row(ws, "logsumexp")

    def batch_weight_sum(self, ws: Weights) -> NodeWeights:
        """`weight_sum` of each row: (batch, n_nodes)."""
        return self._all_nodes(ws, 2, "sum")

    def batch_weight_max(self, ws: Weights) -> NodeWeights:
        """`weight_max` of each row: (batch, n_nodes)."""
        return self._all_nodes(ws, 2, "max")

    def batch_weight_logsumexp(self, ws: Weights) -> NodeWeights:
        """`weight_logsumexp` of each row: (batch, n_nodes)."""
        return self._all_nodes(ws, 2, "logsumexp")

    def mass_sum(self, p_llm: Weights) -> NodeWeights:
        """The probability of each prefix, from those of the tokens; another name of `weight_sum`."""
        return self.weight_sum(p_llm)

    def batch_mass_sum(self, p_llms: Weights) -> NodeWeights:
        """`mass_sum` of each row: (batch, n_nodes)."""
        return self.batch_weight_sum(p_llms)

    def weights_on_device(self, ws: Weights, reduction: Reduction = "sum") -> torch.Tensor:
        """The weight of each node as a tensor on the device of the trie: (n_nodes,), or (batch, n_nodes) for rows.

        Args:
            ws: One row of weights, or rows.
            reduction: "sum", "max" or "logsumexp".

        Raises:
            ValueError: No such reduction.
        """
        plain = plain_weights(ws)
        rows = self._sums.rows(plain, plain.ndim)
        reduced = torch.as_tensor(self._sums.reduce(rows, checked_reduction(reduction)))
        return reduced[0] if plain.ndim == 1 else reduced

    # ---- a few nodes

    def find(self, prefix: Iterable[Any]) -> int | None:
        """The node that these letters lead to; None if no token starts with them."""
        node = int(self.layout.find([prefix])[0])
        return None if node < 0 else node

    def children_weights(self, ws: Weights, node: int, reduction: Reduction = "sum") -> NodeWeights:
        """The weights of the children of a node, in the order of `children[node]`; reads only the tokens below it.

        Args:
            ws: One row of weights, or rows.
            node: An inner node or a leaf, which has no children.
            reduction: "sum", "max" or "logsumexp".

        Returns:
            (n_children,), or (batch, n_children) for rows.

        Raises:
            NoSuchNode: No such node.
            ValueError: No such reduction.
        """
        return self._some_nodes(ws, self._segments_of_children(node), reduction)

    def prefix_weights(
        self, ws: Weights, prefixes: Sequence[Iterable[Any]], reduction: Reduction = "sum"
    ) -> NodeWeights:
        """The weights of given prefixes, 0 or -inf for one that no token starts with; reads only the tokens below them.

        Args:
            ws: One row of weights, or rows.
            prefixes: Bytes, or other sequences of letters.
            reduction: "sum", "max" or "logsumexp".

        Returns:
            (n_prefixes,), or (batch, n_prefixes) for rows.

        Raises:
            ValueError: No such reduction.
        """
        return self._some_nodes(ws, self._segments_of_prefixes(prefixes), reduction)

    # ---- what dependants read of the trie; built on first use

    @cached_property
    def word2leaf(self) -> dict[Any, int]:
        """Leaf of each entry; keys are (bytes, token id) for a `Token`, and the entry itself for anything else."""
        return dict(zip(word_keys(self.decode), self.layout.leaf.tolist(), strict=True))

    @cached_property
    def leaf2word(self) -> dict[int, Any]:
        """Key in `word2leaf` of each leaf."""
        return {leaf: word for word, leaf in self.word2leaf.items()}

    @cached_property
    def children(self) -> list[dict[Any, int]]:
        """For each node, letter to child; the key of a leaf is (None, position in `decode`)."""
        layout = self.layout
        position_of_leaf = dict(zip(layout.leaf.tolist(), range(layout.n_tokens), strict=True))
        children: list[dict[Any, int]] = [{} for _ in range(layout.n_nodes)]
        nodes = zip(range(layout.n_nodes - 1), layout.parent.tolist(), layout.code.tolist(), strict=False)
        for node, parent, code in nodes:
            key = code if 0 <= code < 256 else layout.letter(code) if code >= 0 else (None, position_of_leaf[node])
            children[parent][key] = node
        return children

    @cached_property
    def jump(self) -> list[Int32s]:
        """For each node, its children in ascending order."""
        return [self.layout.children_of(node) for node in range(self.n_nodes)]

    @cached_property
    def ordering(self) -> npt.NDArray[np.int64]:
        """The nodes that are no leaves, children before parents."""
        is_inner = np.ones(self.n_nodes, np.bool_)
        is_inner[self.layout.leaf] = False
        return np.flatnonzero(is_inner)

    @cached_property
    def node2prefix(self) -> Mapping[int, list[Any]]:
        """The letters from the root to each node; a leaf has those of its parent. Each is made when it is asked for."""
        return _Prefixes(self.layout)

    def visualize(
        self,
        mass: Weights | None = None,
        *,
        prefix: Iterable[Any] = (),
        depth: int | None = None,
        n_children: int | None = None,
    ) -> TrieGraph:
        """A picture of the trie, a `graphviz.Digraph`: shown in notebooks, `render` writes it, `source` is its text.

        Small tries are drawn whole. Of large ones, the part below `prefix` is drawn to a depth, with the heaviest
        children of each node that have at least a thousandth of its mass; what is left out is counted.

        Args:
            mass: A weight per node, such as from `mass_sum`: written on the nodes and shown as shade.
            prefix: Where to start.
            depth: Letters below the prefix; None is all of a small trie, and 3 of a large one.
            n_children: Most children of a node; None is all of a small trie, and 4 in a large one.

        Raises:
            WeightsMismatch: `mass` is not one number per node.
            NoSuchNode: No token starts with the prefix.
            BackendUnavailable: The package `graphviz` is missing.
        """
        try:
            from genlm_backend.trie.drawing import draw_trie
        except ImportError as error:
            raise BackendUnavailable("the Python package graphviz", "pip install graphviz") from error

        masses = _node_masses(mass, self.n_nodes)
        node = self.find(prefix)
        if node is None:
            raise NoSuchNode(prefix, self.n_nodes)
        return draw_trie(self.layout, masses, node, depth, n_children)

    def _one_row(self, ws: Weights, reduction: Reduction) -> NodeWeights:
        of_row: NodeWeights = self._all_nodes(ws, 1, reduction)[0]
        return of_row

    def _all_nodes(self, ws: Weights, n_dimensions: int, reduction: Reduction) -> NodeWeights:
        return as_array(self._sums.reduce(self._sums.rows(ws, n_dimensions), reduction))

    def _some_nodes(self, ws: Weights, segments: Segments, reduction: Reduction) -> NodeWeights:
        plain = plain_weights(ws)
        rows = self._sums.rows(plain, plain.ndim)
        reduced = as_array(self._sums.reduce_segments(rows, segments, checked_reduction(reduction)))
        return reduced[0] if plain.ndim == 1 else reduced

    def _segments_of_children(self, node: int) -> Segments:
        """The tokens below each child of a node: together one run of the leaves."""
        if not 0 <= node < self.n_nodes:
            raise NoSuchNode(node, self.n_nodes)
        starts, ends = self.layout.leaf_range
        children = self.layout.children_of(node)
        lengths = (ends[children] - starts[children]).astype(np.int64)
        end = ends[node]
        return Segments(self.layout.token_of_leaf_position[end - lengths.sum() : end], lengths)

    def _segments_of_prefixes(self, prefixes: Sequence[Iterable[Any]]) -> Segments:
        """The tokens that start with each prefix."""
        starts, ends = self.layout.leaf_range
        nodes = self.layout.find(prefixes).tolist()
        runs = [(0, 0) if node < 0 else (starts[node], ends[node]) for node in nodes]
        tokens = [self.layout.token_of_leaf_position[start:end] for start, end in runs]
        lengths = np.array([end - start for start, end in runs], np.int64)
        return Segments(np.concatenate([np.empty(0, np.int32), *tokens]), lengths)


class ParallelTokenCharacterTrie(TokenCharacterTrie):
    """A `TokenCharacterTrie` that computes by tensors on a device, whole batches at once.

    Results are float64 for float64 weights (and for lists and integers), and float32 otherwise. On the CPU it computes
    as `TokenCharacterTrie` does, which is faster there than tensors.

    Args:
        decode: As for `TokenCharacterTrie`.
        device: Any device of torch; None is CUDA where there is one, else the CPU.

    Raises:
        DuplicateWord: As for `TokenCharacterTrie`.
        InvalidDevice: torch knows no such device, or it is not there.
    """

    def __init__(self, decode: Sequence[Any], device: torch.device | str | None = None) -> None:
        on = checked_device(device)
        super().__init__(decode)
        self._sums = CompiledSums(self.layout, None) if on.type == "cpu" else DeviceSums(self.layout, on)


class Statistics(NamedTuple):
    """Since the engine thread of an `AsyncTokenCharacterTrie` was started."""

    requests: int
    batches: int


class AsyncTokenCharacterTrie:
    """A trie that any number of coroutines, event loops and threads ask at the same time; its methods are awaited.

    What waits together is computed together, in a thread of its own, so that the event loop goes on. Weights are
    checked and copied when the call is made, also where its coroutine is awaited later: changing them then changes
    nothing, and wrong ones raise where that call is awaited. Cancelling one call, or one that fails, changes no other.
    Every result is an array of its own.

    The thread starts with the first request. `aclose` (or `cleanup`, or `async with`) ends it; asking again starts
    another, also in a forked process.

    Args:
        trie: The trie to ask.

    Attributes:
        trie: The trie that is asked; its own methods remain free to use.
    """

    def __init__(self, trie: TokenCharacterTrie) -> None:
        self.trie = trie
        self._lock = threading.Lock()
        self._batcher: Batcher | None = None
        self._pid = os.getpid()
        self._n_requests = 0

    @classmethod
    def from_vocab(cls, vocab: Sequence[Any], backend: str = "parallel", **options: Any) -> Self:
        """The trie of a vocabulary, ready to be asked.

        Args:
            vocab: As `decode` of `TokenCharacterTrie`.
            backend: "parallel" (`ParallelTokenCharacterTrie`) or "sequential" (`TokenCharacterTrie`).
            options: For the trie, such as `device`.

        Raises:
            UnknownTrieBackend: No such backend.
            DuplicateWord, InvalidDevice: As the tries.
        """
        kinds = {"parallel": ParallelTokenCharacterTrie, "sequential": TokenCharacterTrie}
        if backend not in kinds:
            raise UnknownTrieBackend(backend, sorted(kinds))
        return cls(kinds[backend](vocab, **options))

    def weight_sum(self, ws: Weights) -> Coroutine[Any, Any, NodeWeights]:
        """As `TokenCharacterTrie.weight_sum`."""
        return self._ask_all(ws, 1, "sum")

    def weight_max(self, ws: Weights) -> Coroutine[Any, Any, NodeWeights]:
        """As `TokenCharacterTrie.weight_max`."""
        return self._ask_all(ws, 1, "max")

    def weight_logsumexp(self, ws: Weights) -> Coroutine[Any, Any, NodeWeights]:
        """As `TokenCharacterTrie.weight_logsumexp`."""
        return self._ask_all(ws, 1, "logsumexp")

    def batch_weight_sum(self, ws: Weights) -> Coroutine[Any, Any, NodeWeights]:
        """As `TokenCharacterTrie.batch_weight_sum`."""
        return self._ask_all(ws, 2, "sum")

    def batch_weight_max(self, ws: Weights) -> Coroutine[Any, Any, NodeWeights]:
        """As `TokenCharacterTrie.batch_weight_max`."""
        return self._ask_all(ws, 2, "max")

    def batch_weight_logsumexp(self, ws: Weights) -> Coroutine[Any, Any, NodeWeights]:
        """As `TokenCharacterTrie.batch_weight_logsumexp`."""
        return self._ask_all(ws, 2, "logsumexp")

    def children_weights(
        self, ws: Weights, node: int, reduction: Reduction = "sum"
    ) -> Coroutine[Any, Any, NodeWeights]:
        """As `TokenCharacterTrie.children_weights`."""
        return self._ask_some(ws, lambda: self.trie._segments_of_children(node), reduction)

    def prefix_weights(
        self, ws: Weights, prefixes: Sequence[Iterable[Any]], reduction: Reduction = "sum"
    ) -> Coroutine[Any, Any, NodeWeights]:
        """As `TokenCharacterTrie.prefix_weights`."""
        return self._ask_some(ws, lambda: self.trie._segments_of_prefixes(prefixes), reduction)

    def mass_sum(self, p_llm: Weights) -> Coroutine[Any, Any, NodeWeights]:
        """As `TokenCharacterTrie.mass_sum`."""
        return self.weight_sum(p_llm)

    def batch_mass_sum(self, p_llms: Weights) -> Coroutine[Any, Any, NodeWeights]:
        """As `TokenCharacterTrie.batch_mass_sum`."""
        return self.batch_weight_sum(p_llms)

    def start(self) -> None:
        """Nothing is left to do: the thread starts with the first request."""

    def shutdown(self) -> None:
        """End the thread; what waits gets `ModelClosed`. Blocks while a batch runs. Asking again starts another."""
        with self._lock:
            batcher, self._batcher = self._batcher, None
            is_ours = self._pid == os.getpid()
        if batcher is not None and is_ours:
            batcher.close()

    async def aclose(self) -> None:
        """`shutdown` without blocking the event loop."""
        import asyncio

        await asyncio.to_thread(self.shutdown)

    async def cleanup(self) -> None:
        """Another name of `aclose`."""
        await self.aclose()

    def statistics(self) -> Statistics:
        """Counts since the thread was started."""
        with self._lock:
            return Statistics(self._n_requests, 0 if self._batcher is None else self._batcher.n_batches)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.aclose()

    def _ask_all(self, ws: Weights, n_dimensions: int, reduction: Reduction) -> Coroutine[Any, Any, NodeWeights]:
        try:
            question = _Question(self.trie._sums.rows(ws, n_dimensions, copy=True), reduction, None)
        except Exception as error:
            return _failed(error)
        return self._ask(question, n_dimensions)

    def _ask_some(
        self, ws: Weights, find_segments: Callable[[], Segments], reduction: Reduction
    ) -> Coroutine[Any, Any, NodeWeights]:
        try:
            checked, plain = checked_reduction(reduction), plain_weights(ws)
            rows = self.trie._sums.rows(plain, plain.ndim, copy=True)
            question = _Question(rows, checked, find_segments())
        except Exception as error:
            return _failed(error)
        return self._ask(question, plain.ndim)

    async def _ask(self, question: _Question, n_dimensions: int) -> NodeWeights:
        # A key of its own for each request: equal rows are too rare to look for.
        of_rows: NodeWeights = await self._running_batcher().ask(_Request(), question)
        of_row: NodeWeights = of_rows[0] if n_dimensions == 1 else of_rows
        return of_row

    def _running_batcher(self) -> Batcher:
        with self._lock:
            if self._batcher is None or self._pid != os.getpid():
                self._pid = os.getpid()
                self._n_requests = 0
                self._batcher = Batcher(_Evaluation(self.trie._sums), batch_size=BATCH_SIZE)
            self._n_requests += 1
            return self._batcher


async def _failed(error: Exception) -> NodeWeights:
    """What a call that cannot be served gives: it raises where it is awaited."""
    raise error


class _Request:
    """The key of one request; equal to no other."""


class _Question(NamedTuple):
    """What to reduce, and how; of all nodes if there are no segments."""

    rows: Any
    reduction: Reduction
    segments: Segments | None


class _Evaluation:
    """What the engine thread calls."""

    def __init__(self, sums: NodeSums) -> None:
        self._sums = sums

    def __call__(self, jobs: Sequence[Job]) -> list[list[NodeWeights]]:
        answers: list[list[NodeWeights]] = [[] for _ in jobs]
        alike: dict[tuple[Reduction, bool], list[int]] = {}
        questions: list[_Question] = [job.questions[0] for job in jobs]
        for i, question in enumerate(questions):
            alike.setdefault((question.reduction, question.segments is None), []).append(i)
        for (reduction, _), chosen in alike.items():
            for i, reduced in zip(chosen, self._reduce([questions[i] for i in chosen], reduction), strict=True):
                answers[i] = [as_array(reduced)]
        return answers

    def _reduce(self, questions: Sequence[_Question], reduction: Reduction) -> list[Any]:
        blocks = [question.rows for question in questions]
        segments = [question.segments for question in questions if question.segments is not None]
        if segments:
            return self._sums.reduce_segments_apart(blocks, segments, reduction)
        return self._sums.reduce_apart(blocks, reduction)


class _Prefixes(Mapping[int, list[Any]]):
    """Node to the letters that lead to it. All of them at once would take the square of a long token's length."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def __getitem__(self, node: int) -> list[Any]:
        if not isinstance(node, int | np.integer) or not 0 <= node < self._layout.n_nodes:
            raise KeyError(node)
        return self._layout.prefix(int(node))

    def __iter__(self) -> Iterator[int]:
        return iter(range(self._layout.n_nodes))

    def __len__(self) -> int:
        return self._layout.n_nodes


def as_array(reduced: Any) -> NodeWeights:
    """A result as a numpy array."""
    array: NodeWeights = reduced.cpu().numpy() if isinstance(reduced, torch.Tensor) else reduced
    return array


def _node_masses(mass: Weights | None, n_nodes: int) -> npt.NDArray[np.float64] | None:
    if mass is None:
        return None
    plain = plain_weights(mass)
    if tuple(plain.shape) != (n_nodes,):
        raise WeightsMismatch(f"masses of shape {tuple(plain.shape)}", f"({n_nodes},), one for each node")
    return as_array(plain).astype(np.float64)


def checked_device(device: torch.device | str | None) -> torch.device:
    """The device that is meant, where tensors can be made; None is a GPU if there is one, else the CPU.

    Raises:
        InvalidDevice: torch knows no such device, or it is not there.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise InvalidDevice(str(device), str(error).splitlines()[0]) from error
