"""Command `proper users archive`: write all data of one user to a zip file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from proper.cli.options import RunFolder, examples
from proper.cli.users import OneUser, known, log_of_users, opened
from proper.errors import InputError
from proper.files import atomic_path

app = typer.Typer(rich_markup_mode=None)


@app.command(epilog=examples("users", "archive runs/notes --user u7 --out u7.zip"))
def archive(
    folder: RunFolder,
    user: OneUser,
    out: Annotated[Path, typer.Option("--out", metavar="ZIP", help="The file to write.", show_default=False)],
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write all data of a user to a zip file.

    Interactions with their texts, every version with its metadata and tensors, predictions, scores, gates, and the
    parts of report pages about the user, in JSON and safetensors, with a README.txt. The run is not changed.
    """
    if out.exists() and not force:
        raise InputError(f"{out}: exists already; --force replaces it")
    with opened(folder) as store, log_of_users(store, user) as log:
        from proper.interactions.archive import write_archive

        if not log.knows(store.tenant, user):
            known(store, user)
        with atomic_path(out) as temporary, temporary.open("r+b") as target:
            write_archive(target, store, log, user)
    typer.echo(out)
