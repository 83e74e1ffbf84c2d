"""Command `proper move-state`: move the state of a run between its folder and PostgreSQL."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from proper.cli.options import RunFolder

logger = logging.getLogger(__name__)

EXAMPLES = """\
  proper move-state runs/notes --store postgresql://proper@db.example.org/proper
  proper move-state runs/notes --store folder
"""


def command(
    folder: RunFolder,
    store: Annotated[
        str,
        typer.Option(
            "--store",
            metavar="URL",
            help="postgresql://USER@HOST/DATABASE, or 'folder' for SQLite files in the run folder.",
            show_default=False,
        ),
    ],
) -> None:
    """Move the state of a run to PostgreSQL, or back.

    State is the manifest of the adapter store, the interaction log with the fit queue, tombstones and API keys;
    adapters are not moved. Stop the run's server and workers first: the command is refused while another process uses
    the state. Every table is copied and compared; then the run uses the copy, and the old state is removed. After an
    interruption, the run uses one of the two copies, and the same command continues. Prints the number of copied rows.
    """
    from proper.console import progress
    from proper.state_move import move_state

    with progress("copy rows", None) as advance:
        count = move_state(folder, None if store == "folder" else store, advance)
    typer.echo(f"{count} rows copied")
