"""Commands `proper groups ...`: describe the groups of a run, refresh them with new interactions, undo a refresh."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from proper.cli.options import RunFolder, examples
from proper.console import quiet_libraries
from proper.run_folder import require_run

logger = logging.getLogger(__name__)

app = typer.Typer(
    help="Describe and refresh the groups of a run.",
    rich_markup_mode=None,
    epilog=examples("groups", "show runs/notes", "refresh runs/notes"),
)


@app.command(epilog=examples("groups", "show runs/notes", "show runs/notes --group 3", "show runs/notes --json"))
def show(
    folder: RunFolder,
    group: Annotated[int | None, typer.Option(metavar="K", help="Only this group, from 0.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one object per line.")] = False,
) -> None:
    """Describe each group.

    Prints utilization, the users with the highest mean gates, the words and labels that are more frequent among the
    group's users than among others (log-odds with a prior, in standard deviations), and example items of typical users.
    Needs an evaluated run. The examples are texts of users.
    """
    run = require_run(folder)
    from proper.reports.group_summary import group_lines, group_summary

    summary = group_summary(run.path, group)
    lines = (json.dumps(each, ensure_ascii=False) for each in summary) if as_json else group_lines(summary)
    for line in lines:
        typer.echo(line)


@app.command(epilog=examples("groups", "refresh runs/notes", "refresh runs/notes --without gone.txt"))
def refresh(
    folder: RunFolder,
    without: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="User ids, one per line, whose items are left out.", show_default=False),
    ] = None,
) -> None:
    """Continue the training of the groups with new interactions.

    Stage 2 continues from the groups in service, users' embeddings included, on the interactions logged since the last
    refresh and as many earlier ones. Then every user is evaluated on their own held-out items under the new groups; a
    user whose adapter is worse there is fitted again. 'proper groups rollback' returns to the previous groups. A server
    has to be restarted, or to get SIGHUP; until then its /readyz answers 503. After a kill, the same call continues.
    Users in the file of data.train_without are left out too.
    """
    from proper.data.dataset import left_out_users
    from proper.enrolment.refresh import refresh as refresh_groups
    from proper.interactions.personal_files import remove_rows
    from proper.run_config import run_config

    with _held(folder) as run:
        named = left_out_users(run_config(run).data.train_without)
        remove_rows(require_run(run).data, named)
        done = refresh_groups(run, named | left_out_users(None if without is None else str(without), "--without"))
    if done.rows:
        typer.echo(f"trained on {done.rows} interactions; measured {done.validated} of {done.users} users")
    else:
        logger.info("no interactions were logged since the groups were trained")
    if done.rows or done.worse:
        typer.echo(f"adapters worse under the new groups: {done.worse}, fitted again; {done.adapters} have one now")


@app.command(epilog=examples("groups", "rollback runs/notes"))
def rollback(folder: RunFolder) -> None:
    """Return to the groups before the last refresh.

    Users return to their versions for these groups. Users who have been updated since have no such version; they keep
    their embedding and are fitted again.
    """
    from proper.enrolment.refresh import roll_back

    with _held(folder) as run:
        done = roll_back(run)
    typer.echo(f"returned to the previous groups; {done.users} users, of whom {done.worse} were fitted again")


@contextmanager
def _held(folder: Path) -> Iterator[Path]:
    """Hold the locks of a run that is trained."""
    from proper.interactions.deletion import working
    from proper.run_lock import exclusive

    run = require_run(folder).path
    quiet_libraries()
    with exclusive(run), working(run):
        yield run
