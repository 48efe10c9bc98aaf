"""The logits of a step, by request: vLLM's official interface of logits processors, for both of its runners."""

from __future__ import annotations

from typing import Any

import torch

SLOT = "genlm_slot"
"""Key in `SamplingParams.extra_args` of the name under which a request's row is found."""


class Captured:
    """Where the processor leaves the logits of the last step.

    Attributes:
        logits: `(rows, n_logits)` float32, on the engine's device; None before the first step.
        rows: Row of each request of that step. vLLM moves rows as requests come and go, so that a position says
            nothing; a request that has not computed all its tokens has a row, too, of no use.
    """

    def __init__(self) -> None:
        self.logits: torch.Tensor | None = None
        self.rows: dict[str, int] = {}

    def clear(self) -> None:
        """Forget the last step."""
        self.logits, self.rows = None, {}


def processor_class(captured: Captured) -> type[Any]:
    """A logits processor that leaves what it sees in `captured`; one class for both runners, whichever vLLM takes."""
    from vllm.v1.sample.logits_processor import LogitsProcessor as ForV1

    bases: tuple[type[Any], ...] = (ForV1,)
    try:
        from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as ForV2
    except ImportError:  # before vLLM 0.32 only the V1 runner takes processors
        pass
    else:
        bases = (ForV1, ForV2)
    return type("GenlmCapture", (_Processor, *bases), {"captured": captured})


class _Processor:
    """Both interfaces: `update_state` and `apply(logits)` of V1; `add_request` and `apply(logits, context)` of V2."""

    captured: Captured

    def __init__(self, vllm_config: Any, *of_runner: Any) -> None:
        self._slots: dict[int, str | None] = {}  # V1: row -> name; V2: place in the request states -> name

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Nothing to check."""

    def is_argmax_invariant(self) -> bool:
        """No: otherwise vLLM would leave it out where all requests are greedy."""
        return False

    # ---- V1

    def update_state(self, batch_update: Any) -> None:
        """Follow the rows of the persistent batch: removed, then added, then moved, as vLLM asks."""
        if batch_update is None:
            return
        slots = self._slots
        for row in batch_update.removed:
            slots.pop(row, None)
        for row, params, *_ in batch_update.added:
            slots[row] = (params.extra_args or {}).get(SLOT)
        for source, to, direction in batch_update.moved:
            moved, swapped = slots.pop(source, None), slots.pop(to, None)
            if direction.name == "SWAP" and swapped is not None:
                slots[source] = swapped
            if moved is not None:
                slots[to] = moved

    # ---- V2

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Note the name of the request at a place; True: its logits are wanted."""
        self._slots[req_idx] = (sampling_params.extra_args or {}).get(SLOT)
        return True

    def apply_staged_writes(self) -> None:
        """Nothing is staged."""

    # ---- both

    def apply(self, logits: torch.Tensor, context: Any = None) -> torch.Tensor:
        """Keep the logits, and give vLLM's sampler what costs it least."""
        captured = self.captured
        if context is None:
            captured.logits = logits
            captured.rows = {name: row for row, name in self._slots.items() if name is not None and row < len(logits)}
            # Its token is dropped, so it need not search 49,152 columns for the largest.
            return logits.new_zeros((len(logits), 1))
        # V2's sampler goes on to change these logits in place, and wants all columns.
        captured.logits = logits.clone()
        names = [self._slots.get(int(place)) for place in context.idx_mapping_np]
        captured.rows = {name: row for row, name in enumerate(names) if name is not None}
        return logits
