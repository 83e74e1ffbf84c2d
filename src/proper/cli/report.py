"""`proper report`: turn a run's files into one HTML file. Knows nothing about figures."""

from __future__ import annotations

import typer

from proper.cli.options import RunFolder, existing_run

EXAMPLES = """\
  proper report runs/notes
"""


def command(folder: RunFolder) -> None:
    """Write the report and print its path.

    It is one HTML file that opens offline.
    """
    existing_run(folder)
    from proper import pipeline

    typer.echo(pipeline.report(folder))
