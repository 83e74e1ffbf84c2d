"""`proper users`: the commands on a run's users. Holds only the group; each command is elsewhere."""

from __future__ import annotations

import typer

# No markup: help is plain text that fits a pipe.
app = typer.Typer(no_args_is_help=False, rich_markup_mode=None, help="Look after the users of a run.")
