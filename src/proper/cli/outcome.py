"""Output of a finished run on stdout: the table of results, then the path of the report."""

from __future__ import annotations

from pathlib import Path

import typer

from proper.cli.ladder import ladder
from proper.files import read_json
from proper.run_folder import RunFolder


def print_outcome(folder: Path) -> None:
    """Print the table of results, if there are any, and the report's path, or the run folder if there is no report."""
    run = RunFolder(folder)
    if run.results.is_file():
        for line in ladder(read_json(run.results)):
            typer.echo(line)
    typer.echo(run.report if run.report.is_file() else folder)
