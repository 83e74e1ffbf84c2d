"""`proper check`: what a config would train on, or whether its backbone will do. Knows nothing about rows or splits."""

from __future__ import annotations

from typing import Annotated

import typer

from proper.cli.options import ConfigFile, Overrides, SkipBadRows

EXAMPLES = """\
  proper check notes.yaml
  proper check notes.yaml --set split.min_history=20 --skip-bad-rows
  proper check notes.yaml --backbone
"""

Backbone = Annotated[
    bool,
    typer.Option("--backbone", help="Instead, try all stages and cached decoding on the backbone with two short rows."),
]


def command(
    config: ConfigFile, overrides: Overrides = None, skip_bad_rows: SkipBadRows = False, backbone: Backbone = False
) -> None:
    """Say what would be trained on.

    Users, rows, histories, leaks, bad rows and what the model's length cuts off. Trains nothing.
    """
    from proper.config import load_config

    settings = load_config(config, overrides or ())
    from proper import pipeline

    if backbone:
        typer.echo(pipeline.check_backbone(settings))
        return
    for line in pipeline.check(settings, skip_bad_rows=skip_bad_rows).lines():
        typer.echo(line)
