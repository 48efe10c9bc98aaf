"""What commands share: arguments that are checked, loading a model, and telling what is being done or went wrong."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.text import Text

from genlm_backend.errors import GenlmError, RemoteCodeRefused, UnsafeWeights

if TYPE_CHECKING:  # torch takes seconds to import, and --help needs none of it
    from genlm_backend.llm import AsyncLM


def check_text(value: Any) -> Any:
    """The callback of arguments that are text: the argument itself.

    Args:
        value: A text, or a list of some; None is none.

    Raises:
        typer.BadParameter: Bytes that are no UTF-8, which Python hands on as surrogates, or an empty text in a list.
    """
    is_list = isinstance(value, list | tuple)
    for text in value if is_list else [value or ""]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise typer.BadParameter("it has bytes that are no text in UTF-8") from error
        if is_list and not text:
            raise typer.BadParameter("a text is empty; expected at least one character")
    return value


def read_text(path: Path, option: str) -> str:
    """The text of a file, without its byte order mark.

    Raises:
        typer.BadParameter: It is no text in UTF-8; names the option.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"{path} is no text in UTF-8: {error.reason}", param_hint=option) from error


def check_output(path: Path | None, option: str) -> None:
    """Refuse a file that cannot be written, before there is something to write; None is no file.

    Raises:
        typer.BadParameter: Its folder is not there, or it may not be written; names the option.
    """
    if path is None:
        return
    folder = path.parent
    if path.is_dir():
        raise typer.BadParameter(f"{path} is a folder; name a file in it", param_hint=option)
    if not folder.is_dir():
        raise typer.BadParameter(f"there is no folder {folder}; make it first", param_hint=option)
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise typer.BadParameter(f"{path} may not be written here; choose another place", param_hint=option)


def load(model: str, backend: str | None, progress: Console, device: str | None = None) -> AsyncLM:
    """A model by name, with what it takes to draw from it; says on `progress` what it does.

    Raises:
        GenlmError: See `load_model_by_name`.
    """
    if device is not None and backend not in (None, "hf"):
        raise typer.BadParameter(
            f"the engine {backend} chooses its device itself; leave this out", param_hint="--device"
        )
    with status(progress, f"loading {model}") as tell:
        from genlm_backend import sampling
        from genlm_backend.llm import load_model_by_name
        from genlm_backend.llm.demo_model import no_progress_bars, resolve_model

        path = resolve_model(model, tell)
        tell(f"loading {model}")
        options = {} if device is None else {"device": device}
        # A folder is read in seconds; the bar of a download from Hugging Face is worth seeing.
        with nullcontext() if isinstance(path, str) else no_progress_bars():
            llm = load_model_by_name(str(path), backend=backend, llm_opts=options)
        sampling.prepare()
        return llm


@contextmanager
def status(console: Console, first: str) -> Iterator[Callable[[str], None]]:
    """Tells what is being done: a spinner in a terminal, a line each elsewhere."""
    if not console.is_terminal:
        said: set[str] = set()

        def say(text: str) -> None:
            if text not in said:
                said.add(text)
                console.print(Text(f"{text} ..."))

        say(first)
        yield say
        return
    with console.status(Text(f"{first} ...")) as spinner:
        yield lambda text: spinner.update(Text(f"{text} ..."))


def tell_error(error: GenlmError) -> None:
    """One line on stderr; where the remedy is an argument in Python, with what helps here."""
    told = f"error: {error}"
    if isinstance(error, UnsafeWeights | RemoteCodeRefused):
        told += "; commands have no such option: load it in Python with load_model_by_name, or name another model here"
    Console(stderr=True, soft_wrap=True).print(told, style="red", markup=False, highlight=False)
