"""What a finished run prints on stdout: the ladder of stages, then where the report lies.

Knows nothing about how a run is made.
"""

from __future__ import annotations

from pathlib import Path

import typer

from proper.cli.ladder import ladder
from proper.files import read_json


def print_outcome(folder: Path) -> None:
    """Print the ladder and the report's path, or the folder where the run has not come that far."""
    results, report = folder / "results.json", folder / "report.html"
    if results.is_file():
        for line in ladder(read_json(results)):
            typer.echo(line)
    typer.echo(report if report.is_file() else folder)
