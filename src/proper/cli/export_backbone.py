"""Command `proper export-backbone`: write the backbone with the population LoRA merged, the base of PEFT exports."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from proper.cli.options import RunFolder
from proper.run_folder import require_run

EXAMPLES = """\
  proper export-backbone runs/notes --out exports/backbone
"""


def command(
    folder: RunFolder,
    out: Annotated[Path, typer.Option(metavar="F", help="The folder to write.", show_default=False)],
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
) -> None:
    """Write the backbone with stage 1 merged.

    Writes a transformers folder with the tokenizer and prints its path. All users of the run share it: load their
    adapters from 'proper users export --format peft' on it.
    """
    require_run(folder)
    from proper.export.run_export import export_backbone

    export_backbone(folder, out, force=force)
    typer.echo(out)
