"""This package on vLLM: each particle asks for a drawn token, `llm.query(ids, Draw(key))`, of a live request."""

from __future__ import annotations

import genlm_backend
from benchmark.peers.ours import Ours
from benchmark.worker import serve
from benchmark.workloads import VLLM_OPTIONS


class OursVllm(Ours):
    def __init__(self, model_path: str) -> None:
        self.llm = genlm_backend.load_model_by_name(model_path, backend="vllm", llm_opts={"engine_opts": VLLM_OPTIONS})
        assert self.llm.transport == "live", self.llm.transport


if __name__ == "__main__":
    serve(OursVllm)
