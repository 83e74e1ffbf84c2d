"""Output of a finished run on stdout: the table of results, then the path of the report."""

from __future__ import annotations

from pathlib import Path

import typer

from proper.cli.ladder import ladder
from proper.files import read_json


def print_outcome(folder: Path) -> None:
    """Print the table of results, if there are any, and the report's path, or the run folder if there is no report."""
    results, report = folder / "results.json", folder / "report.html"
    if results.is_file():
        for line in ladder(read_json(results)):
            typer.echo(line)
    typer.echo(report if report.is_file() else folder)
