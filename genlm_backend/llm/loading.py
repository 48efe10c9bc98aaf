"""Read a model or a tokenizer by name with transformers, refusing what could run code unless asked for."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from genlm_backend.errors import (
    BackendUnavailable,
    InvalidEngineOption,
    ModelNotFound,
    RemoteCodeRefused,
    UnsafeWeights,
    UnsupportedModel,
)
from genlm_backend.llm.demo_model import resolve_model
from genlm_backend.trie.tries import checked_device

T = TypeVar("T")
TRUST_PICKLES = "hf_opts={'use_safetensors': False}"
REMEDY = "pass a Hugging Face id, a local folder, a .gguf path, or 'smollm2', the demo model"


def load_tokenizer(name: str, **options: Any) -> Any:
    """The tokenizer of a model: 'smollm2', a `.gguf` path, a local folder or a Hugging Face id.

    Args:
        name: The model's name.
        options: For `AutoTokenizer.from_pretrained`; `trust_remote_code` is False unless given.

    Raises:
        ModelNotFound: There is none by this name.
        RemoteCodeRefused: It brings code of its own.
        UnsupportedModel: transformers cannot read it, or its files are damaged.
    """
    from transformers import AutoTokenizer

    where = resolve_model(name)
    options.setdefault("trust_remote_code", False)
    return _named(name, lambda: AutoTokenizer.from_pretrained(where, **options))


def load_model(name: str, device: str | None, options: dict[str, Any]) -> Any:
    """A causal language model in evaluation mode.

    Args:
        name: As in `load_tokenizer`.
        device: "cpu", "cuda", "cuda:1", "mps"; None takes the best there is, unless `options` has a device_map.
        options: For `AutoModelForCausalLM.from_pretrained`; `dtype` "auto" is the checkpoint's own, which is the
            default too, except on a CPU without fast products in 16 bits: there it is float32.

    Raises:
        ModelNotFound, RemoteCodeRefused: As in `load_tokenizer`.
        UnsafeWeights: Only pickled weights are there.
        UnsupportedModel: transformers knows no causal language model of this kind, or its files are damaged.
        InvalidDevice: torch knows no such device, or it is not there.
        InvalidEngineOption: Both a device and a device_map.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    has_map = "device_map" in options
    if has_map and device is not None:
        raise InvalidEngineOption("device", device, "a device_map says where the model lies; leave one of them out")
    on = None if has_map else checked_device(best_device() if device is None else device)
    where = resolve_model(name)
    options = {"use_safetensors": True, "trust_remote_code": False} | options
    dtype = options.pop("torch_dtype", None) or options.get("dtype")
    options["dtype"] = dtype or "auto"
    if options["use_safetensors"] and isinstance(where, Path) and _has_only_pickles(where):
        raise UnsafeWeights(name, TRUST_PICKLES)
    names = ("trust_remote_code", "revision", "token", "subfolder", "cache_dir", "local_files_only")
    of_config = {key: options[key] for key in names if key in options}
    config = _named(name, lambda: AutoConfig.from_pretrained(where, **of_config))
    if config.is_encoder_decoder:
        raise UnsupportedModel(
            f"{name!r} is an encoder-decoder model ({config.model_type})", "use a decoder-only (causal) language model"
        )
    if has_map:
        _need_accelerate()
    model: Any = _named(name, lambda: AutoModelForCausalLM.from_pretrained(where, **options))
    if on is not None:
        model.to(on)
        if dtype is None and "quantization_config" not in options and model.device.type == "cpu":
            _widen(model)
    return model.eval()


def multiplies_bfloat16() -> bool:
    """Whether oneDNN has fast bfloat16 products for this CPU (AVX-512 on x86); else float32 is faster in batches."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _widen(model: Any) -> None:
    """A model all in 16 bits becomes float32 where these are slow."""
    is_narrow = {weight.dtype for weight in model.parameters()} <= {torch.bfloat16, torch.float16}
    if is_narrow and not multiplies_bfloat16():
        model.float()


def best_device() -> str:
    """ "cuda" where there is a GPU, else "mps" on Apple hardware, else "cpu"."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _named(name: str, load: Callable[[], T]) -> T:
    """What `load` returns; what transformers raises, by cause."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        return load()
    except (OSError, ValueError, ImportError, StrictDataclassError) as error:
        text = str(error)
        first = next((line for line in text.splitlines() if line.strip()), type(error).__name__)
        if "trust_remote_code" in text:
            raise RemoteCodeRefused(name) from error
        if "safetensors" in text and "in directory" not in text and isinstance(error, OSError):
            raise UnsafeWeights(name, TRUST_PICKLES) from error  # a local directory of pickles was refused before
        if isinstance(error, OSError):
            raise ModelNotFound(name, f"{REMEDY} ({first[:200]})") from error
        if isinstance(error, ValueError | StrictDataclassError):
            raise UnsupportedModel(f"transformers cannot load {name!r}: {first[:300]}", REMEDY) from error
        raise BackendUnavailable(f"a package that {name!r} needs ({first[:200]})", _install_command(error)) from error
    except Exception as error:
        if type(error) not in (SafetensorError, Exception):  # the latter is what the tokenizers library raises
            raise
        what = f"the files of {name!r} are damaged, or of a newer format ({str(error)[:200]})"
        raise UnsupportedModel(what, "fetch them again") from error


def _install_command(error: ImportError) -> str:
    """The command that the error names, else what is known of it."""
    told = re.search(r"pip install [^`\n]+", str(error))
    if told is not None:
        return told[0].rstrip(" .")
    missing = "that the message in brackets names" if error.name is None else f"with the module {error.name!r}"
    return f"pip install, and the package {missing}"


def _has_only_pickles(folder: Path) -> bool:
    return not any(folder.glob("*.safetensors")) and any(folder.glob("*.bin"))


def _need_accelerate() -> None:
    try:
        import accelerate  # noqa: F401
    except ImportError as error:
        raise BackendUnavailable("accelerate, which device_map needs,", "pip install accelerate") from error
