"""Command `proper evaluate`: evaluate and compare methods on a run's held-out queries."""

from __future__ import annotations

from typing import Annotated

import typer

from proper.cli.options import RunFolder, chosen
from proper.cli.results_table import results_table
from proper.run_folder import require_run

EXAMPLES = """\
  proper evaluate runs/notes
  proper evaluate runs/notes --methods base,population,groups,users
  proper evaluate runs/notes --methods users,swapped,shuffled,oppu,rag,user-majority
  proper evaluate runs/notes --methods 'groups,groups[groups.experts=8],users[history=5]'
"""


def command(
    folder: RunFolder,
    methods: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Methods to compare instead of the config's.", show_default=False),
    ] = None,
) -> None:
    """Evaluate methods on a run's held-out queries.

    Trains the models that the methods need beyond the run in its folder variants/, reuses those that exist, and
    reports on stderr which. Writes predictions, results.json and methods.csv, and prints the main metric. The page
    'Methods' of the documentation lists all methods; the stages are base, population, groups and users.
    """
    require_run(folder)
    names = None if methods is None else chosen("--methods", methods)
    from proper import pipeline

    for line in results_table(pipeline.evaluate(folder, names)):
        typer.echo(line)
