"""Command `proper users verify-deleted`: search a run folder for deleted users and write a certificate."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from proper.cli.options import RunFolder, examples
from proper.cli.users import ManyUsers
from proper.console import progress
from proper.errors import InputError
from proper.files import write_json
from proper.run_folder import require_run

if TYPE_CHECKING:
    from proper.interactions.fingerprints import Fingerprints

logger = logging.getLogger(__name__)

app = typer.Typer(rich_markup_mode=None)


@app.command(
    "verify-deleted",
    epilog=examples(
        "users",
        "verify-deleted runs/notes --user u7",
        "verify-deleted runs/notes --user u7 --originals u7.zip --json certificate.json",
        "verify-deleted runs/notes --user u7 --user u8 --fingerprints gone.json",
    ),
)
def verify_deleted(
    folder: RunFolder,
    user: ManyUsers,
    originals: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="The users' data: an archive (.zip), rows (.jsonl) or tensors (.safetensors); repeatable.",
        ),
    ] = None,
    fingerprints: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="File of 'proper users delete --fingerprints'.", show_default=False),
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option("--json", metavar="CERT", help="Write a certificate.", show_default=False)
    ] = None,
) -> None:
    """Search every file of a run folder for deleted users.

    Searches all bytes of all files, SQLite's free pages and write-ahead logs, and the content of compressed files, for
    the users' ids and, with --originals or --fingerprints, for their texts and tensors. The certificate lists the
    files, how each was read, the result, and the data that remain: the stages that all users share were trained on
    these users too. It names the users, so store it outside of the run folder. Exit code 1 if something is found or
    cannot be read.
    """
    run = require_run(folder).home.path
    if originals and fingerprints is not None:
        raise InputError("--originals and --fingerprints exclude each other")
    from proper.interactions.file_contents import files_below
    from proper.interactions.verification import verify

    wanted = _wanted(user, originals or [], fingerprints)
    with progress("search", len(files_below(run))) as advance:
        verified = verify(run, wanted, advance)
    if certificate is not None:
        write_json(certificate, verified.certificate)
    if not originals and fingerprints is None:
        logger.info("only the ids were searched for; give --originals or --fingerprints for texts and tensors")
    _print_findings(verified.certificate)
    if not verified.clean:
        raise typer.Exit(1)


def _wanted(users: list[str], originals: list[Path], fingerprints: Path | None) -> list[tuple[str, Fingerprints]]:
    """Return what is searched for: each user, with the prints of the user's texts and tensors."""
    from proper.interactions.fingerprints import Fingerprints, add_originals, new_salt, read_fingerprints

    salt, wanted = new_salt(), []
    for user in dict.fromkeys(users):
        prints = Fingerprints(salt) if fingerprints is None else read_fingerprints(fingerprints, user)
        for path in originals:
            add_originals(prints, path, [user] if len(users) > 1 and path.suffix == ".jsonl" else users)
        wanted.append((user, prints))
    return wanted


def _print_findings(certificate: Mapping[str, Any]) -> None:
    for each in certificate["users"]:
        for hit in each["found"]:
            inside = f" in {hit['inside']}" if "inside" in hit else ""
            typer.echo(f"{hit['file']}{inside}: {hit['kind']} of user {each['user']!r}, read as {hit['read_as']}")
    for unread in certificate["unreadable"]:
        logger.warning(f"{unread['file']}: cannot be read: {unread['why']}")
    total = f"{certificate['searched']['files']:,} files, {certificate['searched']['bytes']:,} bytes"
    remains = len(certificate["remains"])
    typer.echo(f"{certificate['result']} in {total}; {remains} shared files learnt from all users")
