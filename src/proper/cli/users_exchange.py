"""Commands `proper users export` and `import`: adapters of one or all users to a folder, or one into another run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Literal

import typer

from proper.cli.options import RunFolder, examples
from proper.cli.users import printable
from proper.errors import InputError
from proper.run_folder import Tier, require_run

logger = logging.getLogger(__name__)

app = typer.Typer(rich_markup_mode=None)

Format = Literal["native", "peft"]


@app.command(
    "export",
    epilog=examples(
        "users",
        "export runs/notes --user ann --out exports/ann",
        "export runs/notes --user ann --out exports/ann-peft --format peft",
        "export runs/notes --all --out exports/all --format peft",
    ),
)
def export_command(
    folder: RunFolder,
    out: Annotated[Path, typer.Option(metavar="F", help="The folder to write.", show_default=False)],
    user: Annotated[str | None, typer.Option(metavar="ID", help="The user's id.", show_default=False)] = None,
    every: Annotated[bool, typer.Option("--all", help="All users, in the format peft.")] = False,
    form: Annotated[
        Format, typer.Option("--format", help="native for another run, peft for other servers.")
    ] = "native",
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export of a user.")] = False,
    served_at: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Where the server will find the folder of --all.", show_default=False),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The merged backbone's name on the server of --all.", show_default=False),
    ] = None,
) -> None:
    """Write one user or all users to a folder.

    --format native is the user's exact state, for another run with the same backbone and groups. --format peft is one
    plain LoRA in PEFT's format, for the merged backbone (proper export-backbone). It uses the router's gates averaged
    over the user's history; 'proper evaluate --methods users,static-export' measures the loss from that. --all writes
    the lists that vLLM, SGLang and Ray Serve LLM read beside the adapters, and measures the loss on a sample. The same
    command again completes an interrupted export and writes only users who have changed.
    """
    require_run(folder)
    if every:
        _export_all(folder, out, user, form, force, served_at, base)
        return
    if user is None:
        raise InputError("export needs --user ID or --all")
    if served_at is not None or base is not None:
        raise InputError("--served-at and --base go with --all")
    from proper.export.run_export import export_user

    export_user(folder, user, out, form=form, force=force)
    typer.echo(out)


def _export_all(
    folder: Path, out: Path, user: str | None, form: Format, force: bool, served_at: str | None, base: str | None
) -> None:
    if user is not None:
        raise InputError("--user and --all exclude each other")
    if force:
        raise InputError("--force goes with --user; --all replaces the adapters of users who have changed")
    if form != "peft":
        raise InputError("--all needs --format peft; the format native is for one --user at a time")
    from proper.export.export_all import export_all, in_words

    for line in in_words(export_all(folder, out, served_at=served_at, base=base), out):
        logger.info(line)
    typer.echo(out)


@app.command(
    "import",
    epilog=examples("users", "import runs/other exports/ann", "import runs/other exports/ann --user ann-from-notes"),
)
def import_command(
    folder: RunFolder,
    source: Annotated[
        Path,
        typer.Argument(metavar="F", help="A folder of 'proper users export' in the format native.", show_default=False),
    ],
    user: Annotated[str | None, typer.Option(metavar="ID", help="Import the user under this id.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing user with this id.")] = False,
    even_if_deleted: Annotated[
        bool, typer.Option("--even-if-deleted", help="Import a user who was deleted from this run.")
    ] = False,
) -> None:
    """Import an exported user; print their id and tier.

    The run must have the same backbone, population stage and groups stage: the adapter is useless on any others.
    """
    require_run(folder)
    from proper.export.run_export import import_user

    taken = import_user(folder, source, name=user, force=force, deleted=even_if_deleted)
    typer.echo(f"{printable(taken.record.user)}\t{taken.record.tier}")
    if taken.record.tier == Tier.USERS and not taken.same_router:
        logger.info(
            "this run's LoRA-aware router is another than the user came with; their answers can differ from there"
        )
