"""AsyncTransformer: any causal Hugging Face language model on one device."""

from __future__ import annotations

import logging
import threading
import warnings
import weakref
from collections.abc import Sequence
from typing import Any, Self

import psutil
import torch

from genlm_backend.batching import run_apart
from genlm_backend.errors import SlowPathWarning, UnsupportedModel
from genlm_backend.llm.base import ROW_MEMO_BYTES, AsyncLM
from genlm_backend.llm.hf import self_test
from genlm_backend.llm.hf.attention import implementation_for, register
from genlm_backend.llm.hf.cached import CachedEngine, NotCroppable
from genlm_backend.llm.hf.linear import pack_linears, unpack_linears
from genlm_backend.llm.hf.packed import PackedEngine
from genlm_backend.llm.hf.replica import replica, static_rope_length
from genlm_backend.llm.hf.routed import RoutedEngine
from genlm_backend.llm.hf.uncached import UncachedEngine
from genlm_backend.llm.loading import load_model, load_tokenizer
from genlm_backend.llm.service import Engine, Service, normalize
from genlm_backend.tokenization import decode_vocab

BATCH_SIZE = 256
_logger = logging.getLogger(__name__)
_sharing = threading.Lock()


class AsyncTransformer(AsyncLM):
    """A causal Hugging Face language model, on CPU, CUDA or MPS.

    At load a self-test decides how it is served, see `path`: "packed" (every new token computed once, in one forward
    per batch), "cached" (transformers' own cache; every new token computed once), or "uncached" (every context from
    its first token). All three give the same rows.

    The model stays its owner's: its weights, settings and `generate` are the same before, during and after. Wrapping
    one model twice shares one engine.

    Args:
        hf_model: A causal language model on one device. If its weights are changed, call `clear_cache`.
        hf_tokenizer: Its tokenizer.
        batch_size: Most distinct contexts in one batch; default 256.
        kv_cache_bytes: Bound of cached keys and values; default a quarter of the free memory, at most 16 GiB.
        row_memo_bytes: Bound of remembered rows, the newest batch apart; on a CPU up to a quarter more is used.

    Raises:
        UnsupportedModel: It is an encoder-decoder, has no language-model head, or lies on several devices.
        VocabularyError: The tokenizer cannot be turned into bytes.
    """

    def __init__(
        self,
        hf_model: Any,
        hf_tokenizer: Any,
        batch_size: int | None = None,
        kv_cache_bytes: int | None = None,
        row_memo_bytes: int | None = None,
    ) -> None:
        self._start(hf_model, hf_tokenizer, batch_size, kv_cache_bytes, row_memo_bytes, is_ours=False)

    @classmethod
    def from_name(
        cls,
        model_id: str,
        bitsandbytes_opts: dict[str, Any] | None = None,
        hf_opts: dict[str, Any] | None = None,
        *,
        device: str | None = None,
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> Self:
        """Load a model and its tokenizer.

        Args:
            model_id: 'smollm2', a Hugging Face id, a local folder, or a `.gguf` path.
            bitsandbytes_opts: Options of `transformers.BitsAndBytesConfig`.
            hf_opts: Options of `AutoModelForCausalLM.from_pretrained`, such as `revision` or `dtype`. Without the
                latter 16 bits become float32 on a CPU that multiplies them slowly; "auto" keeps the checkpoint's own.
            device: "cpu", "cuda", "cuda:1", "mps"; None takes the best there is.
            trust_remote_code: Let the model run code of its own.
            kwargs: For the constructor.

        Raises:
            ModelNotFound, UnsafeWeights, RemoteCodeRefused, UnsupportedModel, VocabularyError: See
                `genlm_backend.errors`.
        """
        options = dict(hf_opts or {})
        if trust_remote_code:
            options["trust_remote_code"] = True
        if bitsandbytes_opts:
            from transformers import BitsAndBytesConfig

            options["quantization_config"] = BitsAndBytesConfig(**bitsandbytes_opts)
        names = ("revision", "token", "subfolder", "trust_remote_code", "cache_dir", "local_files_only")
        tokenizer = load_tokenizer(model_id, **{name: options[name] for name in names if name in options})
        model = run_apart(lambda: load_model(model_id, device, options))
        wrapped = cls.__new__(cls)
        wrapped._start(model, tokenizer, is_ours=True, **kwargs)
        return wrapped

    def _start(
        self,
        model: Any,
        tokenizer: Any,
        batch_size: int | None = None,
        kv_cache_bytes: int | None = None,
        row_memo_bytes: int | None = None,
        *,
        is_ours: bool,
    ) -> None:
        _check_supported(model)
        byte_vocab, str_vocab = decode_vocab(tokenizer)
        asked = {
            "batch_size": batch_size,
            "kv_cache_bytes": kv_cache_bytes,
            "row_memo_bytes": row_memo_bytes,
            "n_vocab": len(byte_vocab),
        }
        with _sharing:
            loaded = _LOADED.get(model)
            if loaded is None or not loaded.service.share():
                loaded = _LOADED[model] = _Loaded(model, asked, is_ours)
            try:
                loaded.check_same(asked)
            except ValueError:
                loaded.service.release()
                raise
            self._loaded = loaded
            self.model = model
            self.device = model.device
            super().__init__(
                tokenizer,
                loaded.service,
                byte_vocab=byte_vocab,
                str_vocab=str_vocab,
                n_ids=model.get_input_embeddings().num_embeddings,
                max_length=_max_length(model),
            )

    @property
    def path(self) -> str:
        """How contexts are served: "packed", "cached" or "uncached"."""
        return self._loaded.path

    async def next_token_logprobs_uncached(
        self, token_ids: Sequence[int], lora_name: str | None = None
    ) -> torch.Tensor:
        """The row from one plain forward over the whole context, alone, with transformers' own attention: the oracle.

        Shape and errors as in `next_token_logprobs`. Blocks the event loop.
        """
        context = self._context(token_ids, lora_name)
        with self._loaded.oracle_lock:
            logits = self._loaded.oracle.evaluate([context])
        return normalize(logits, len(self.byte_vocab)).logprobs[0]


class _Loaded:
    """What all wrappers of one model share."""

    def __init__(self, model: Any, asked: dict[str, int | None], is_ours: bool) -> None:
        kv_cache_bytes = asked["kv_cache_bytes"]
        if kv_cache_bytes is None:
            kv_cache_bytes = default_kv_cache_bytes(model.device)
        row_memo_bytes = ROW_MEMO_BYTES if asked["row_memo_bytes"] is None else asked["row_memo_bytes"]
        batch_size = BATCH_SIZE if asked["batch_size"] is None else asked["batch_size"]
        n_vocab = asked["n_vocab"]
        assert n_vocab is not None
        self.options = {
            "batch_size": batch_size,
            "kv_cache_bytes": kv_cache_bytes,
            "row_memo_bytes": row_memo_bytes,
            "n_vocab": n_vocab,  # the width of the rows, from the tokenizer
        }
        self.path, engine, reasons = run_apart(lambda: _choose_engine(model, kv_cache_bytes, is_ours))
        if reasons:
            _warn(model, self.path, reasons)
        self.oracle = UncachedEngine(replica(model))
        self.oracle_lock = threading.Lock()
        self.service = Service(engine, n_vocab, batch_size=batch_size, row_memo_bytes=row_memo_bytes)

    def check_same(self, asked: dict[str, int | None]) -> None:
        for name, value in asked.items():
            if value is not None and value != self.options[name]:
                raise ValueError(
                    f"this model is wrapped already with {name}={self.options[name]}, now {name}={value}: wrappers of "
                    "one model share an engine; leave the option out, or close the other one first"
                )


_LOADED: weakref.WeakKeyDictionary[Any, _Loaded] = weakref.WeakKeyDictionary()


def default_kv_cache_bytes(device: torch.device) -> int:
    """A quarter of the memory that is free on a device now, at most 16 GiB."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return int(min(free // 4, 16 * 2**30))


def _choose_engine(model: Any, kv_cache_bytes: int, is_ours: bool) -> tuple[str, Engine, list[str]]:
    """The fastest engine that passes its self-test: its name, itself, and why faster ones do not serve."""
    register()
    limit = static_rope_length(model)
    replaced = pack_linears(model) if is_ours else []
    reasons = []
    for name in ("packed", "cached"):
        plain = replica(model)
        try:
            engine: Engine
            if name == "packed":
                engine = _packed_engine(model, plain, kv_cache_bytes, limit)
            else:
                engine = CachedEngine(plain, kv_cache_bytes)
                self_test.check_engine(engine, replica(model), limit)
        except Exception as error:  # whatever a model does on this path, there is a slower one
            reasons.append(f"{name}: {error if isinstance(error, self_test.Failed | NotCroppable) else repr(error)}")
            if replaced:
                unpack_linears(replaced)
                replaced = []
            continue
        engine.reset()
        if limit is not None:
            return name, RoutedEngine(engine, UncachedEngine(replica(model)), limit), reasons
        return name, engine, reasons
    return "uncached", UncachedEngine(replica(model)), reasons


def _packed_engine(model: Any, plain: Any, kv_cache_bytes: int, limit: int | None) -> PackedEngine:
    """One that passes its self-test: with fused layers, else without."""
    attention = implementation_for(self_test.own_attention(model))
    engine = PackedEngine(replica(model, attention), kv_cache_bytes)
    try:
        self_test.check_packed(engine, plain, limit)
    except Exception as error:  # a fused layer may raise anything where the parts of a layer are other than they look
        if not engine.n_fused:
            raise
        _logger.info("layers of %s are not fused: %s", type(model).__name__, error)
        engine = PackedEngine(replica(model, attention), kv_cache_bytes, is_fused=False)
        self_test.check_packed(engine, plain, limit)
    return engine


def _warn(model: Any, path: str, reasons: list[str]) -> None:
    warnings.warn(
        f"{type(model).__name__} is served on the {path!r} path, correct but slower ({'; '.join(reasons)})",
        SlowPathWarning,
        stacklevel=5,
    )


def _check_supported(model: Any) -> None:
    if model.config.is_encoder_decoder:
        raise UnsupportedModel(f"{type(model).__name__} is an encoder-decoder model", "use a causal language model")
    if model.get_output_embeddings() is None:
        raise UnsupportedModel(
            f"{type(model).__name__} has no language-model head", "load it with AutoModelForCausalLM"
        )
    devices = sorted({str(tensor.device) for tensor in [*model.parameters(), *model.buffers()]})
    if len(devices) != 1 or devices == ["meta"]:
        raise UnsupportedModel(
            f"{type(model).__name__} lies on {' and '.join(devices)}",
            "load it on one device, for example with device='cuda:0' or hf_opts={'device_map': {'': 0}}",
        )


def _max_length(model: Any) -> int | None:
    config = model.config.get_text_config()
    length = getattr(config, "max_position_embeddings", None)
    if length is None:
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "dynamic":
        length = round(length * rope.get("factor", 1.0))
    return int(length)
