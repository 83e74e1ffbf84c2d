"""Typer application: registers all commands and turns every error into one line on stderr and an exit code.

Commands import what they need when they run, so that `--help` stays fast.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

import proper
from proper.cli import (
    backbones,
    bench,
    check,
    data,
    demo,
    evaluate,
    export_backbone,
    generate,
    groups,
    keys,
    move_state,
    report,
    run,
    serve,
    simulate,
    users,
    users_archive,
    users_enrol,
    users_exchange,
    users_update,
    users_verify,
)
from proper.console import quiet_libraries, terminal_logging
from proper.errors import InputError, ProperError

logger = logging.getLogger(__name__)

INTERRUPTED = 130

# No markup: help is plain text that can be piped, and rich is not imported for it.
app = typer.Typer(name="proper", add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

for command in (demo, check, run, evaluate, report, generate, serve, export_backbone, move_state, simulate):
    app.command(command.__name__.rpartition(".")[2].replace("_", "-"), epilog=f"\b\nExamples:\n{command.EXAMPLES}")(
        command.command
    )

# Without a name, their commands join those of `proper users`.
for more in (users_enrol, users_update, users_exchange, users_archive, users_verify):
    users.app.add_typer(more.app)
for group in (users, groups, keys, data, backbones, bench):
    app.add_typer(group.app, name=group.__name__.rpartition(".")[2])


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"proper {proper.__version__}")
        raise typer.Exit


@app.callback(
    invoke_without_command=True,
    epilog="\b\nExamples:\n  proper demo\n  proper run notes.yaml --out runs/notes\n  proper serve runs/notes",
)
def proper_command(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Personalize a causal language model in three stages: population, groups, users.

    Results go to stdout or files, everything else to stderr. Exit codes: 0 done, 1 failed, 2 bad input or usage,
    130 interrupted. PROPER_DEBUG=1 shows where an error came from.
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code; an error is printed as one line on stderr.

    Args:
        arguments: command line without the program name; None takes the process's own.
    """
    quiet_libraries()
    with terminal_logging():
        return _main(sys.argv[1:] if arguments is None else arguments)


def _main(arguments: Sequence[str]) -> int:
    try:
        require_text(arguments)
        code = typer.main.get_command(app).main(args=list(arguments), prog_name="proper", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        if os.environ.get("PROPER_DEBUG") == "1":
            traceback.print_exc()
        message, code = _explain(error)
        logger.error("proper: " + " ".join(line.strip() for line in message.splitlines() if line.strip()))
    if code == INTERRUPTED:
        logger.info(f"proper: interrupted; {_after_interruption(arguments)}")
    return code if isinstance(code, int) else 0


def entry() -> None:
    """Run the command line of this process and exit with its exit code."""
    sys.exit(main())


def require_text(arguments: Sequence[str]) -> None:
    """Refuse arguments that are not UTF-8, before anything is written; names of existing files are exempt.

    Raises:
        InputError: an argument has bytes that are not UTF-8 and names no existing file.
    """
    for argument in arguments:
        if not argument.isascii() and argument.encode(errors="replace").decode() != argument:
            if os.path.lexists(argument.rpartition("=")[2]):
                continue
            raise InputError(f"{argument.encode(errors='backslashreplace').decode()}: this argument is not UTF-8")


def _explain(error: Exception) -> tuple[str, int]:
    """Return the message of an error and the exit code."""
    if isinstance(error, ProperError):
        return str(error), error.exit_code
    if isinstance(error, typer.TyperException):
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "proper"
        said = error.format_message().replace(": Value error, ", ": ").rstrip(".")
        return f"{said}; see '{path} --help'", 2
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}", 1
    return f"{type(error).__name__}: {error}; PROPER_DEBUG=1 shows where", 1


def _after_interruption(arguments: Sequence[str]) -> str:
    words = " ".join(arguments[:2])
    if (
        words.partition(" ")[0] in {"demo", "run", "evaluate", "data", "move-state"}
        or words in {"groups refresh", "users update"}
        or (words == "users export" and "--all" in arguments)
    ):
        return "the same command continues where this one stopped"
    if words == "users enrol":
        return "'proper users update' continues the fit; if no user is queued, the same command starts again"
    return "the same command starts again"
