"""The command `genlm-backend`: one file per subcommand; here what they share, and how it ends.

Exit codes: 0 done; 2 a wrong argument or an error of this package (one line on stderr), also where other prompts of a
file or other lines of a pipe were answered; 1 a run of `smc` that failed, whose report is there; 130 interrupted.
"""

from __future__ import annotations

import atexit
import io
import os
import sys
import threading
from typing import Annotated

import typer

from genlm_backend import __version__
from genlm_backend.cli import chat, generate, sis, smc, trie
from genlm_backend.cli.loading import tell_error
from genlm_backend.errors import GenlmError

INTERRUPTED = 130

app = typer.Typer(
    help="Probabilistic programs over language models: coroutines await log-probabilities, the backend batches them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("sis")(sis.command)
app.command("trie")(trie.command)
app.command("chat")(chat.command)
app.command("generate")(generate.command)
app.command("smc")(smc.command)


def main() -> None:
    """The console script: runs a subcommand and ends the process with its exit code."""
    before = set(threading.enumerate())
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a model writes what a terminal may not be able to show
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # as in arguments: whatever uses the text refuses it
    try:
        app()
    except GenlmError as error:
        tell_error(error)
        sys.exit(2)
    except SystemExit as ended:
        if ended.code == INTERRUPTED and any(_computes(thread) for thread in set(threading.enumerate()) - before):
            _end_at_once(INTERRUPTED)
        raise


def _computes(thread: threading.Thread) -> bool:
    return thread.daemon and thread.name in ("genlm-apart", "genlm-engine")


def _end_at_once(code: int) -> None:
    """End as Python does, but without taking the interpreter down.

    A daemon thread inside of torch that asks for the interpreter's lock while it goes down is ended by pthread_exit,
    which unwinds through destructors that may not be: the process is aborted then, by SIGABRT.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"genlm-backend {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Options of the command itself; its help is the application's."""
