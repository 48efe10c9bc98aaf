"""What a program can ask about a context instead of a whole row; answered for a whole batch at once.

`await llm.query(token_ids, q)`: a drawn token, the k most probable tokens, chosen tokens, the mass of a mask. Only the
answer leaves the device, and no row is copied.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from genlm_backend import sampling
from genlm_backend.cache.row_memo import Block
from genlm_backend.errors import EmptyPrompt, InvalidQuery, NoTokenAllowed, TokenIdError
from genlm_backend.llm.contexts import checked_ids
from genlm_backend.packed_mask import LateMask, PackedMask
from genlm_backend.trie import NextBytes, NextByteTokens

Mask = torch.Tensor | npt.NDArray[np.bool_] | PackedMask

_INTEGERS = (int, np.integer)
_NUMBERS = (int, float, np.integer, np.floating)


class Row(NamedTuple):
    """The whole row: `(vocab,)` float32, nats; the caller's own."""


class Draw(NamedTuple):
    """One token drawn with noise that depends on `key` and the token only, never on the batch.

    Attributes:
        key: From `sampling.draw_key`.
        temperature: Divides the log-probabilities; 0 takes the most probable token.
        mask: `(vocab,)` bool, or packed: the tokens that may be drawn; None allows all. A late one is waited for when
            the row is there, not before.
        top_k: Among the so many most probable tokens; None is all. Filters come after the temperature, in the order
            min_p, top_k, top_p, and before the mask; at temperature 0 they see temperature 1.
        top_p: Among the fewest most probable tokens that reach this mass; None is all.
        min_p: Among tokens at least so many times as probable as the best one; None is all.
    """

    key: int
    temperature: float = 1.0
    mask: Mask | LateMask | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    @property
    def kept(self) -> sampling.Kept | None:
        """Its filters; None without any."""
        if self.top_k is self.top_p is self.min_p is None:
            return None
        return sampling.Kept(self.top_k, self.top_p, self.min_p)


class Drawn(NamedTuple):
    """Answer to `Draw`. The importance weight of the draw is `logprob - log_q`.

    Attributes:
        token_id: The drawn token.
        logprob: Its log-probability under the model, nats.
        log_q: Its log-probability under what it was drawn from (tempered, filtered, masked, renormalised), nats.
        log_mass: Of what temperature and filters left, the log of the part that the mask allows; 0 without a mask, and
            at temperature 0 without filters.
    """

    token_id: int
    logprob: float
    log_q: float
    log_mass: float = 0.0


class TopK(NamedTuple):
    """The `k` most probable tokens."""

    k: int


class TopTokens(NamedTuple):
    """Answer to `TopK`, most probable first: `(k,)` int64 and `(k,)` float32 nats."""

    token_ids: torch.Tensor
    logprobs: torch.Tensor


class Logprobs(NamedTuple):
    """Log-probabilities of chosen tokens: `(n,)` float32 nats."""

    token_ids: Sequence[int]


class MaskMass(NamedTuple):
    """Log of the total probability of the tokens of a `(vocab,)` bool, packed or late mask: a float, -inf for none."""

    mask: Mask | LateMask


class LogNormalizer(NamedTuple):
    """What log-softmax took off: log-probability + this = the model's own logit; a float, nats."""


class ByteMarginal(NamedTuple):
    """The log-mass of each next byte, under the tokens that continue a prefix; the answer is a `NextBytes`.

    Attributes:
        tokens: `genlm_backend.trie.NextByteTokens` of this vocabulary; make it once and use it for many queries.
    """

    tokens: NextByteTokens


Query = Row | Draw | TopK | Logprobs | MaskMass | LogNormalizer | ByteMarginal


def check_query(query: object, n_vocab: int) -> Query:
    """The query in the form in which it can join a batch: its mask and ids copied, so that later changes do not matter.

    A packed mask, or a numpy mask that is marked as read-only, is taken as it is, once for all that ask with the same.

    Raises:
        InvalidQuery: If it does not fit rows of `n_vocab` tokens.
    """
    match query:
        case Row() | LogNormalizer():
            return query
        case Draw(key, temperature, mask, top_k, top_p, min_p):
            if isinstance(key, bool) or not isinstance(key, _INTEGERS):
                raise InvalidQuery(f"the key of Draw is {key!r}; expected an integer from sampling.draw_key(...)")
            if not (isinstance(temperature, _NUMBERS) and 0 <= temperature < math.inf):
                raise InvalidQuery(f"the temperature of Draw is {temperature!r}; expected a finite number >= 0")
            if top_k is not None:
                top_k = _checked_k(top_k, n_vocab, "the top_k of Draw")
            if top_p is not None or min_p is not None:
                sampling.check_kept(sampling.Kept(None, top_p, min_p))
            checked = None if mask is None else _checked_mask(mask, n_vocab)
            top_k, top_p, min_p = None if top_k == n_vocab else top_k, None if top_p == 1 else top_p, min_p or None
            return Draw(int(key), float(temperature), checked, top_k, top_p, min_p)
        case TopK(k):
            return TopK(_checked_k(k, n_vocab, "the k of TopK"))
        case Logprobs(token_ids):
            try:
                return Logprobs(checked_ids(token_ids, n_vocab, None))
            except EmptyPrompt:
                return Logprobs(())
            except TokenIdError as error:
                raise InvalidQuery(f"Logprobs: {error}") from error
        case MaskMass(mask):
            return MaskMass(_checked_mask(mask, n_vocab))
        case ByteMarginal(tokens):
            if not isinstance(tokens, NextByteTokens) or tokens.n_tokens != n_vocab:
                raise InvalidQuery(
                    f"ByteMarginal wants NextByteTokens of a trie over the {n_vocab} tokens of this model"
                )
            return query
    raise InvalidQuery(
        f"{query!r} is no query; expected Row(), Draw(key), TopK(k), Logprobs(token_ids), MaskMass(mask), "
        "LogNormalizer() or ByteMarginal(tokens)"
    )


def is_late(query: Query) -> bool:
    """Whether its mask is still being made."""
    return isinstance(query, (Draw, MaskMass)) and isinstance(query.mask, LateMask)


def begin(query: Query) -> None:
    """Have its mask made, if that is late: in another thread, while its row is computed."""
    if isinstance(query, (Draw, MaskMass)) and isinstance(query.mask, LateMask):
        query.mask.begin()


def answer(block: Block, asked: Sequence[tuple[int, Query]]) -> list[Any]:
    """Answers, or exceptions for one asker each, to queries about rows of a block; waits for late masks.

    Args:
        block: `(batch, vocab)` rows; not changed.
        asked: (row, query) pairs; each row is finite.
    """
    answers: list[Any] = [None] * len(asked)
    draws: list[tuple[int, int, Draw]] = []
    filtered: list[tuple[int, int, Draw]] = []
    masses: list[tuple[int, int, MaskMass]] = []
    for i, (row, query) in enumerate(asked):
        if not isinstance(query, (Draw, MaskMass)):
            continue
        try:
            query = _with_mask(query)
        except Exception as error:
            answers[i] = error
            continue
        if isinstance(query, MaskMass):
            masses.append((i, row, query))
        else:
            (draws if query.kept is None else filtered).append((i, row, query))
    for some, draw in ((draws, _draw), (filtered, _draw_filtered)):
        if some:
            drawn = draw(block.logprobs, [row for _, row, _ in some], [query for _, _, query in some])
            for (i, _, _), outcome in zip(some, drawn, strict=True):
                answers[i] = outcome
    if masses:
        masks = [_mask_of(query) for _, _, query in masses]
        log_masses = sampling.log_mass(_rows(block.logprobs, [row for _, row, _ in masses]), masks).tolist()
        for (i, _, _), log_mass in zip(masses, log_masses, strict=True):
            answers[i] = min(log_mass, 0.0)
    if len(draws) + len(filtered) + len(masses) < len(asked):
        _answer_others(block, asked, answers)
    return answers


def _with_mask(query: Draw | MaskMass) -> Draw | MaskMass:
    """The query with its mask made; raises what was raised when it was made."""
    if not isinstance(query.mask, LateMask):
        return query
    mask = query.mask.result()
    if isinstance(query, MaskMass):
        return MaskMass(mask)
    return Draw(query.key, query.temperature, mask, query.top_k, query.top_p, query.min_p)


def _answer_others(block: Block, asked: Sequence[tuple[int, Query]], answers: list[Any]) -> None:
    for i, next_bytes in _byte_marginals(block, asked):
        answers[i] = next_bytes
    for i, top in _top_k(block, asked):
        answers[i] = top
    for i, (row, query) in enumerate(asked):
        match query:
            case Row():
                answers[i] = block.logprobs[row].clone()
            case LogNormalizer():
                answers[i] = block.log_normalizers[row]
            case Logprobs(token_ids):
                chosen = torch.tensor(token_ids, dtype=torch.int64, device=block.logprobs.device)
                answers[i] = block.logprobs[row, chosen]


def _top_k(block: Block, asked: Sequence[tuple[int, Query]]) -> Iterator[tuple[int, TopTokens]]:
    """Place and answer of each `TopK`; those of one k are found together."""
    by_k: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for i, (row, query) in enumerate(asked):
        if isinstance(query, TopK):
            by_k[query.k].append((i, row))
    for k, members in by_k.items():
        token_ids, logprobs = sampling.top_k(_rows(block.logprobs, [row for _, row in members]), k)
        for (i, _), of_row, values in zip(members, token_ids.unbind(), logprobs.unbind(), strict=True):
            yield i, TopTokens(of_row.clone(), values.clone())  # an answer that is kept keeps no other


def _byte_marginals(block: Block, asked: Sequence[tuple[int, Query]]) -> Iterator[tuple[int, NextBytes]]:
    """Place and answer of each `ByteMarginal`; those of one prefix are computed together."""
    by_prefix: dict[int, list[tuple[int, int]]] = defaultdict(list)
    of_prefix: dict[int, NextByteTokens] = {}
    for i, (row, query) in enumerate(asked):
        if isinstance(query, ByteMarginal):
            by_prefix[id(query.tokens)].append((i, row))
            of_prefix[id(query.tokens)] = query.tokens
    for name, members in by_prefix.items():
        together = of_prefix[name].log_masses(_rows(block.logprobs, [row for _, row in members]))
        for at, (i, _) in enumerate(members):
            yield i, NextBytes(together.log_masses[at].clone(), together.log_ends[at], together.log_no_text[at])


def _draw(logprobs: torch.Tensor, rows: list[int], queries: list[Draw]) -> list[Drawn | NoTokenAllowed]:
    keys = [query.key for query in queries]
    log_totals = log_wholes = [0.0] * len(queries)
    is_plain = [query.mask is None and query.temperature == 1 for query in queries]
    if all(is_plain):
        tokens = sampling.draw(_rows(logprobs, rows), keys)
    else:  # log of the sum of p ** (1 / temperature) over what may be drawn, and over all
        temperatures = [query.temperature for query in queries]
        masks = [_mask_of(query) for query in queries] if any(query.mask is not None for query in queries) else None
        tokens, log_masses = sampling.draw_with_mass(logprobs, rows, keys, temperatures, masks)
        log_totals = [0.0 if plain else total for plain, total in zip(is_plain, log_masses.tolist(), strict=True)]
        if any(temperature != 1 for temperature in temperatures):
            log_wholes = _log_wholes(logprobs, rows, queries, log_totals)
    of_draw = torch.tensor(rows, device=logprobs.device)
    chosen = logprobs[of_draw, tokens.clamp(min=0)].tolist()
    drawn: list[Drawn | NoTokenAllowed] = []
    for query, token, logprob, log_total, log_whole in zip(
        queries, tokens.tolist(), chosen, log_totals, log_wholes, strict=True
    ):
        if token < 0:
            drawn.append(_nothing_allowed(query))
        elif query.temperature < 1e-30:
            drawn.append(Drawn(token, logprob, 0.0, 0.0))
        else:
            log_q = min(logprob / query.temperature - log_total, 0.0)
            drawn.append(Drawn(token, logprob, log_q, min(log_total - log_whole, 0.0)))
    return drawn


def _log_wholes(logprobs: torch.Tensor, rows: list[int], queries: list[Draw], log_totals: list[float]) -> list[float]:
    """Log of the sum of p ** (1 / temperature) over all tokens: 0 at temperature 1, known where nothing is masked."""
    wholes = [0.0 if query.temperature == 1 else total for query, total in zip(queries, log_totals, strict=True)]
    of = [i for i, query in enumerate(queries) if query.mask is not None and query.temperature not in (0, 1)]
    different = list(dict.fromkeys((rows[i], queries[i].temperature) for i in of))
    if different:
        some = _rows(logprobs, [row for row, _ in different])
        sums = sampling.log_mass(some, None, [temperature for _, temperature in different]).tolist()
        of_both = dict(zip(different, sums, strict=True))
        for i in of:
            wholes[i] = of_both[rows[i], queries[i].temperature]
    return wholes


def _draw_filtered(logprobs: torch.Tensor, rows: list[int], queries: list[Draw]) -> list[Drawn | NoTokenAllowed]:
    found = sampling.draw_filtered(
        logprobs,
        rows,
        [query.key for query in queries],
        [query.kept or sampling.Kept() for query in queries],
        [query.temperature for query in queries],
        [_mask_of(query) for query in queries] if any(query.mask is not None for query in queries) else None,
    )
    of_draw = torch.tensor(rows, device=logprobs.device)
    chosen = logprobs[of_draw, found.token_ids.clamp(min=0)].tolist()
    values = zip(
        queries, found.token_ids.tolist(), chosen, found.log_qs.tolist(), found.log_masses.tolist(), strict=True
    )
    return [
        _nothing_allowed(query) if token < 0 else Drawn(token, logprob, min(log_q, 0.0), min(log_mass, 0.0))
        for query, token, logprob, log_q, log_mass in values
    ]


def _nothing_allowed(query: Draw) -> NoTokenAllowed:
    filters = {"top_k": query.top_k, "top_p": query.top_p, "min_p": query.min_p}
    told = ", ".join(f"{name}={value}" for name, value in filters.items() if value is not None)
    mask = _mask_of(query)
    allowed = mask.unpacked() if isinstance(mask, PackedMask) else mask
    n_allowed = 0 if allowed is None else int(allowed.sum())
    return NoTokenAllowed(n_allowed, told) if told else NoTokenAllowed(n_allowed)


def _mask_of(query: Draw | MaskMass) -> Mask | None:
    assert not isinstance(query.mask, LateMask)  # `answer` waited for it
    return query.mask


def _rows(logprobs: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Those rows in that order, without a copy when they are all of them."""
    return logprobs if rows == list(range(len(logprobs))) else logprobs[rows]


def _checked_k(k: object, n_vocab: int, what: str) -> int:
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or not 1 <= k <= n_vocab:
        raise InvalidQuery(f"{what} is {k!r}; expected 1 to {n_vocab}")
    return int(k)


def _checked_mask(mask: Mask | LateMask, n_vocab: int) -> Mask | LateMask:
    if isinstance(mask, (PackedMask, LateMask)):
        if mask.n_tokens != n_vocab:
            raise InvalidQuery(f"a packed mask is of {mask.n_tokens} tokens; expected {n_vocab}")
        return mask
    copied: torch.Tensor | npt.NDArray[np.bool_]
    try:
        if isinstance(mask, np.ndarray):  # by numpy: torch would wake threads for 49 kB, in any thread that asks
            copied = mask.copy() if mask.flags.writeable else mask
        else:
            copied = torch.as_tensor(mask).detach().clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidQuery(f"a mask is a {type(mask).__name__}; expected a bool array of {n_vocab} tokens") from error
    if str(copied.dtype) not in ("torch.bool", "bool") or copied.shape != (n_vocab,):
        raise InvalidQuery(
            f"a mask is {copied.dtype} of shape {tuple(copied.shape)}; expected bool of shape ({n_vocab},)"
        )
    return copied
