"""Draws, masses and filters: exact cases, equality with the plain race, and independence of batch, thread and process.

The law of the draws is in statistical/test_draws.py.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import genlm_backend.errors
from genlm_backend import race, sampling, team
from genlm_backend.errors import InvalidQuery
from genlm_backend.packed_mask import PackedMask, pack

FRESH_SEED = sampling.fresh_seed  # tests draw from fixed seeds in its place
PACKAGE = Path(genlm_backend.errors.__file__).parent
TEMPERATURES = [0.0, 1e-40, 1e-12, 0.01, 0.3, 1.0, 2.0, 10.0, 1e12, 1e300]
EDGE_SIZES = [1, 2, 7, 255, 256, 257, 513]


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """What the first use costs is no part of any test."""
    rows = torch.zeros(1, 2)
    sampling.draw(rows, [0])
    sampling.log_mass(rows)


def some_rows(n_rows: int, n_tokens: int, seed: int) -> torch.Tensor:
    """Normalised rows from flat to peaked, a fifth of the tokens impossible."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.tensor([0.0, 0.1, 1.0, 3.0, 10.0, 40.0, 300.0, 1e4])
    scale = scales[torch.randint(len(scales), (n_rows, 1), generator=generator)]
    rows = torch.randn(n_rows, n_tokens, generator=generator) * scale
    rows[torch.rand(n_rows, n_tokens, generator=generator) < 0.2] = -math.inf
    return rows.log_softmax(-1).nan_to_num(nan=-math.inf, neginf=-math.inf)


def some_masks(n_rows: int, n_tokens: int, seed: int) -> torch.Tensor:
    """From nearly nothing allowed to nearly everything."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n_rows, n_tokens, generator=generator) < torch.rand(n_rows, 1, generator=generator)


def some_keys(n: int, seed: int = 0) -> list[int]:
    return [sampling.draw_key(seed, (i,)) for i in range(n)]


def some_temperatures(n: int) -> list[float]:
    return [TEMPERATURES[i % len(TEMPERATURES)] for i in range(n)]


# Keys.


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ((0,), 0x300CA486EB3749EF),
        ((1,), 0x5AA757CEA5CCB964),
        ((-1,), 0x10EC40E6C17D44EA),
        ((2**200, (3, 1, 4), 15, "proposal"), 0x9FF27D62022E41AC),
        ((0, (), 0, "é"), 0x5EA1F6D86F751A3C),
    ],
)
def test_keys_never_change(arguments, key):
    assert sampling.draw_key(*arguments) == key


def test_draws_never_change():
    rows = (torch.arange(1000.0) % 17).expand(6, 1000)
    assert sampling.draw(rows, some_keys(6), [0.0, 0.5, 1.0, 2.0, 10.0, 1e6]).tolist() == [16, 372, 662, 474, 684, 555]


def test_keys_differ_wherever_their_arguments_do():
    numbers = [-(2**64), -17, -1, 0, 1, 2, 11, 12, 2**63, 2**64, 10**5000]
    lineages = [(), (0,), (0, 0), (1,), (1, 1), (11,), (1, 2), (12,), (2, 1), (-1,)]
    sites = ["", "0", ",", ":", "a", "b", "ab", "1:", "\ud800"]
    keys = {sampling.draw_key(s, li, t, w) for s in numbers for li in lineages for t in (0, 1, 11) for w in sites}
    assert len(keys) == len(numbers) * len(lineages) * 3 * len(sites)
    assert all(0 <= key < 2**64 for key in keys)


def test_keys_take_any_integer_type_and_nothing_else():
    assert sampling.draw_key(np.int64(5), (np.int32(2),), np.uint8(1)) == sampling.draw_key(5, (2,), 1)
    with pytest.raises(TypeError):
        sampling.draw_key(1.0)  # type: ignore[arg-type]


def test_fresh_seeds_differ():
    seeds = {FRESH_SEED() for _ in range(100)}
    assert len(seeds) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)


# The compiled race is the plain race.


@pytest.mark.parametrize("n_tokens", [*EDGE_SIZES, 4097])
@pytest.mark.parametrize("is_masked", [False, True])
def test_compiled_draws_equal_the_plain_race(n_tokens: int, is_masked: bool):
    n_rows = 100 if n_tokens < 1000 else 40
    rows = some_rows(n_rows, n_tokens, seed=n_tokens)
    masks = some_masks(n_rows, n_tokens, seed=n_tokens) if is_masked else None
    arguments = (rows, some_keys(n_rows, n_tokens), some_temperatures(n_rows), masks)
    assert torch.equal(sampling.draw(*arguments), sampling.draw_plainly(*arguments))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_compiled_draws_equal_the_plain_race_on_a_whole_vocabulary(seed: int):
    rows = some_rows(40, 49_152, seed)
    masks = some_masks(40, 49_152, seed) if seed % 2 else None
    arguments = (rows, some_keys(40, seed), some_temperatures(40), masks)
    assert torch.equal(sampling.draw(*arguments), sampling.draw_plainly(*arguments))


def test_the_plain_race_in_parts_is_the_race(monkeypatch: pytest.MonkeyPatch):
    rows, masks, keys = some_rows(20, 50, 1), some_masks(20, 50, 1), some_keys(20)
    whole = sampling.draw_plainly(rows, keys, some_temperatures(20), masks)
    monkeypatch.setattr(sampling, "_TOKENS_AT_ONCE", 170)
    assert torch.equal(sampling.draw_plainly(rows, keys, some_temperatures(20), masks), whole)


def test_the_ceiling_is_never_below_the_score():
    rng = np.random.default_rng(0)
    edges = [0, 1, 2**32, 2**33 - 1, 2**33, 2**34 - 1, 2**63 - 1, 2**63, 2**64 - 2**33, 2**64 - 1]
    small = [(2**64 - 1 - int(rng.integers(2**63))) >> int(rng.integers(64)) for _ in range(500)]
    for bits in map(np.uint64, edges + small):
        for temperature in (1e-30, 0.1, 1.0, 7.0, 1e30):
            for logprob in (0.0, -1e-30, -0.7, -12.3, -300.0, -1e30):
                top = np.float32(-0.1)
                below = min(np.float32(logprob), top)
                score = race._score(below, top, temperature, bits)
                ceiling = race._ceiling(below, top, np.float32(race._SHRINK / temperature), bits)
                with np.errstate(over="ignore"):  # both may be -inf
                    assert ceiling >= np.float32(score) - race._SLACK


def test_the_noise_of_a_token_depends_on_its_key_and_id_only():
    keys = some_keys(5)
    noise = sampling.gumbel_noise(keys, 300)
    assert noise.dtype == torch.float64
    assert noise.isfinite().all()
    assert torch.equal(sampling.gumbel_noise(keys[::-1], 300), noise.flip(0))
    assert torch.equal(sampling.gumbel_noise(keys, 7), noise[:, :7])
    assert torch.equal(sampling.gumbel_noise([keys[3] + 2**64, keys[4] - 2**64], 300), noise[3:])


def test_noise_is_splitmix64():
    # The first outputs for seed 0 in the published C code (Vigna, splitmix64.c).
    outputs = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    expected = [-math.log(-math.log1p(-((o >> 1) + 0.5) * 2.0**-63)) for o in outputs]
    assert sampling.gumbel_noise([0], 3)[0].tolist() == pytest.approx(expected, rel=1e-14)


# A row's draw depends on nothing but the row, its key, its temperature and its mask.


def test_a_row_draws_the_same_token_alone_in_a_batch_and_in_any_order():
    n = 40
    rows, masks, keys, temperatures = some_rows(n, 300, 3), some_masks(n, 300, 3), some_keys(n), some_temperatures(n)
    batch = sampling.draw(rows, keys, temperatures, masks)
    for i in range(n):
        alone = sampling.draw(rows[i : i + 1], keys[i : i + 1], temperatures[i : i + 1], masks[i : i + 1])
        assert alone.item() == batch[i].item()
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    shuffled = sampling.draw(rows[order], [keys[i] for i in order], [temperatures[i] for i in order], masks[order])
    assert torch.equal(shuffled, batch[order])


def test_threads_draw_the_same_tokens_at_once():
    rows, keys = some_rows(30, 3000, 4), some_keys(30)
    expected = sampling.draw(rows, keys)
    with ThreadPoolExecutor(8) as threads:
        for drawn in threads.map(lambda _: sampling.draw(rows, keys), range(64)):
            assert torch.equal(drawn, expected)


def test_rows_shared_among_threads_draw_the_same_tokens(monkeypatch: pytest.MonkeyPatch):
    rows, masks, keys = some_rows(40, 300, 1), some_masks(40, 300, 1), some_keys(40)
    kept = [sampling.Kept(20, 0.9)] * 40

    def everything() -> list[torch.Tensor]:
        filtered = sampling.draw_filtered(rows, list(range(40)), keys, kept, [0.7] * 40, masks)
        return [*filtered, *sampling.top_k(rows, 5)]

    alone = everything()
    monkeypatch.setattr(sampling, "_ROWS_OF_A_THREAD", 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    started = []
    start = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", lambda thread: (started.append(thread), start(thread)))
    for one, other in zip(alone, everything(), strict=True):
        assert torch.equal(one, other)
    assert len(started) == 2 * 3


@pytest.mark.skipif(not team.has_team(), reason="this torch has no OpenMP")
@pytest.mark.parametrize("share", [0.5, 0.02])
def test_draws_by_torchs_threads_are_those_of_one(share: float, monkeypatch: pytest.MonkeyPatch):
    rows, keys = some_rows(40, 3000, 1), some_keys(80)
    of_draw = [i // 2 for i in range(80)]
    masks = [row if i % 3 else None for i, row in enumerate(torch.rand(40, 3000) < share)]
    temperatures = [(0.0, 0.7, 1.0)[i % 3] for i in range(40)]
    of_row = [masks[i] for i in of_draw], [temperatures[i] for i in of_draw]

    def everything() -> list[torch.Tensor]:
        drawn = sampling.draw_with_mass(rows, of_draw, keys, of_row[1], of_row[0])
        each = sampling.draw_with_mass(rows, range(40), keys[:40], temperatures, masks)
        return [*drawn, *each, sampling.draw(rows, keys[:40], temperatures, masks)]

    def by_threads() -> list[torch.Tensor]:
        before = torch.get_num_threads()
        torch.set_num_threads(3)
        try:
            return everything()
        finally:
            torch.set_num_threads(before)

    alone = everything()
    assert torch.equal(alone[0], sampling.draw(rows[of_draw], keys, of_row[1], of_row[0]))
    n_threads = []
    call = team.TeamFunction.__call__
    monkeypatch.setattr(
        team.TeamFunction, "__call__", lambda self, work, n: (n_threads.append(n), call(self, work, n))[1]
    )
    with ThreadPoolExecutor(1) as not_main:
        for one, other in zip(alone, not_main.submit(by_threads).result(), strict=True):
            assert torch.equal(one, other)
    assert n_threads == [3, 3, 3]


def test_a_mask_of_few_tokens_allows_just_those():
    """Also the last token of a word and of the row, whose bits are the highest."""
    rows = some_rows(6, 1000, 1)
    for allowed in ([0], [31], [32, 63, 64], [999], [0, 31, 32, 991, 992, 998, 999], list(range(7, 1000, 9))):
        mask = torch.zeros(1000, dtype=torch.bool)
        mask[allowed] = True
        masks = mask.expand(6, -1)
        expected = torch.where(mask, rows, -math.inf)
        keys = some_keys(6)
        tokens, masses = sampling.draw_with_mass(rows, range(6), keys, None, masks)
        assert torch.equal(tokens, sampling.draw_plainly(rows, keys, None, masks))
        assert torch.allclose(masses, expected.double().logsumexp(1), atol=1e-6)


def test_a_constant_added_to_a_row_changes_no_draw():
    rows = torch.randint(-100, 0, (200, 50), generator=torch.Generator().manual_seed(0)) / 16
    assert torch.equal(sampling.draw(rows + 64.0, some_keys(200)), sampling.draw(rows, some_keys(200)))


def test_a_mask_that_allows_the_drawn_token_changes_nothing():
    n = 200
    rows, masks, keys = some_rows(n, 64, 5), some_masks(n, 64, 5), some_keys(n)
    free = sampling.draw(rows, keys)
    masks[torch.arange(n), free] = True
    assert torch.equal(sampling.draw(rows, keys, None, masks), free)


@pytest.mark.parametrize(
    "view",
    [
        lambda rows: rows.t().contiguous().t(),
        lambda rows: torch.cat([torch.zeros(len(rows), 3), rows, torch.zeros(len(rows), 5)], 1)[:, 3:-5],
        lambda rows: torch.cat([rows, rows])[len(rows) :],
        lambda rows: rows.repeat_interleave(2, 0)[::2],
        lambda rows: rows.double(),
        lambda rows: rows.clone().requires_grad_(),
    ],
)
def test_draws_and_masses_do_not_depend_on_the_layout_of_rows(view):
    rows = some_rows(20, 300, 6)
    assert torch.equal(sampling.draw(view(rows), some_keys(20)), sampling.draw(rows, some_keys(20)))
    assert torch.equal(sampling.log_mass(view(rows)), sampling.log_mass(rows))


def test_one_row_expanded_draws_like_copies_of_it():
    row = some_rows(1, 300, 7)
    drawn = sampling.draw(row.expand(50, 300), some_keys(50))
    assert torch.equal(drawn, sampling.draw(row.repeat(50, 1), some_keys(50)))


def test_half_precision_rows_draw_as_their_float32_copies():
    rows = some_rows(20, 300, 8).bfloat16()
    assert torch.equal(sampling.draw(rows, some_keys(20)), sampling.draw(rows.float(), some_keys(20)))


@pytest.mark.parametrize("n_tokens", [7, 32, 33, 300, 5000])
def test_packed_masks_are_masks(n_tokens: int):
    """Of any number of tokens, from none to all: where few are allowed, only those are looked at."""
    few = n_tokens // race._FEW
    counts = [n for n in (0, 1, 2, few - 1, few, few + 1, n_tokens // 2, n_tokens) if n >= 0]
    n = len(counts) * len(TEMPERATURES)
    rows, keys, temperatures = some_rows(n, n_tokens, 3), some_keys(n), some_temperatures(n)
    generator = np.random.default_rng(n_tokens)
    masks = np.zeros((n, n_tokens), np.bool_)
    taken = set()
    for i, count in enumerate(counts * len(TEMPERATURES)):
        masks[i, generator.permutation(n_tokens)[:count]] = True
        scratch, listed = np.empty(n_tokens, np.float32), np.empty(few, np.int64)
        n_listed = race._mask_row(rows[i].numpy(), pack(masks[i]), scratch, listed)
        assert n_listed == (count if count <= few else -1)
        taken.add(n_listed >= 0)
    assert taken == {True, False}
    packed = [PackedMask.of(mask) for mask in masks]
    expected = sampling.draw_plainly(rows, keys, temperatures, masks)
    assert torch.equal(sampling.draw_plainly(rows, keys, temperatures, packed), expected)
    assert torch.equal(sampling.draw(rows, keys, temperatures, packed), expected)
    allowed = rows.masked_fill(~torch.from_numpy(masks), -math.inf)
    found = sampling.log_mass(rows, packed)
    assert torch.allclose(found, allowed.double().logsumexp(1), rtol=0, atol=1e-6)
    tokens, masses = sampling.draw_with_mass(rows, range(n), keys, temperatures, packed)
    assert torch.equal(tokens, expected) and torch.equal(masses, sampling.log_mass(rows, packed, temperatures))
    kept = [sampling.Kept(top_p=0.9)] * n
    of_packed = sampling.draw_filtered(rows, range(n), keys, kept, None, packed)
    of_bools = sampling.draw_filtered(rows, range(n), keys, kept, None, list(masks))
    assert all(torch.equal(a, b) for a, b in zip(of_packed, of_bools, strict=True))


@pytest.mark.parametrize("n_allowed", [2, 200])
def test_what_a_mask_forbids_may_be_anything(n_allowed: int):
    rows = torch.full((1, 300), math.nan)
    rows[0, :n_allowed] = math.log(1 / n_allowed)
    mask = PackedMask.of(np.arange(300) < n_allowed)
    assert 0 <= sampling.draw(rows, [5], None, [mask]).item() < n_allowed
    assert sampling.log_mass(rows, [mask]).item() == pytest.approx(0.0, abs=1e-6)
    rows[0, 1] = math.nan
    assert sampling.draw(rows, [5], None, [mask]).item() == -1
    assert math.isnan(sampling.log_mass(rows, [mask]).item())


def test_a_packed_mask_of_another_vocabulary_is_refused():
    mask = PackedMask.of(np.ones(5, np.bool_))
    with pytest.raises(InvalidQuery, match="of 5 tokens; expected 6"):
        sampling.draw(torch.zeros(1, 6), [1], None, [mask])
    with pytest.raises(InvalidQuery, match="one packed mask was given for 1 rows"):
        sampling.draw(torch.zeros(1, 5), [1], None, mask)  # type: ignore[arg-type]


def test_masks_may_be_one_table_or_one_per_row():
    n = 12
    rows, masks, keys = some_rows(n, 100, 9), some_masks(n, 100, 9), some_keys(n)
    shared = masks[0].numpy()
    shared.flags.writeable = False
    mixed = [None if i % 3 == 0 else shared if i % 3 == 1 else masks[i] for i in range(n)]
    table = torch.stack(
        [
            torch.ones(100, dtype=torch.bool) if m is None else torch.as_tensor(masks[0] if m is shared else m)
            for m in mixed
        ]
    )
    for draw in (sampling.draw, sampling.draw_plainly):
        expected = draw(rows, keys, None, table)
        assert torch.equal(draw(rows, keys, None, mixed), expected)
        assert torch.equal(draw(rows, keys, None, table.numpy()), expected)
        assert torch.equal(draw(rows, keys, None, table.t().contiguous().t()), expected)
        assert torch.equal(draw(rows, keys, None, table.numpy()[::-1, ::-1].copy()[::-1, ::-1]), expected)
        assert torch.equal(draw(rows[:1], keys[:1], None, table.numpy()[:1][::-1]), expected[:1])
        assert torch.equal(draw(rows, keys, None, [None] * n), draw(rows, keys))


def test_bits_of_a_mask_beyond_the_last_token_are_nobodys():
    mask = PackedMask(np.array([1, 1 << 31 | 1 << 7], np.uint32), 40)
    rows = some_rows(9, 40, 1)
    assert set(sampling.draw(rows, some_keys(9), None, [mask] * 9).tolist()) <= {0, 39}


@pytest.mark.slow
def test_a_forked_process_draws_the_same_tokens():
    output = run_python(
        """
        import os, sys, torch
        from genlm_backend import sampling
        rows = torch.randn(200, 20_000, generator=torch.Generator().manual_seed(0))
        keys = [sampling.draw_key(0, (i,)) for i in range(200)]
        parent = sampling.draw(rows, keys).tolist(), sampling.log_mass(rows).tolist()
        torch.mm(rows, rows.t())  # the parent's thread pool exists, and is missing in the child
        pid = os.fork()
        if pid == 0:
            child = sampling.draw(rows, keys).tolist(), sampling.log_mass(rows).tolist()
            os._exit(0 if child == parent else 3)
        sys.stdout.write(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))
        """
    )
    assert output == "0"


@pytest.mark.slow
def test_importing_does_not_load_the_compiler_and_drawing_does():
    output = run_python(
        """
        import sys, torch
        from genlm_backend import sampling
        before = "numba" in sys.modules
        sampling.draw_key(0), sampling.keep_top_k(torch.zeros(3), 2), sampling.draw_plainly(torch.zeros(1, 3), [0])
        between = "numba" in sys.modules
        sampling.draw(torch.zeros(1, 3), [0])
        sys.stdout.write(str((before, between, "numba" in sys.modules)))
        """
    )
    assert output == "(False, False, True)"


@pytest.mark.slow
def test_draws_work_where_no_folder_can_be_written(tmp_path: Path):
    package = tmp_path / "genlm_backend"
    package.mkdir()
    for name in ("race.py", "sampling.py", "errors.py"):
        shutil.copy(PACKAGE / name, package)
    (package / "__pycache__").write_text("a file, so that no folder can be made here, even by root")
    (tmp_path / "home").write_text("likewise")
    no_home = {"HOME": str(tmp_path / "home" / "x"), "XDG_CACHE_HOME": str(tmp_path / "home" / "x")}
    output = run_python(
        """
        import sys, torch
        from genlm_backend import race, sampling, team
        assert race._draw_row._cache.__class__.__name__ == "NullCache"
        rows = torch.randn(50, 2_000, generator=torch.Generator().manual_seed(0))
        sys.stdout.write(str(torch.equal(sampling.draw(rows, range(50)), sampling.draw_plainly(rows, range(50)))))
        """,
        folder=tmp_path,
        PYTHONDONTWRITEBYTECODE="1",
        **no_home,
    )
    assert output == "True"


def run_python(program: str, folder: Path = PACKAGE.parent, **environment: str) -> str:
    """What a program prints, run in a fresh interpreter with the package of that folder."""
    lines = [line.removeprefix("        ") for line in program.strip("\n").splitlines()]
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), **environment},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_draws_the_tokens_of_the_cpu():
    n = 200
    rows, masks, keys, temperatures = (
        some_rows(n, 5000, 10),
        some_masks(n, 5000, 10),
        some_keys(n),
        some_temperatures(n),
    )
    drawn = sampling.draw(rows.cuda(), keys, temperatures, masks.cuda())
    assert drawn.device.type == "cuda"
    assert torch.equal(drawn.cpu(), sampling.draw(rows, keys, temperatures, masks))
    masses = sampling.log_mass(rows.cuda(), masks.cuda())
    assert torch.allclose(masses.cpu(), sampling.log_mass(rows, masks), rtol=0, atol=2e-6)


# Exact cases of draws.

BOTH = pytest.mark.parametrize("draw", [sampling.draw, sampling.draw_plainly])


@BOTH
def test_temperature_zero_takes_the_lowest_of_the_most_probable(draw):
    rows = torch.tensor([[-2.0, -1.0, -3.0, -1.0], [-1.0, -1.0, -1.0, -1.0], [-9.0, -9.0, -9.0, -1.0]])
    for keys in ([1, 2, 3], [4, 5, 6]):
        assert draw(rows, keys, [0.0] * 3).tolist() == [1, 0, 3]
        assert draw(rows, keys, [1e-31] * 3).tolist() == [1, 0, 3]
    masks = torch.tensor([[True, False, True, True], [False, False, True, True], [True, True, False, False]])
    assert draw(rows, [1, 2, 3], [0.0] * 3, masks).tolist() == [3, 2, 0]


@BOTH
@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 1e20])
def test_the_only_possible_token_is_drawn(draw, temperature: float):
    rows = torch.full((300, 300), -math.inf).fill_diagonal_(-700.0)
    assert draw(rows, range(300), [temperature] * 300).tolist() == list(range(300))
    masks = torch.eye(300, dtype=torch.bool)
    assert draw(some_rows(300, 300, 1).clamp(min=-1e30), range(300), [temperature] * 300, masks).tolist() == list(
        range(300)
    )


@BOTH
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_without_a_possible_token_are_marked_and_harm_no_other(draw, temperature: float):
    negative_nan = torch.tensor(-1, dtype=torch.int32).view(torch.float32).item()
    assert math.isnan(negative_nan)
    rows = torch.tensor(
        [
            [-1.0, -1.0, -1.0],
            [-math.inf, -math.inf, -math.inf],
            [-math.inf, -1.0, -1.0],
            [-1.0, math.nan, -1.0],
            [-1.0, negative_nan, -1.0],
            [-1.0, math.inf, -1.0],
            [-1.0, math.nan, -1.0],
        ]
    )
    no = torch.zeros(3, dtype=torch.bool)
    masks = [None, None, torch.tensor([True, False, False]), None, None, None, torch.tensor([True, False, False])]
    drawn = draw(rows, range(7), [temperature] * 7, masks).tolist()
    assert drawn[1:] == [-1, -1, -1, -1, -1, 0]
    assert drawn[0] >= 0
    assert draw(rows[:1], [0], None, [no]).tolist() == [-1]


@BOTH
def test_no_rows_and_no_tokens(draw):
    assert draw(torch.empty(0, 5), []).shape == (0,)
    assert draw(torch.empty(0, 5), [], [], []).dtype == torch.int64
    assert draw(torch.empty(2, 0), [1, 2]).tolist() == [-1, -1]
    assert draw(torch.empty(2, 0), [1, 2], None, torch.empty(2, 0, dtype=torch.bool)).tolist() == [-1, -1]


@BOTH
def test_draws_change_no_argument(draw):
    rows, masks, keys, temperatures = some_rows(9, 40, 2), some_masks(9, 40, 2), some_keys(9), [0.5] * 9
    copies = rows.clone(), masks.clone(), list(keys)
    draw(rows, keys, temperatures, masks)
    draw(rows, keys, temperatures, [masks[0]] * 9)
    assert torch.equal(rows, copies[0])
    assert torch.equal(masks, copies[1])
    assert keys == copies[2]
    assert temperatures == [0.5] * 9


@BOTH
@pytest.mark.parametrize(
    ("rows", "keys", "temperatures", "masks"),
    [
        (torch.zeros(3), [1], None, None),
        (torch.zeros(1, 3, dtype=torch.int64), [1], None, None),
        (torch.zeros(1, 3), [1, 2], None, None),
        (torch.zeros(1, 3), [1], [1.0, 1.0], None),
        (torch.zeros(1, 3), [1], [-0.1], None),
        (torch.zeros(1, 3), [1], [math.nan], None),
        (torch.zeros(1, 3), [1], [math.inf], None),
        (torch.zeros(1, 3), [1], None, torch.ones(3, dtype=torch.bool)),
        (torch.zeros(1, 3), [1], None, torch.ones(1, 3)),
        (torch.zeros(1, 3), [1], None, [torch.ones(4, dtype=torch.bool)]),
        (torch.zeros(1, 3), [1], None, [None, None]),
    ],
)
def test_arguments_that_do_not_fit_are_refused(draw, rows, keys, temperatures, masks):
    with pytest.raises(InvalidQuery):
        draw(rows, keys, temperatures, masks)


# Masses.


@pytest.mark.parametrize("n_tokens", [*EDGE_SIZES, 4097])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 3.0])
def test_masses_equal_the_sums_in_float64(n_tokens: int, temperature: float):
    rows, masks = some_rows(60, n_tokens, n_tokens), some_masks(60, n_tokens, n_tokens)
    for some in (None, masks):
        allowed = rows if some is None else rows.masked_fill(~some, -math.inf)
        expected = (allowed.double() / temperature).logsumexp(1)
        masses = sampling.log_mass(rows, some, [temperature] * 60)
        assert masses.dtype == torch.float64
        torch.testing.assert_close(masses, expected, rtol=1e-14, atol=1e-6)
        plain = sampling._log_mass_plainly(allowed, np.full(60, temperature))
        torch.testing.assert_close(plain, expected, rtol=1e-14, atol=1e-12)


def test_the_masses_of_a_mask_and_of_its_complement_sum_to_one():
    rows, masks = (
        torch.randn(50, 3000, generator=torch.Generator().manual_seed(0)).log_softmax(1),
        some_masks(50, 3000, 0),
    )
    total = sampling.log_mass(rows, masks).logaddexp(sampling.log_mass(rows, ~masks))
    assert total.abs().max() < 1e-6


def test_masses_do_not_depend_on_the_batch():
    rows, masks = some_rows(30, 3000, 11), some_masks(30, 3000, 11)
    batch = sampling.log_mass(rows, masks)
    for i in range(30):
        assert torch.equal(sampling.log_mass(rows[i : i + 1], masks[i : i + 1]), batch[i : i + 1])


def test_masses_at_the_edges():
    rows = torch.tensor([[-math.inf, -math.inf], [-1.0, math.nan], [-700.0, -math.inf], [-1.0, -2.0]])
    masses = sampling.log_mass(rows, [None, None, None, torch.zeros(2, dtype=torch.bool)]).tolist()
    assert masses[0] == -math.inf
    assert math.isnan(masses[1])
    assert masses[2] == -700.0
    assert masses[3] == -math.inf
    assert sampling.log_mass(torch.empty(0, 3)).shape == (0,)
    assert sampling.log_mass(torch.empty(2, 0)).tolist() == [-math.inf] * 2


def test_masses_at_temperature_zero_are_the_limit():
    rows = torch.tensor([[0.0, -math.inf], [-1.0, -2.0], [1.0, 0.0], [math.nan, 0.0]])
    for masses in (sampling.log_mass(rows, None, [0.0] * 4), sampling._log_mass_plainly(rows, np.zeros(4))):
        assert masses.tolist()[:3] == [0.0, -math.inf, math.inf]
        assert math.isnan(masses[3])


def test_a_draw_has_the_log_probability_that_the_mass_gives():
    rows, masks = some_rows(20, 50, 12), some_masks(20, 50, 12)
    allowed = rows.masked_fill(~masks, -math.inf).double() / 0.7
    log_q = rows.double() / 0.7 - sampling.log_mass(rows, masks, [0.7] * 20)[:, None]
    is_possible = allowed > -math.inf
    assert torch.allclose(log_q[is_possible], allowed.log_softmax(1)[is_possible], atol=2e-6)


def test_draws_of_repeated_rows_are_those_of_the_rows_written_out():
    rows, some = some_rows(4, 300, 13), list(some_masks(3, 300, 13))
    row_of_draw = [2, 0, 2, 2, 3, 0, 2]
    masks = [some[0], None, some[0], some[1], some[2].numpy(), None, some[0]]
    temperatures = [1.0, 0.7, 1.0, 1.0, 0.0, 0.7, 2.0]
    keys = [7, 1, 2, 3, 4, 5, 6]
    written_out = rows[row_of_draw]
    tokens, masses = sampling.draw_with_mass(rows, row_of_draw, keys, temperatures, masks)
    assert torch.equal(tokens, sampling.draw(written_out, keys, temperatures, masks))
    assert torch.equal(masses, sampling.log_mass(written_out, masks, temperatures))
    assert len(set(masses.tolist())) == 5  # equal only where row, mask and temperature are


def test_draws_of_rows_that_are_not_there_are_refused():
    with pytest.raises(InvalidQuery, match="expected 0 to 1"):
        sampling.draw_with_mass(torch.zeros(2, 3), [0, 2], [1, 2])
    with pytest.raises(InvalidQuery, match="1 keys for 2 rows"):
        sampling.draw_with_mass(torch.zeros(2, 3), [0, 1], [1])


# Temperature, top-k, top-p, min-p.

INF = math.inf
ROW = torch.tensor([0.1, 0.4, 0.2, 0.2, 0.1]).log()
FILTERS = {
    "temperature": lambda x: sampling.with_temperature(x, 0.5),
    "temperature 0": lambda x: sampling.with_temperature(x, 0.0),
    "temperature 1e-40": lambda x: sampling.with_temperature(x, 1e-40),
    "temperature 1e300": lambda x: sampling.with_temperature(x, 1e300),
    "top-k": lambda x: sampling.keep_top_k(x, 3),
    "top-k of all": lambda x: sampling.keep_top_k(x, 1000),
    "top-p": lambda x: sampling.keep_top_p(x, 0.7),
    "top-p of all": lambda x: sampling.keep_top_p(x, 1.0),
    "min-p": lambda x: sampling.keep_min_p(x, 0.5),
    "min-p of all": lambda x: sampling.keep_min_p(x, 0.0),
}
EACH_FILTER = pytest.mark.parametrize("apply", FILTERS.values(), ids=FILTERS.keys())


@pytest.mark.parametrize(
    ("filtered", "expected"),
    [
        (sampling.with_temperature(ROW, 1.0), [0.1, 0.4, 0.2, 0.2, 0.1]),
        (sampling.with_temperature(ROW, 0.5), [1 / 26, 16 / 26, 4 / 26, 4 / 26, 1 / 26]),
        (sampling.with_temperature(ROW, 0.0), [0, 1, 0, 0, 0]),
        (sampling.with_temperature(ROW, 1e30), [0.2] * 5),
        (sampling.with_temperature(torch.tensor([-1.0, -INF, -1.0]), 0.0), [1, 0, 0]),
        (sampling.with_temperature(torch.tensor([-1.0, -INF, -1.0]), 1e300), [0.5, 0, 0.5]),
        (sampling.keep_top_k(ROW, 1), [0, 1, 0, 0, 0]),
        (sampling.keep_top_k(ROW, 2), [0, 2 / 3, 1 / 3, 0, 0]),
        (sampling.keep_top_k(ROW, 3), [0, 0.5, 0.25, 0.25, 0]),
        (sampling.keep_top_k(ROW, 4), [1 / 9, 4 / 9, 2 / 9, 2 / 9, 0]),
        (sampling.keep_top_k(ROW, 5), [0.1, 0.4, 0.2, 0.2, 0.1]),
        (sampling.keep_top_k(ROW, 9), [0.1, 0.4, 0.2, 0.2, 0.1]),
        (sampling.keep_top_k(torch.tensor([-INF, -1.0, -INF, -INF]), 2), [0, 1, 0, 0]),
        (sampling.keep_top_p(ROW, 1e-9), [0, 1, 0, 0, 0]),
        (sampling.keep_top_p(ROW, 0.39), [0, 1, 0, 0, 0]),
        (sampling.keep_top_p(ROW, 0.41), [0, 2 / 3, 1 / 3, 0, 0]),
        (sampling.keep_top_p(ROW, 0.7), [0, 0.5, 0.25, 0.25, 0]),
        (sampling.keep_top_p(ROW, 0.85), [1 / 9, 4 / 9, 2 / 9, 2 / 9, 0]),
        (sampling.keep_top_p(ROW, 1.0), [0.1, 0.4, 0.2, 0.2, 0.1]),
        (sampling.keep_top_p(ROW + 5.0, 0.41), [0, 2 / 3, 1 / 3, 0, 0]),
        (sampling.keep_min_p(ROW, 0.0), [0.1, 0.4, 0.2, 0.2, 0.1]),
        (sampling.keep_min_p(ROW, 0.24), [0.1, 0.4, 0.2, 0.2, 0.1]),
        (sampling.keep_min_p(ROW, 0.26), [0, 0.5, 0.25, 0.25, 0]),
        (sampling.keep_min_p(ROW, 0.51), [0, 1, 0, 0, 0]),
        (sampling.keep_min_p(torch.tensor([-1.0, -2.0, -1.0]), 1.0), [0.5, 0, 0.5]),
    ],
)
def test_filters_on_a_row_by_hand(filtered: torch.Tensor, expected: list[float]):
    assert filtered.exp().tolist() == pytest.approx(expected, abs=1e-6)


@EACH_FILTER
def test_filters_give_normalised_float32_rows_of_the_same_shape_and_change_nothing(apply):
    rows = some_rows(24, 40, 13).reshape(2, 3, 4, 40)
    copy = rows.clone()
    filtered = apply(rows)
    assert torch.equal(rows, copy)
    assert filtered.shape == rows.shape
    assert filtered.dtype == torch.float32
    assert filtered.data_ptr() != rows.data_ptr()
    is_dead = (rows == -INF).all(-1)
    assert (filtered[is_dead] == -INF).all()
    assert filtered[~is_dead].double().logsumexp(-1).abs().max() < 1e-6
    assert (filtered[rows == -INF] == -INF).all()


@EACH_FILTER
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_filters_take_any_float_and_rows_alone(apply, dtype: torch.dtype):
    rows = some_rows(6, 20, 14).to(dtype)
    filtered = apply(rows)
    assert filtered.dtype == torch.float32
    for row, expected in zip(rows, filtered, strict=True):
        assert torch.equal(apply(row), expected)


@EACH_FILTER
def test_filters_of_rows_without_a_possible_token_or_without_a_token(apply):
    assert torch.equal(apply(torch.full((2, 5), -INF)), torch.full((2, 5), -INF))
    assert apply(torch.empty(0, 5)).shape == (0, 5)
    assert apply(torch.empty(2, 0)).shape == (2, 0)


@pytest.mark.thorough
@given(
    row=st.lists(st.sampled_from([-INF, -5.0, -1.0, -0.5, 0.0, 2.0]), min_size=1, max_size=12),
    k=st.integers(1, 14),
    p=st.floats(0.001, 1.0),
    min_p=st.floats(0.0, 1.0),
)
def test_filters_agree_with_a_plain_loop(row: list[float], k: int, p: float, min_p: float):
    best_first = sorted((i for i in range(len(row)) if row[i] > -INF), key=lambda i: (-row[i], i))
    total = sum(math.exp(row[i]) for i in best_first)
    masses = [math.exp(row[i]) / total for i in best_first]
    logprobs = torch.tensor(row)

    def kept(filtered: torch.Tensor) -> list[int]:
        return sorted(i for i in range(len(row)) if filtered[i] > -INF)

    assert kept(sampling.keep_top_k(logprobs, k)) == sorted(best_first[:k])
    before = [sum(masses[:i]) for i in range(len(masses))]
    if all(abs(mass - p) > 1e-9 for mass in before) or p == 1.0:
        assert kept(sampling.keep_top_p(logprobs, p)) == sorted(
            i for i, mass in zip(best_first, before, strict=True) if mass < p or p == 1.0
        )
    ratios = [mass / masses[0] for mass in masses]
    if all(abs(ratio - min_p) > 1e-9 or ratio == 1.0 for ratio in ratios):
        assert kept(sampling.keep_min_p(logprobs, min_p)) == sorted(
            i for i, ratio in zip(best_first, ratios, strict=True) if ratio >= min_p
        )


@pytest.mark.parametrize(
    "refused",
    [
        lambda: sampling.with_temperature(ROW, -1.0),
        lambda: sampling.with_temperature(ROW, math.nan),
        lambda: sampling.with_temperature(ROW, math.inf),
        lambda: sampling.keep_top_k(ROW, 0),
        lambda: sampling.keep_top_k(ROW, 2.0),
        lambda: sampling.keep_top_p(ROW, 0.0),
        lambda: sampling.keep_top_p(ROW, 1.1),
        lambda: sampling.keep_top_p(ROW, math.nan),
        lambda: sampling.keep_min_p(ROW, -0.1),
        lambda: sampling.keep_min_p(ROW, 1.1),
        lambda: sampling.keep_min_p(ROW, math.nan),
        lambda: sampling.keep_top_k(torch.arange(3), 1),
        lambda: sampling.keep_top_k(torch.tensor(0.0), 1),
    ],
)
def test_filters_refuse_numbers_that_have_no_meaning(refused):
    with pytest.raises(InvalidQuery):
        refused()


def test_prepare_compiles_what_later_draws_use() -> None:
    sampling.prepare()
    kernels = (race.draw_filtered, race._draw_groups, race.log_mass_rows)
    made = (race._draw_by_team, race._normalize_by_team)
    n_before = [len(kernel.signatures) for kernel in kernels]
    assert all(n_before) and all(one.cache_info().currsize == 1 for one in made)
    rows = torch.randn(3, 100).log_softmax(-1)
    sampling.draw(rows, [1, 2, 3], [1.0, 0.5, 0.0], [None, torch.ones(100, dtype=torch.bool), None])
    sampling.log_mass(rows)
    some = [None, torch.ones(100, dtype=torch.bool), None]
    sampling.draw_filtered(rows, [0, 1, 2], [1, 2, 3], [sampling.Kept(5)] * 3, [1.0, 0.5, 0.0], some)
    sampling.draw_with_mass(rows, [0, 0, 2], [1, 2, 3], [1.0, 0.5, 0.0], some)
    assert [len(kernel.signatures) for kernel in kernels] == n_before


@pytest.mark.parametrize("n_tokens", [64, 1000, 4100])
def test_the_best_tokens_are_those_of_a_stable_sort(n_tokens):
    rows = torch.randn(7, n_tokens, generator=torch.Generator().manual_seed(0)).bfloat16().float()  # many equals
    rows[1] = -math.inf
    rows[1, -3:] = torch.tensor([-1.0, -3.0, -2.0])
    rows[2, ::2] = -math.inf
    wide = torch.cat([rows, rows], 1)[:, :n_tokens]  # cut out of wider rows
    ordered = rows.sort(dim=1, descending=True, stable=True)
    for k in (1, 3, 50, n_tokens):
        for some in (rows, wide, rows.bfloat16()):
            token_ids, values = sampling.top_k(some, k)
            assert torch.equal(token_ids, ordered.indices[:, :k]) and torch.equal(values, ordered.values[:, :k])
        alone = torch.cat([sampling.top_k(row[None], k)[0] for row in rows])
        assert torch.equal(alone, token_ids)


@pytest.mark.parametrize("k", [1, 3, 50, 300])
def test_top_k_where_rows_are_not_on_the_cpu_keeps_the_same_tokens(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    rows = torch.randint(-4, 0, (7, 300), generator=generator).float()  # many equals
    rows[0] = -INF
    rows[1, 5:] = -INF
    token_ids, values = sampling._top_k_plainly(rows, k)
    want_ids, want = sampling.top_k(rows, k)
    assert token_ids.tolist() == want_ids.tolist()
    assert values.tolist() == want.tolist()


@pytest.mark.parametrize("k", [0, -1, 9, 10**6, 2.0, True, None])
def test_a_k_that_does_not_fit_is_refused(k: Any) -> None:
    with pytest.raises(InvalidQuery, match=f"k={k}"):
        sampling.top_k(torch.zeros(2, 8), k)


@pytest.mark.parametrize("k", [3, np.int64(3), np.uint8(3)])
def test_a_k_may_be_an_integer_of_numpy(k: int) -> None:
    rows = some_rows(2, 50, 0)
    assert all(map(torch.equal, sampling.top_k(rows, k), sampling.top_k(rows, 3)))
    assert torch.equal(sampling.keep_top_k(rows, k), sampling.keep_top_k(rows, 3))
    drawn = [sampling.draw_filtered(rows, [0, 1], [1, 2], [sampling.Kept(some_k)] * 2) for some_k in (k, 3)]
    assert all(map(torch.equal, *drawn))
