"""Seeded workloads: particles that all start from one prompt and each grow by a number of tokens."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

DTYPE = os.environ.get("BENCHMARK_DTYPE", "bfloat16")  # of every peer; workers are told by `benchmark.machine.dtype`

# English of more than 256 tokens; repeated where a prompt is longer. What the tokens are hardly matters to the speed,
# but how peaked the rows are does: natural text makes them as they are in use.
TEXT = (
    "Montreal is the largest city of the province of Quebec and the second largest of Canada. It lies on an island "
    "where the Ottawa River meets the Saint Lawrence, and takes its name from Mount Royal, the hill in its middle. "
    "Fur traders, priests and soldiers came first; in the nineteenth century the canal, the railway and the harbour "
    "made it a place of mills, banks and shipyards. French is the language of its streets, but a visitor hears "
    "English, Italian, Arabic, Spanish, Creole and Portuguese within an hour's walk. Winters are long, with snow from "
    "December to March, and people move about in tunnels that join the stations of the underground railway; in summer "
    "the parks are full until late, and there is a festival nearly every week. The city has four universities, and "
    "its laboratories are known for their work on medicine, aerospace and machine learning. Bread rings boiled in "
    "honey water and baked over wood, smoked meat on rye, and fried potatoes under cheese and gravy are what it is "
    "known for at table. On a clear day the view from the mountain reaches past the river and the bridges to the "
    "hills of Vermont and New York. Many of the houses have their stairs outside, because the builders of a hundred "
    "years ago wanted to save the room, and neighbours still meet on them on the first warm evening of the year."
)


class Cell(NamedTuple):
    """So many particles, from a prompt of so many tokens; written `10x256`."""

    n_particles: int
    n_prompt: int

    def __str__(self) -> str:
        return f"{self.n_particles}x{self.n_prompt}"


CELLS = (Cell(1, 3), Cell(10, 3), Cell(10, 256), Cell(50, 3), Cell(50, 256))


# The same engine for each peer on vLLM: what `AsyncVirtualLM` takes on a CPU where nothing is said.
VLLM_OPTIONS: dict[str, Any] = {
    "dtype": DTYPE,
    "enforce_eager": True,
    "block_size": 32,
    "max_num_seqs": 256,
    "max_model_len": 1024,
    "kv_cache_memory_bytes": 2**30,
    "enable_prefix_caching": True,
}


class Workload(NamedTuple):
    """What a worker is asked to do once.

    Attributes:
        prompt_ids: Token ids of the prompt, the same for each particle and each peer.
        n_particles: How many particles.
        n_steps: How many tokens each of them grows; none of them stops earlier.
        seed: Of the draws.
        limit_s: Seconds after which texts are left as they are, where the peer can; None: never.
    """

    prompt_ids: list[int]
    n_particles: int
    n_steps: int
    seed: int
    limit_s: float | None = None


def parse_cells(text: str) -> list[Cell]:
    """Cells from `10x3,50x256`.

    Raises:
        ValueError: It is not written so.
    """
    cells = []
    for part in text.split(","):
        numbers = part.strip().split("x")
        if len(numbers) != 2 or not all(number.isdecimal() and int(number) > 0 for number in numbers):
            raise ValueError(f"{part!r} is no cell; expected particles x prompt tokens, such as 10x256")
        cells.append(Cell(int(numbers[0]), int(numbers[1])))
    return cells


def prompt_ids(encode: Callable[[str], list[int]], n_tokens: int) -> list[int]:
    """The first so many tokens of the text, over and over if it is too short."""
    ids = encode(TEXT)
    return (ids * (n_tokens // len(ids) + 1))[:n_tokens]


def make_workload(encode: Callable[[str], list[int]], cell: Cell, n_steps: int, seed: int) -> Workload:
    """The workload of a cell; equal arguments give equal workloads."""
    return Workload(prompt_ids(encode, cell.n_prompt), cell.n_particles, n_steps, seed)


def from_json(fields: dict[str, Any]) -> Workload:
    """The workload whose `_asdict()` this is."""
    return Workload(**fields)
