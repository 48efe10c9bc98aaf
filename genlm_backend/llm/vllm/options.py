"""The options of vLLM's engine: which ones cannot be used here, and what is taken where nothing is said."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import psutil

from genlm_backend.errors import InvalidEngineOption

MAX_NUM_SEQS = 256  # live requests; as many as AsyncTransformer takes in a batch
CPU_BLOCK_SIZE = 32  # the smallest that vLLM's attention on CPU likes: what a fork or an evicted context loses is less
_IN_PROCESS = "rows leave the engine inside its own process, where the logits of one worker are; "
_GREATEST_ONE = {
    "tensor_parallel_size": _IN_PROCESS + "use one device, or run one engine per device",
    "pipeline_parallel_size": _IN_PROCESS + "use one device",
    "data_parallel_size": _IN_PROCESS + "run one engine per device",
    "decode_context_parallel_size": _IN_PROCESS + "use one device",
    "prefill_context_parallel_size": _IN_PROCESS + "use one device",
}
_REFUSED = {
    "model": "it is the first argument of from_name; leave the option out",
    "tokenizer": "the tokenizer is the one of the model; leave the option out",
    "logits_processors": "the engine's own processor takes the logits; use queries and masks instead",
    "speculative_config": "vLLM takes no logits processor beside speculative decoding; leave the option out",
    "scheduler_cls": "live requests are kept through vLLM's own scheduler; leave the option out",
}


def checked_options(options: Mapping[str, Any], *, is_cpu: bool) -> dict[str, Any]:
    """Options for `vllm.EngineArgs`: those given, and defaults where nothing is said.

    Args:
        options: What the caller gave.
        is_cpu: Whether vLLM computes on the CPU here.

    Raises:
        InvalidEngineOption: An option that cannot work here.
    """
    for name, reason in _REFUSED.items():
        if options.get(name) is not None:
            raise InvalidEngineOption(name, options[name], reason)
    for name, reason in _GREATEST_ONE.items():
        if options.get(name) not in (None, 1):
            raise InvalidEngineOption(name, options[name], reason)
    if options.get("distributed_executor_backend") not in (None, "uni"):
        raise InvalidEngineOption(
            "distributed_executor_backend", options["distributed_executor_backend"], _IN_PROCESS + "leave it out"
        )
    if options.get("async_scheduling"):
        raise InvalidEngineOption("async_scheduling", True, "the caller chooses each token; leave the option out")
    defaults: dict[str, Any] = {
        "max_num_seqs": MAX_NUM_SEQS,
        "enable_prefix_caching": True,
        "load_format": "safetensors",  # pickles can run code when loaded
        "distributed_executor_backend": "uni",
        "use_tqdm_on_load": False,
    }
    if is_cpu:
        # Compiling at each start was not tried here; `enforce_eager=False` asks for it.
        defaults |= {"block_size": CPU_BLOCK_SIZE, "enforce_eager": True}
        if not _sizes_kv(options):
            defaults["kv_cache_memory_bytes"] = int(min(psutil.virtual_memory().available // 4, 16 * 2**30))
    return defaults | dict(options) | {"async_scheduling": False, "skip_tokenizer_init": True}


def _sizes_kv(options: Mapping[str, Any]) -> bool:
    given = ("kv_cache_memory_bytes", "gpu_memory_utilization", "num_gpu_blocks_override")
    return any(options.get(name) is not None for name in given) or bool(os.environ.get("VLLM_CPU_KVCACHE_SPACE"))
