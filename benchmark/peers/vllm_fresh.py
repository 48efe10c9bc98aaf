"""vLLM with a new request for each particle and step, on its prefix cache: what a stateless caller does.

The same code as `ours_vllm` with another transport, so that nothing but the kind of request differs.
"""

from __future__ import annotations

import genlm_backend
from benchmark.peers.ours import Ours
from benchmark.worker import serve
from benchmark.workloads import VLLM_OPTIONS


class VllmFresh(Ours):
    def __init__(self, model_path: str) -> None:
        from genlm_backend.llm.vllm.transports import Fresh

        self.llm = genlm_backend.load_model_by_name(model_path, backend="vllm", llm_opts={"engine_opts": VLLM_OPTIONS})
        self.llm._engine.use(Fresh)


if __name__ == "__main__":
    serve(VllmFresh)
