"""Command `proper report`: write HTML reports from a run's files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from proper.cli.options import RunFolder
from proper.run_folder import require_run

EXAMPLES = """\
  proper report runs/notes
  proper report runs/notes --compare runs/notes8
  proper report runs/notes --user u7 --user u8
"""


def command(
    folder: RunFolder,
    compare: Annotated[
        Path | None,
        typer.Option(metavar="DIR2", help="Compare with this run of the same data.", show_default=False),
    ] = None,
    user: Annotated[
        list[str] | None,
        typer.Option("--user", metavar="U", help="Write the page of this user; repeatable.", show_default=False),
    ] = None,
) -> None:
    """Write the report and print its path.

    The report is one HTML file that opens offline. With --compare or --user, another page is written instead of the
    report: --compare writes a page that compares two runs, and its numbers as CSV; --user writes a page for each user.
    """
    require_run(folder)
    if compare is not None:
        require_run(compare)
    from proper import pipeline

    written = [] if compare is None else pipeline.report_comparison(folder, compare)
    written += pipeline.report_users(folder, user) if user else []
    for path in written or [pipeline.report(folder)]:
        typer.echo(path)
