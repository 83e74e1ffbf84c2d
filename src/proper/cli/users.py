"""Commands `proper users ...`: list, show, roll back, delete and check the users of a run."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from proper.cli.options import RunFolder, examples
from proper.errors import InputError, NoVersionError, ReadOnlyError, RunFolderError, StoreError, UnavailableError
from proper.run_folder import Stage, require_run

if TYPE_CHECKING:
    from proper.adapters.store import AdapterStore
    from proper.interactions.log import InteractionLog

logger = logging.getLogger(__name__)

OneUser = Annotated[str, typer.Option("--user", metavar="U", help="The user's id.", show_default=False)]
ManyUsers = Annotated[
    list[str], typer.Option("--user", metavar="U", help="A user's id; repeatable.", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, one object per line.")]

app = typer.Typer(
    help="Manage the users of a run.",
    rich_markup_mode=None,
    epilog=examples("users", "list runs/notes", "check runs/notes --repair"),
)


@contextmanager
def opened(folder: RunFolder) -> Iterator[AdapterStore]:
    """Open the adapter store of a run, and close it after the block.

    Raises:
        RunFolderError: the run has no store yet.
    """
    run = require_run(folder)
    from proper.databases.location import is_made

    if not is_made(run.users.manifest):
        run.require_trained(Stage.GROUPS)
        raise RunFolderError(f"{run.users.manifest}: is missing; restore a backup")
    from proper.adapters.store import AdapterStore

    store = AdapterStore(run.users.path)
    try:
        yield store
    finally:
        store.close()


@contextmanager
def _log_of(store: AdapterStore) -> Iterator[InteractionLog | None]:
    """Open the interaction log beside a store, if there is one, and close it after the block."""
    from proper.databases.location import is_made

    if not is_made(store.paths.log):
        yield None
        return
    from proper.interactions.log import InteractionLog

    with closing(InteractionLog(store.folder)) as log:
        yield log


@contextmanager
def log_of_users(store: AdapterStore, *users: str) -> Iterator[InteractionLog]:
    """Open the interaction log beside a store, and close it after the block; it is made for known users only.

    Raises:
        InputError: there is no log, and a user is not in the store.
    """
    from proper.databases.location import is_made
    from proper.interactions.log import InteractionLog

    if not is_made(store.paths.log):
        for user in users:
            known(store, user)
    with closing(InteractionLog(store.folder)) as log:
        yield log


def known(store: AdapterStore, user: str) -> str:
    """Return a user's id if the user is in the store.

    Raises:
        InputError: the user is not in the store.
    """
    if store.head(user) is None:
        raise InputError(f"--user {user}: no such user in {store.folder}; 'proper users list' prints all")
    return user


@app.command("list", epilog=examples("users", "list runs/notes", "list runs/notes --json > list.jsonl"))
def list_users(folder: RunFolder, as_json: AsJson = False) -> None:
    """Print every user with their tier and size in bytes."""
    with opened(folder) as store:
        for user, tier, metadata, size in store.metadata():
            row = {"user": user, "tier": tier, "bytes": size, "facts": metadata}
            typer.echo(_line(row) if as_json else f"{printable(user)}\t{tier}\t{size}")


@app.command(
    epilog=examples(
        "users", "show runs/notes --user u7", "show runs/notes --user u7 --texts", "show runs/notes --user u7 --json"
    )
)
def show(
    folder: RunFolder,
    user: OneUser,
    texts: Annotated[bool, typer.Option("--texts", help="Print the texts of the user's interactions as well.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print all that a run stores about a user.

    Tier and size; the user's groups, by mean gates; the gain over the groups on held-out items and queries; and every
    stored version, newest first: its time and source, the decision on an adapter with the losses, and the ids of the
    items that it was trained on. --json has the same content and all metadata.
    """
    with opened(folder) as store, _log_of(store) as log:
        if log is None or not log.knows(store.tenant, user):
            known(store, user)
        from proper.reports.user_summary import user_summary
        from proper.reports.user_words import user_words

        summary = user_summary(folder, store, log, user, texts=texts)
    for line in [_line(summary)] if as_json else user_words(summary):
        typer.echo(line)


@app.command(epilog=examples("users", "rollback runs/notes --user u7", "rollback runs/notes --user u7 --version 3"))
def rollback(
    folder: RunFolder,
    user: OneUser,
    version: Annotated[int | None, typer.Option(help="The version; by default the one before the current one.")] = None,
) -> None:
    """Make an earlier version of a user current again.

    Makes a new version with the content of the old one. The version that was current is kept as the previous version,
    so a second rollback undoes the first. A version from before 'proper groups refresh' fits the groups before, and is
    refused; 'proper groups rollback' returns to those with all users.
    """
    with opened(folder) as store:
        versions = [each.version for each in store.versions(known(store, user))]
        if len(versions) < 2 or version not in (None, *versions[1:]):
            others = (
                f"earlier ones are {', '.join(map(str, versions[1:]))}" if versions[1:] else "there are no earlier ones"
            )
            raise InputError(f"--user {user}: cannot be rolled back; version {versions[0]} is current and {others}")
        try:
            typer.echo(f"version {store.rollback(user, version)} is current")
        except NoVersionError as error:
            raise InputError(f"--user {user}: cannot be rolled back: {error}") from error


@app.command(
    epilog=examples(
        "users",
        "delete runs/notes --user u7",
        "delete runs/notes --user u7 --user u8",
        "delete runs/notes --user u7 --fingerprints gone.json",
    )
)
def delete(
    folder: RunFolder,
    user: ManyUsers,
    fingerprints: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Before anything is erased, add hashes of the users' data to this file, for 'verify-deleted'.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Delete users and erase their data.

    Erases all versions, all interactions, and the users' rows in the run's data and predictions; afterwards none of it
    can be read from the run's files. The stages that all users share (groups, router) are not changed. The report and
    its pages are removed if they show a deleted user. The file that the run was trained on is not changed. Exit code 1
    if data is left because another process is reading or writing: 'proper users check' continues the deletion, as does
    every command that writes into the run. Only 'proper users enrol' and an import with --even-if-deleted add a deleted
    user again.
    """
    from proper.interactions.deletion import finish_deletions, remove

    finish_deletions(require_run(folder).users.path)
    with opened(folder) as store, log_of_users(store, *user) as log:
        begun = {each.user for each in log.deletions.pending() if each.tenant == store.tenant}
        wanted = [
            each if each in begun or log.knows(store.tenant, each) else known(store, each)
            for each in dict.fromkeys(user)
        ]
        if fingerprints is not None:
            from proper.interactions.fingerprints import salt_of, write_fingerprints
            from proper.interactions.verification import fingerprint

            salt = salt_of(fingerprints)
            write_fingerprints(fingerprints, {each: fingerprint(store, log, each, salt) for each in wanted}, salt)
        removals = [remove(store, log, each) for each in wanted]
    waits = dict.fromkeys(wait for removal in removals for wait in removal.waits)
    typer.echo(f"{sum(removal.found for removal in removals)} deleted")
    _require_gone(list(waits))


@app.command(epilog=examples("users", "check runs/notes", "check runs/notes --repair --json"))
def check(
    folder: RunFolder,
    repair: Annotated[bool, typer.Option("--repair", help="Repair damage where possible.")] = False,
    as_json: AsJson = False,
) -> None:
    """Find damaged, missing and orphaned data.

    Reads every byte of the adapter store and of the interaction log, continues unfinished deletions, and deletes users
    again whom an older copy of a file has restored. With --repair, a user with a damaged adapter is rolled back to the
    newest good version, or to the group tier, and data without an owner is moved to users/quarantine, which the next
    deletion of a user removes. A damaged log is not repaired. Exit code 1 if damage or an unfinished deletion remains.
    """
    from proper.adapters.integrity import Finding
    from proper.adapters.integrity import check as check_store
    from proper.interactions.deletion import PATIENCE, delete_returned, finish_deletions
    from proper.interactions.log_check import check_log

    users = require_run(folder).users.path
    findings = check_log(users)
    # A damaged log cannot be trusted about deletions.
    waits = [] if findings else finish_deletions(users, PATIENCE)
    try:
        with opened(folder) as store:
            findings = check_store(store, repair=repair) + findings
        waits += [] if findings else delete_returned(users, PATIENCE)
    except (ReadOnlyError, UnavailableError):
        raise
    except StoreError as error:
        findings.insert(0, Finding("manifest", str(error)))
    for found in findings:
        typer.echo(_line(asdict(found)) if as_json else f"{found.text}{found.repair and '; ' + found.repair}")
    left = sum(not found.repair for found in findings)
    logger.info(f"{len(findings)} found, {left} left" if findings else "no damage found")
    _require_gone(waits)
    if left:
        raise typer.Exit(1)


def _require_gone(waits: list[str]) -> None:
    """Exit with code 1 and print the reasons if data of deleted users is left."""
    for wait in waits:
        logger.warning(f"data is left: {wait}")
    if waits:
        logger.info("'proper users check' continues the deletion, as does every command that writes into the run")
        raise typer.Exit(1)


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def printable(user: str) -> str:
    """Return a user id, escaped if control characters in it would break the table."""
    return user if user.isprintable() else _line(user)
