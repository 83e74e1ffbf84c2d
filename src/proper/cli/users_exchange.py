"""`proper users export` and `import`: one user out of a run, or into one. Knows nothing about tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from proper.cli.options import RunFolder, existing_run
from proper.cli.users import app
from proper.console import say

EXPORT_EXAMPLES = """\
  proper users export runs/notes --user ann --out exports/ann
  proper users export runs/notes --user ann --out exports/ann-peft --format peft
"""

IMPORT_EXAMPLES = """\
  proper users import runs/other exports/ann
  proper users import runs/other exports/ann --user ann-from-notes
"""

Format = Literal["native", "peft"]


@app.command("export", epilog=f"\b\nExamples:\n{EXPORT_EXAMPLES}")
def export_command(
    folder: RunFolder,
    user: Annotated[str, typer.Option(metavar="ID", help="Whose.", show_default=False)],
    out: Annotated[Path, typer.Option(metavar="F", help="The folder to write.", show_default=False)],
    form: Annotated[Format, typer.Option("--format", help="For another run, or for other servers.")] = "native",
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
) -> None:
    """Write one user to a folder and print its path.

    native is the user's own state, exactly, for another run of the same backbone and groups. peft is one
    plain LoRA in the format of PEFT, for the merged backbone (proper export-backbone); the router's
    gates are averaged over the user's history in it, and 'proper evaluate --methods users,static-export'
    says what that costs.
    """
    existing_run(folder)
    from proper.export.run_export import export_user

    export_user(folder, user, out, form=form, force=force)
    typer.echo(out)


@app.command("import", epilog=f"\b\nExamples:\n{IMPORT_EXAMPLES}")
def import_command(
    folder: RunFolder,
    source: Annotated[Path, typer.Argument(metavar="F", help="An exported user (native).", show_default=False)],
    user: Annotated[str | None, typer.Option(metavar="ID", help="Take them in under this name.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a user of that name.")] = False,
    even_if_deleted: Annotated[
        bool, typer.Option("--even-if-deleted", help="Take in a user who was deleted from this run.")
    ] = False,
) -> None:
    """Take an exported user into a run and print their name and tier.

    The run must have the same backbone, population and groups: adapters mean nothing on others.
    """
    existing_run(folder)
    from proper.export.run_export import import_user

    taken = import_user(folder, source, name=user, force=force, deleted=even_if_deleted)
    typer.echo(f"{taken.record.user}\t{taken.record.tier}")
    if taken.record.tier == "users" and not taken.same_router:
        say("this run's LoRA-aware router is another than the user came with; their answers can differ from there")
