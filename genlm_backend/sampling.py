"""Draws from rows of log-probabilities, and temperature, top-k, top-p, min-p: pure functions, nothing global.

Randomness is an argument: a 64-bit key. The key and a token's id alone decide the noise of that token (a counter-based
generator: SplitMix64, read at any position without a state), so a row draws the same token alone or in a batch, in any
order, on any device, in any thread; and a mask, or logits that are slightly off, change the draw only where they must.

The law: `draw` returns token v with probability p_v ** (1 / temperature), normalised over the allowed tokens. This is
the Gumbel-max trick: the token with the highest log-weight + Gumbel noise. Where SplitMix64 gives x in (0, 1), the
noise is -log(-log(1 - x)). Of x near 0, the side on which improbable tokens win, 63 bits are kept, so tokens of
probability 1e-12 are still drawn at the right rate to a relative 1e-6; a uniform number of 24 bits would stop at 1e-7.

Rows that hold no possible token have no law: they come out as -1 from `draw`, -inf from `log_mass` and all -inf from
the filters, so that one dead end does not fail a batch.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from genlm_backend.errors import InvalidQuery
from genlm_backend.packed_mask import PackedMask, Words, n_words, pack
from genlm_backend.parts import in_parts

Mask = torch.Tensor | npt.NDArray[np.bool_] | PackedMask
Masks = torch.Tensor | npt.NDArray[np.bool_] | Sequence[Mask | None] | None

_NUMBERS = (int, float, np.number)
_COLDEST = 1e-30  # below, log-probabilities divided by it may overflow: there is no difference from 0 left
_HOTTEST = 1e30  # above, likewise none from uniform
_ROWS_OF_A_THREAD = (
    64  # a row takes 0.02 to 0.1 ms; a thread starts in 0.1 ms, beside those of a forward that still spin
)
_TOKENS_AT_ONCE = 1 << 24  # of the plain race, which holds several float64 arrays of this size (128 MiB each)


def draw_key(seed: int, lineage: tuple[int, ...] = (), step: int = 0, site: str = "") -> int:
    """The 64-bit key of one draw; different arguments give unrelated keys.

    Args:
        seed: Of the whole run; any integer.
        lineage: The path of the particle: its index, then the index of each copy.
        step: Its own count of draws.
        site: Tells apart draws of one step that serve different purposes.

    Returns:
        0 to 2**64 - 1, the same in every process, version and machine: BLAKE2b of the arguments.

    Raises:
        TypeError: If a number is not an integer.
    """
    numbers = [format(operator.index(number), "x") for number in (seed, step, *lineage)]
    # Unambiguous: hexadecimal numbers hold no comma or colon, and the site comes last.
    text = ",".join(numbers) + ":" + site
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def fresh_seed() -> int:
    """A seed from the operating system's entropy, 0 to 2**63 - 1, for callers that were given none."""
    return int.from_bytes(os.urandom(8), "little") >> 1


def prepare() -> None:
    """Load what draws on the CPU now instead of at the first draw: 0.5 s, once on a machine 12 s to compile it."""
    rows = torch.zeros(1, 2)
    for masks in (None, [torch.ones(2, dtype=torch.bool)]):
        draw(rows, [0], None, masks)
        log_mass(rows, masks)
        draw_with_mass(rows, [0], [0], None, masks)
        draw_filtered(rows, [0], [0], [Kept(top_p=0.5)], None, masks)
    from genlm_backend import race

    race.prepare()


def draw(
    rows: torch.Tensor,
    keys: Sequence[int],
    temperatures: Sequence[float] | None = None,
    masks: Masks = None,
) -> torch.Tensor:
    """One token per row, with probability p ** (1 / temperature) among the allowed, decided by the row and its key.

    On the CPU one compiled call without the interpreter lock: 3 ms for 50 rows of 49,152. The first call of a process
    imports numba (0.5 s), and the first on a machine compiles (2 s; the code is kept on disk where a folder can be
    written, else each process compiles). On a GPU by `draw_plainly`.

    Args:
        rows: (n, vocab) float log-probabilities; a constant added to a row changes nothing. Read as float32.
        keys: n integers, from `draw_key`; taken modulo 2**64.
        temperatures: n finite numbers >= 0; 0 takes the most probable token, the lowest id among equals. None is all 1.
        masks: (n, vocab) bool, or n masks of (vocab,) bool, or packed, or None; True allows. One object
            given for several rows is read once.

    Returns:
        (n,) int64 on the device of `rows`; -1 where no allowed token has probability, or one is NaN or +inf.

    Raises:
        InvalidQuery: If shapes or types do not fit, or a temperature is negative or not finite.
    """
    if rows.device.type in ("cpu", "mps"):  # MPS has no float64
        on_cpu = rows.cpu()
        return _draw_compiled(on_cpu, keys, _checked(on_cpu, keys, temperatures, masks)).to(rows.device)
    return draw_plainly(rows, keys, temperatures, masks)


def draw_among(
    token_ids: npt.NDArray[np.int64], log_scores: npt.NDArray[np.float64], keys: Sequence[int]
) -> npt.NDArray[np.int64]:
    """Where in each row of a few tokens the drawn one is, with probability proportional to `exp(log_scores)`.

    A token has the noise that it has in `draw`, so leaving tokens out changes the draw only where it must.

    Args:
        token_ids: (n, k) int64.
        log_scores: (n, k) float64, nats, normalised or not.
        keys: n integers, from `draw_key`.

    Returns:
        (n,) int64, 0 to k - 1; -1 where none is possible.
    """
    from genlm_backend import race

    places: npt.NDArray[np.int64] = race.draw_among(token_ids, log_scores, _wrapped(keys))
    return places


def draw_plainly(
    rows: torch.Tensor,
    keys: Sequence[int],
    temperatures: Sequence[float] | None = None,
    masks: Masks = None,
) -> torch.Tensor:
    """`draw` in its plainest form, every token's score in float64 by torch: for GPUs, and the oracle of tests.

    Its tokens are those of `draw`, save where the two best scores differ by less than a rounding error of the device's
    float64 logarithm (one draw in 1e14).
    """
    asked = _checked(rows, keys, temperatures, masks)
    n_at_once = max(1, _TOKENS_AT_ONCE // max(1, rows.shape[1]))
    parts = [
        _race(
            _allowed_rows(rows, asked, i, i + n_at_once), keys[i : i + n_at_once], asked.temperatures[i : i + n_at_once]
        )
        for i in range(0, len(rows), n_at_once)
    ]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=rows.device)


def gumbel_noise(keys: Sequence[int], n_tokens: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The noise that `draw` adds to the tempered log-probabilities of each token.

    Args:
        keys: n integers, taken modulo 2**64.
        n_tokens: Noise is made for ids 0 to n_tokens - 1; that of an id does not depend on this number.
        device: Any with float64.

    Returns:
        (n, n_tokens) float64, standard Gumbel.
    """
    z = torch.from_numpy(_wrapped(keys).view(np.int64)).to(device)[:, None]
    z = z + torch.arange(1, n_tokens + 1, device=device) * _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    z = z ^ _shifted(z, 31)
    x = ((_shifted(z, 1).double() + 0.5) * 2.0**-63).clamp_(max=1.0 - 2.0**-53)
    return -torch.log(-torch.log1p(-x))


def log_mass(rows: torch.Tensor, masks: Masks = None, temperatures: Sequence[float] | None = None) -> torch.Tensor:
    """Log of the sum of p ** (1 / temperature) over the allowed tokens of each row; without a temperature, their mass.

    The log-probability of a draw v is `rows[i, v] / temperature - log_mass`. The result of a row does not depend on the
    batch. Accurate to 1e-6.

    Args:
        rows: (n, vocab) float log-probabilities. Read as float32.
        masks: As in `draw`.
        temperatures: As in `draw`; at 0 the result is the limit: -inf, unless the best log-probability is 0.

    Returns:
        (n,) float64 (float32 on MPS), nats, on the device of `rows`; -inf where nothing is allowed.

    Raises:
        InvalidQuery: As in `draw`.
    """
    if rows.device.type in ("cpu", "mps"):
        on_cpu = rows.cpu()
        log_masses = _log_mass_compiled(on_cpu, _checked(on_cpu, None, temperatures, masks))
        return log_masses if rows.device.type == "cpu" else log_masses.float().to(rows.device)
    asked = _checked(rows, None, temperatures, masks)
    n_at_once = max(1, _TOKENS_AT_ONCE // max(1, rows.shape[1]))
    parts = [
        _log_mass_plainly(_allowed_rows(rows, asked, i, i + n_at_once), asked.temperatures[i : i + n_at_once])
        for i in range(0, len(rows), n_at_once)
    ]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64, device=rows.device)


def top_k(rows: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `k` most probable tokens of each row, most probable first.

    Args:
        rows: (n, vocab) float; not changed.
        k: 1 to vocab.

    Returns:
        (n, k) int64 token ids and (n, k) float32, on the device of `rows`; of equals the lowest ids come first.

    Raises:
        InvalidQuery: The rows are no float matrix, or `k` does not fit them.
    """
    if rows.ndim != 2 or not rows.is_floating_point() or not _is_count(k) or k > rows.shape[1]:
        shape = tuple(rows.shape)
        raise InvalidQuery(
            f"top_k was given {rows.dtype} of shape {shape} and k={k!r}; expected float (n, vocab), k from 1 to vocab"
        )
    k = int(k)
    if rows.device.type != "cpu":
        return _top_k_plainly(rows.float(), k)
    from genlm_backend import race

    flat, stride = _flat(rows)

    def find_some(start: int, stop: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        found: tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]] = race.top_rows(
            flat[start * stride :], stride, stop - start, rows.shape[1], k
        )
        return found

    token_ids, values = zip(*in_parts(len(rows), _ROWS_OF_A_THREAD, find_some), strict=True)
    return torch.from_numpy(np.concatenate(token_ids)), torch.from_numpy(np.concatenate(values))


def _top_k_plainly(rows: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    border = rows.topk(k).values[:, -1:]
    is_border = rows == border
    is_kept = (rows > border) | (is_border & (is_border.cumsum(1) <= k - (rows > border).sum(1, keepdim=True)))
    token_ids = is_kept.nonzero()[:, 1].view(len(rows), k)
    values, order = rows.gather(1, token_ids).sort(dim=1, descending=True, stable=True)
    return token_ids.gather(1, order), values


def draw_with_mass(
    rows: torch.Tensor,
    row_of_draw: Sequence[int],
    keys: Sequence[int],
    temperatures: Sequence[float] | None = None,
    masks: Masks = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`draw` and `log_mass` for several draws of each row; on the CPU no row is copied, and no mass summed twice.

    Args:
        rows: (batch, vocab) float log-probabilities.
        row_of_draw: n indices of rows.
        keys: n integers, as in `draw`.
        temperatures: n, as in `draw`.
        masks: n, as in `draw`.

    Returns:
        What `draw` and what `log_mass` return for `rows[row_of_draw]`.

    Raises:
        InvalidQuery: As in `draw`.
    """
    if rows.device.type != "cpu":
        wanted = list(row_of_draw)
        drawn_from = rows if wanted == list(range(len(rows))) else rows[wanted]
        return draw(drawn_from, keys, temperatures, masks), log_mass(drawn_from, masks, temperatures)
    asked = _checked(rows, keys, temperatures, masks, row_of_draw)
    if not len(keys):
        return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float64)
    if len(set(row_of_draw)) == len(keys):
        drawn, log_masses = _draw_groups(rows, asked, _wrapped(keys), is_weighed=True)
        return torch.from_numpy(drawn), torch.from_numpy(log_masses)
    same = np.stack([asked.row_of_draw, asked.mask_of_draw, asked.temperatures.view(np.int64)])
    order = np.lexsort(same)
    is_first = np.append(True, (same[:, order[1:]] != same[:, order[:-1]]).any(0))
    first = np.append(np.flatnonzero(is_first), len(keys))
    alike = asked.of(order[first[:-1]])
    in_order, of_group = _draw_groups(rows, alike, _wrapped(keys)[order], first, is_weighed=True)
    token_ids, log_masses = np.empty(len(keys), np.int64), np.empty(len(keys), np.float64)
    token_ids[order] = in_order
    log_masses[order] = np.repeat(of_group, np.diff(first))
    return torch.from_numpy(token_ids), torch.from_numpy(log_masses)


class Kept(NamedTuple):
    """What is left of a row before a draw, in the order min-p, top-k, top-p; None leaves a filter out.

    Attributes:
        top_k: The so many most probable tokens, of equals the lowest ids; 1 or more.
        top_p: Of these, the fewest most probable that reach this mass; above 0, at most 1.
        min_p: First of all, tokens at least so many times as probable as the best one; 0 to 1.
    """

    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None


class FilteredDraws(NamedTuple):
    """What `draw_filtered` returns, on the device of the rows.

    Attributes:
        token_ids: (n,) int64; -1 where no token is possible.
        log_qs: (n,) float64, nats: of each token among what was kept and its mask allows; 0 at temperature 0.
        log_masses: (n,) float64, nats: the part of what was kept that the mask allows, 0 without one.
    """

    token_ids: torch.Tensor
    log_qs: torch.Tensor
    log_masses: torch.Tensor


def draw_filtered(
    rows: torch.Tensor,
    row_of_draw: Sequence[int],
    keys: Sequence[int],
    kept: Sequence[Kept],
    temperatures: Sequence[float] | None = None,
    masks: Masks = None,
) -> FilteredDraws:
    """Draws from rows after temperature and filters, then under masks: nothing is renormalised before all is left out.

    On the CPU one compiled call, without sorting a row: 16 draws with top-p of 0.9 from rows of 49,152 take 1 ms.

    Args:
        rows: (batch, vocab) float log-probabilities.
        row_of_draw: n indices of rows.
        keys: n integers, as in `draw`; a token has the noise that it has there.
        kept: n filters.
        temperatures: n, as in `draw`; at 0 the filters see temperature 1, and the best allowed token is taken.
        masks: n, as in `draw`.

    Raises:
        InvalidQuery: As in `draw`, or a filter is out of its range.
    """
    asked = _checked(rows, keys, temperatures, masks, row_of_draw)
    if len(kept) != len(keys):
        raise InvalidQuery(f"there are {len(kept)} filters for {len(keys)} draws; expected one each")
    for one in dict.fromkeys(kept):
        check_kept(one)
    if rows.device.type not in ("cpu", "mps"):
        return _draw_filtered_plainly(rows, keys, kept, asked)
    from genlm_backend import race

    on_cpu = rows.cpu()
    flat, stride = _flat(on_cpu)
    n_tokens = rows.shape[1]
    of_draw = (
        asked.row_of_draw,
        _wrapped(keys),
        asked.temperatures,
        np.array([n_tokens if one.top_k is None else min(one.top_k, n_tokens) for one in kept], np.int64),
        np.array([1.0 if one.top_p is None else one.top_p for one in kept], np.float64),
        np.array([one.min_p or 0.0 for one in kept], np.float64),
    )
    masks_once = asked.words(n_tokens)

    def draw_some(start: int, stop: int) -> Sequence[npt.NDArray[Any]]:
        some = [values[start:stop] for values in of_draw]
        drawn: Sequence[npt.NDArray[Any]] = race.draw_filtered(
            flat, stride, n_tokens, *some, masks_once, asked.mask_of_draw[start:stop]
        )
        return drawn

    parts = in_parts(len(keys), _ROWS_OF_A_THREAD, draw_some)
    found = FilteredDraws(*(torch.from_numpy(np.concatenate(values)) for values in zip(*parts, strict=True)))
    return found if rows.device.type == "cpu" else FilteredDraws(found[0].to(rows.device), *found[1:])


def check_kept(kept: Kept) -> None:
    """Refuse filters that are out of their range.

    Raises:
        InvalidQuery: One is.
    """
    top_k, top_p, min_p = kept
    if top_k is not None and not _is_count(top_k):
        raise InvalidQuery(f"top_k is {top_k!r}; expected an integer of 1 or more, or None for all tokens")
    if top_p is not None and not (isinstance(top_p, _NUMBERS) and 0.0 < top_p <= 1.0):
        raise InvalidQuery(f"top_p is {top_p!r}; expected above 0 and at most 1, or None")
    if min_p is not None and not (isinstance(min_p, _NUMBERS) and 0.0 <= min_p <= 1.0):
        raise InvalidQuery(f"min_p is {min_p!r}; expected 0 to 1, or None")


def _is_count(k: object) -> bool:
    return isinstance(k, int | np.integer) and not isinstance(k, bool) and bool(k >= 1)


def _draw_filtered_plainly(
    rows: torch.Tensor, keys: Sequence[int], kept: Sequence[Kept], asked: _Asked
) -> FilteredDraws:
    """By torch, filter after filter: for GPUs, and the oracle of tests."""
    n_at_once = max(1, _TOKENS_AT_ONCE // max(1, rows.shape[1]))
    parts = [
        _filtered_race(rows, keys[i : i + n_at_once], kept[i : i + n_at_once], asked.of(slice(i, i + n_at_once)))
        for i in range(0, max(len(keys), 1), n_at_once)
    ]
    return FilteredDraws(*(torch.cat(values) for values in zip(*parts, strict=True)))


def _filtered_race(rows: torch.Tensor, keys: Sequence[int], kept: Sequence[Kept], asked: _Asked) -> FilteredDraws:
    is_greedy = asked.temperatures == 0
    divisors = np.where(is_greedy, 1.0, asked.temperatures)
    q = rows.new_empty((len(keys), rows.shape[1]), dtype=torch.float32)
    together: dict[tuple[float, Kept], list[int]] = {}
    for i, (divisor, one) in enumerate(zip(divisors.tolist(), kept, strict=True)):
        together.setdefault((divisor, one), []).append(i)
    for (divisor, (top_k, top_p, min_p)), members in together.items():
        some = with_temperature(rows[asked.row_of_draw[members].tolist()], divisor)
        some = some if min_p is None else keep_min_p(some, min_p)
        some = some if top_k is None else keep_top_k(some, top_k)
        q[members] = some if top_p is None else keep_top_p(some, top_p)
    of_itself = asked._replace(row_of_draw=np.arange(len(keys)))
    allowed = _allowed_rows(q, of_itself, 0, len(keys))
    token_ids = _race(allowed, keys, np.where(is_greedy, 0.0, 1.0))
    log_masses = allowed.double().logsumexp(1).clamp(max=0.0)
    log_qs = q.gather(1, token_ids.clamp(min=0)[:, None])[:, 0].double() - log_masses
    log_qs = torch.where(torch.from_numpy(is_greedy).to(rows.device), 0.0, log_qs.clamp(max=0.0))
    return FilteredDraws(token_ids, torch.where(token_ids < 0, -math.inf, log_qs), log_masses)


def with_temperature(logprobs: torch.Tensor, temperature: float) -> torch.Tensor:
    """The rows of p ** (1 / temperature), renormalised; at 0 all mass is on the most probable token, lowest id first.

    Args:
        logprobs: (..., vocab) float; not changed.
        temperature: Finite, >= 0.

    Returns:
        (..., vocab) float32, nats. A row of -inf stays so.

    Raises:
        InvalidQuery: If the temperature is negative or not finite.
    """
    exact, temperature = _exact(logprobs), float(_clamped(np.array([temperature], np.float64))[0])
    if not exact.shape[-1]:
        return exact.float()
    if temperature == 0.0:
        return _kept(exact, _is_first_of_equals(exact))
    top = exact.amax(-1, keepdim=True)
    return _renormalised((exact - torch.where(top.isinf(), 0.0, top)) / temperature)


def keep_top_k(logprobs: torch.Tensor, k: int) -> torch.Tensor:
    """The rows with only their `k` most probable tokens, renormalised; of equals at the border, the lowest ids.

    Args:
        logprobs: (..., vocab) float; not changed.
        k: 1 or more; from the size of the vocabulary on, everything is kept.

    Returns:
        (..., vocab) float32, nats, -inf elsewhere; fewer than `k` are left where fewer were possible.

    Raises:
        InvalidQuery: If `k` is no integer, or below 1.
    """
    if not _is_count(k):
        raise InvalidQuery(f"keep_top_k was given k={k!r}; expected an integer of 1 or more")
    k, exact = int(k), _exact(logprobs)
    if k >= exact.shape[-1]:
        return _renormalised(exact)
    border = exact.topk(k, dim=-1).values[..., -1:]
    n_above = (exact > border).sum(-1, keepdim=True)
    is_at_border = exact == border
    return _kept(exact, (exact > border) | (is_at_border & (is_at_border.cumsum(-1) <= k - n_above)))


def keep_top_p(logprobs: torch.Tensor, p: float) -> torch.Tensor:
    """The rows with only the fewest most probable tokens whose mass reaches `p`, renormalised; of equals, lowest ids.

    At least one token is kept, and the one that crosses `p` is.

    Args:
        logprobs: (..., vocab) float; not changed, and normalised before masses are compared.
        p: Above 0, at most 1; 1 keeps everything.

    Returns:
        (..., vocab) float32, nats, -inf elsewhere.

    Raises:
        InvalidQuery: If `p` is not in (0, 1].

    Source: Holtzman et al. 2020, "The curious case of neural text degeneration", section 3.1.
    """
    if not 0.0 < p <= 1.0:
        raise InvalidQuery(f"keep_top_p was given p={p!r}; expected above 0 and at most 1")
    exact = _exact(logprobs)
    if p == 1.0:
        return _renormalised(exact)
    ordered, token_ids = exact.sort(dim=-1, descending=True, stable=True)
    masses = _normalised(ordered).exp()
    is_kept = masses.cumsum(-1) - masses < p
    return _kept(exact, torch.zeros_like(is_kept).scatter_(-1, token_ids, is_kept))


def keep_min_p(logprobs: torch.Tensor, min_p: float) -> torch.Tensor:
    """The rows with only the tokens at least `min_p` times as probable as the best one, renormalised.

    Args:
        logprobs: (..., vocab) float; not changed.
        min_p: 0 to 1; 0 keeps everything, 1 the most probable token and its equals.

    Returns:
        (..., vocab) float32, nats, -inf elsewhere.

    Raises:
        InvalidQuery: If `min_p` is not in [0, 1].

    Source: Nguyen et al. 2024, "Turning up the heat: min-p sampling", section 3.
    """
    if not 0.0 <= min_p <= 1.0:
        raise InvalidQuery(f"keep_min_p was given min_p={min_p!r}; expected 0 to 1")
    exact = _exact(logprobs)
    if min_p == 0.0 or not exact.shape[-1]:
        return _renormalised(exact)
    return _kept(exact, exact >= exact.amax(-1, keepdim=True) + math.log(min_p))


class _Asked(NamedTuple):
    """Checked arguments: of each draw its row, temperature and mask.

    `masks` are the different ones; draw i is under mask `mask_of_draw[i]`, -1: none.
    """

    row_of_draw: npt.NDArray[np.int64]
    temperatures: npt.NDArray[np.float64]
    masks: Sequence[Mask]
    mask_of_draw: npt.NDArray[np.int64]

    def of(self, some: slice | npt.NDArray[np.int64]) -> _Asked:
        """That of some of the draws."""
        return _Asked(self.row_of_draw[some], self.temperatures[some], self.masks, self.mask_of_draw[some])

    def words(self, n_tokens: int) -> Words:
        """(k, words of n_tokens) uint32: the masks, packed."""
        if not self.masks:
            return np.empty((0, n_words(n_tokens)), np.uint32)
        if all(isinstance(mask, torch.Tensor) for mask in self.masks):
            return pack(torch.stack(self.masks).detach().cpu().numpy())  # type: ignore[arg-type]
        return np.stack([_packed(mask) for mask in self.masks])


def _draw_compiled(rows: torch.Tensor, keys: Sequence[int], asked: _Asked) -> torch.Tensor:
    token_ids, _ = _draw_groups(rows, asked, _wrapped(keys), is_weighed=False)
    return torch.from_numpy(token_ids)


def _draw_groups(
    rows: torch.Tensor,
    asked: _Asked,
    keys: npt.NDArray[np.uint64],
    first_of_group: npt.NDArray[np.int64] | None = None,
    *,
    is_weighed: bool,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Draws in groups that `asked` says; None: each draw is a group. See `race.draw`."""
    from genlm_backend import race

    flat, stride = _flat(rows)
    n_groups = len(asked.row_of_draw)
    first = np.arange(n_groups + 1) if first_of_group is None else first_of_group
    groups = race.Groups(asked.row_of_draw, asked.temperatures, asked.mask_of_draw, first)
    masks = asked.words(rows.shape[1])
    return race.draw(flat, stride, rows.shape[1], groups, masks, keys, is_weighed=is_weighed)


def _log_mass_compiled(rows: torch.Tensor, asked: _Asked) -> torch.Tensor:
    from genlm_backend import race

    flat, stride = _flat(rows)
    masks = asked.words(rows.shape[1])
    log_masses = race.log_mass_rows(
        flat, stride, rows.shape[1], asked.row_of_draw, asked.temperatures, masks, asked.mask_of_draw
    )
    return torch.from_numpy(log_masses)


def _race(rows: torch.Tensor, keys: Sequence[int], temperatures: npt.NDArray[np.float64]) -> torch.Tensor:
    if not rows.shape[1]:
        return torch.full((len(rows),), -1, device=rows.device)
    divisors = torch.from_numpy(temperatures).to(rows.device)[:, None]
    top = rows.amax(1, keepdim=True)
    weights = (rows.double() - top.double()) / torch.where(divisors == 0, 1.0, divisors)
    noise = gumbel_noise(keys, rows.shape[1], rows.device)
    scores = torch.where(divisors == 0, weights, weights + noise)
    return torch.where(top.isfinite()[:, 0], scores.argmax(1), -1)


def _log_mass_plainly(rows: torch.Tensor, temperatures: npt.NDArray[np.float64]) -> torch.Tensor:
    if not rows.shape[1]:
        return torch.full((len(rows),), -math.inf, dtype=torch.float64, device=rows.device)
    divisors = torch.from_numpy(temperatures).to(rows.device)
    top = rows.amax(1).double()
    limits = torch.where(top == 0, top, torch.copysign(torch.full_like(top, math.inf), top))
    log_masses = (rows.double() / torch.where(divisors == 0, 1.0, divisors)[:, None]).logsumexp(1)
    return torch.where((divisors == 0) & ~top.isnan(), limits, log_masses)


def _allowed_rows(rows: torch.Tensor, asked: _Asked, start: int, stop: int) -> torch.Tensor:
    """Rows `start` to `stop` as float32, -inf where their masks do not allow."""
    some = rows[start:stop].detach().float()
    mask_of_row = asked.mask_of_draw[start:stop]
    if (mask_of_row < 0).all():
        return some
    different, of_row = np.unique(mask_of_row, return_inverse=True)
    is_allowed = torch.ones(len(different), rows.shape[1], dtype=torch.bool, device=rows.device)
    for i, mask in enumerate(different.tolist()):
        if mask >= 0:
            is_allowed[i] = _as_tensor(asked.masks[mask])
    return some.masked_fill(~is_allowed[torch.from_numpy(of_row).to(rows.device)], -math.inf)


def _checked(
    rows: torch.Tensor,
    keys: Sequence[int] | None,
    temperatures: Sequence[float] | None,
    masks: Masks,
    row_of_draw: Sequence[int] | None = None,
) -> _Asked:
    if rows.ndim != 2 or not rows.is_floating_point():
        raise InvalidQuery(f"rows are {rows.dtype} of shape {tuple(rows.shape)}; expected float of shape (n, vocab)")
    of_draw = np.arange(len(rows)) if row_of_draw is None else np.array(row_of_draw, np.int64)
    n_draws = len(of_draw)
    if not ((of_draw >= 0) & (of_draw < len(rows))).all():
        raise InvalidQuery(f"the rows {of_draw.tolist()} are asked for; expected 0 to {len(rows) - 1}")
    if keys is not None and len(keys) != n_draws:
        raise InvalidQuery(f"there are {len(keys)} keys for {n_draws} rows; expected one key each")
    divisors = np.ones(n_draws) if temperatures is None else np.array(temperatures, np.float64)
    if divisors.shape != (n_draws,):
        raise InvalidQuery(f"temperatures have shape {divisors.shape}; expected one for each of {n_draws} rows")
    return _Asked(of_draw, _clamped(divisors), *_different((n_draws, rows.shape[1]), masks))


def _clamped(temperatures: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    is_bad = ~(np.isfinite(temperatures) & (temperatures >= 0))
    if is_bad.any():
        raise InvalidQuery(f"a temperature is {temperatures[is_bad][0]}; expected a finite number >= 0")
    return np.where(temperatures < _COLDEST, 0.0, np.minimum(temperatures, _HOTTEST))


def _different(shape: tuple[int, int], masks: Masks) -> tuple[Sequence[Mask], npt.NDArray[np.int64]]:
    """Each different mask once, and the index of each draw's; masks that are one object count as one."""
    n_draws, n_tokens = shape
    if masks is None:
        return [], np.full(n_draws, -1)
    if isinstance(masks, torch.Tensor | np.ndarray):
        _check_mask(masks, shape)
        return list(masks), np.arange(n_draws)
    if isinstance(masks, PackedMask):
        raise InvalidQuery(
            f"one packed mask was given for {n_draws} rows; expected a list with a mask or None for each"
        )
    if len(masks) != n_draws:
        raise InvalidQuery(f"there are {len(masks)} masks for {n_draws} rows; expected one mask or None each")
    different = {id(mask): mask for mask in masks if mask is not None}
    for mask in different.values():
        _check_mask(mask, (n_tokens,))
    index = {identity: i for i, identity in enumerate(different)}
    return list(different.values()), np.array([-1 if mask is None else index[id(mask)] for mask in masks], np.int64)


def _packed(mask: Mask) -> Words:
    if isinstance(mask, PackedMask):
        return mask.words
    return pack(mask if isinstance(mask, np.ndarray) else mask.detach().cpu().numpy())


def _as_tensor(mask: Mask) -> torch.Tensor:
    if isinstance(mask, PackedMask):
        return torch.from_numpy(mask.unpacked())
    # torch warns of sharing read-only memory, and has no negative strides
    if isinstance(mask, np.ndarray) and (not mask.flags.carray or min(mask.strides, default=0) < 0):
        mask = mask.copy()
    return torch.as_tensor(mask)


def _check_mask(mask: Mask, shape: tuple[int, ...]) -> None:
    if isinstance(mask, PackedMask):
        if (mask.n_tokens,) != shape:
            raise InvalidQuery(f"a packed mask is of {mask.n_tokens} tokens; expected {shape[0]}")
        return
    if not isinstance(mask, (torch.Tensor, np.ndarray)):
        raise InvalidQuery(f"a mask is a {type(mask).__name__}; expected a bool array of shape {shape}")
    if str(mask.dtype) not in ("torch.bool", "bool") or mask.shape != shape:
        raise InvalidQuery(f"a mask is {mask.dtype} of shape {tuple(mask.shape)}; expected bool of shape {shape}")


def _flat(rows: torch.Tensor) -> tuple[npt.NDArray[np.float32], int]:
    """The memory of the rows as one array, and the distance of their starts; no copy of rows cut out of wider ones."""
    rows = rows.detach().to(torch.float32)
    if rows.shape[1] > 1 and rows.stride(1) != 1:
        rows = rows.contiguous()
    n_rows, n_tokens = rows.shape
    if not n_rows or not n_tokens:
        return np.empty(0, np.float32), 0
    stride = rows.stride(0)
    return rows.as_strided(((n_rows - 1) * stride + n_tokens,), (1,)).numpy(), stride


def _wrapped(keys: Sequence[int]) -> npt.NDArray[np.uint64]:
    return np.array([int(key) & 0xFFFFFFFFFFFFFFFF for key in keys], np.uint64)


def _signed(word: int) -> int:
    """The int64 with the bits of this 64-bit word: torch multiplies int64 modulo 2**64, as it should."""
    return word - (1 << 64) if word >> 63 else word


def _shifted(z: torch.Tensor, n_bits: int) -> torch.Tensor:
    """Logical shift to the right; that of int64 would fill with the sign."""
    return (z >> n_bits) & ((1 << (64 - n_bits)) - 1)


def _exact(logprobs: torch.Tensor) -> torch.Tensor:
    if not logprobs.is_floating_point() or not logprobs.ndim:
        shape = tuple(logprobs.shape)
        raise InvalidQuery(f"log-probabilities are {logprobs.dtype} of shape {shape}; expected float of (..., vocab)")
    return logprobs.to(torch.float32 if logprobs.device.type == "mps" else torch.float64)


def _is_first_of_equals(exact: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(exact, dtype=torch.bool).scatter_(-1, exact.argmax(-1, keepdim=True), True)


def _kept(exact: torch.Tensor, is_kept: torch.Tensor) -> torch.Tensor:
    return _renormalised(exact.masked_fill(~is_kept, -math.inf))


def _renormalised(exact: torch.Tensor) -> torch.Tensor:
    return _normalised(exact).float()


def _normalised(exact: torch.Tensor) -> torch.Tensor:
    total = exact.logsumexp(-1, keepdim=True)
    return exact - torch.where(total == -math.inf, 0.0, total)
