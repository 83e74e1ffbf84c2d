"""Commands `proper groups ...`: what the groups of a run are."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from proper.cli.options import RunFolder, examples
from proper.run_folder import require_run

app = typer.Typer(
    help="Look at the groups of a run.", rich_markup_mode=None, epilog=examples("groups", "show runs/notes")
)


@app.command(epilog=examples("groups", "show runs/notes", "show runs/notes --group 3", "show runs/notes --json"))
def show(
    folder: RunFolder,
    group: Annotated[int | None, typer.Option(metavar="K", help="Only this group, from 0.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one object per line.")] = False,
) -> None:
    """Print what each group is.

    Utilization, the users with the highest mean gates, the words and labels that the group's users have more often than
    other users (log-odds with a prior, in standard deviations), and example items of typical users. Needs an evaluated
    run. The examples are texts of users.
    """
    run = require_run(folder)
    from proper.reports.group_summary import group_lines, group_summary

    summary = group_summary(run.path, group)
    lines = (json.dumps(each, ensure_ascii=False) for each in summary) if as_json else group_lines(summary)
    for line in lines:
        typer.echo(line)
