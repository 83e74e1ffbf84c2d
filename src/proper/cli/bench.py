"""`proper bench`: speed and memory, one command per benchmark. Knows nothing about any of them."""

from __future__ import annotations

import typer

from proper.cli import bench_users

app = typer.Typer(help="Measure speed and memory, never quality.", no_args_is_help=True, rich_markup_mode=None)

app.command("users", epilog=f"\b\nExamples:\n{bench_users.USERS_EXAMPLES}")(bench_users.users)
app.command("groups", epilog=f"\b\nExamples:\n{bench_users.GROUPS_EXAMPLES}")(bench_users.groups)
