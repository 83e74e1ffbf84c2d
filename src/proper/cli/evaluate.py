"""`proper evaluate`: measure a run's methods on its held-out queries. Knows nothing about metrics or models."""

from __future__ import annotations

from typing import Annotated

import typer

from proper.cli.ladder import ladder
from proper.cli.options import RunFolder, chosen, existing_run

EXAMPLES = """\
  proper evaluate runs/notes
  proper evaluate runs/notes --methods base,population,groups,users
"""


def command(
    folder: RunFolder,
    methods: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Methods to compare instead of the config's.", show_default=False),
    ] = None,
) -> None:
    """Measure a trained run on its held-out queries.

    Writes predictions and results.json, and prints the ladder of stages.
    """
    existing_run(folder)
    names = None if methods is None else chosen("--methods", methods)
    from proper import pipeline

    for line in ladder(pipeline.evaluate(folder, names)):
        typer.echo(line)
