"""`proper report`: turn a run's files into HTML files. Knows nothing about figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from proper.cli.options import RunFolder, existing_run

EXAMPLES = """\
  proper report runs/notes
  proper report runs/notes --compare runs/notes8
  proper report runs/notes --user u7 --user u8
"""


def command(
    folder: RunFolder,
    compare: Annotated[
        Path | None,
        typer.Option(metavar="DIR2", help="Put this run beside another of the same data.", show_default=False),
    ] = None,
    user: Annotated[
        list[str] | None,
        typer.Option("--user", metavar="U", help="Write the page of this user; repeatable.", show_default=False),
    ] = None,
) -> None:
    """Write the report and print its path.

    It is one HTML file that opens offline. With --compare it is the page of two runs and its numbers as CSV, with
    --user a page for each user; the report itself is left as it is then.
    """
    existing_run(folder)
    if compare is not None:
        existing_run(compare)
    from proper import pipeline

    written = [] if compare is None else pipeline.report_comparison(folder, compare)
    written += pipeline.report_users(folder, user) if user else []
    for path in written or [pipeline.report(folder)]:
        typer.echo(path)
