"""Command `proper check`: summarize the data that a config trains on, or check that its backbone is supported."""

from __future__ import annotations

from typing import Annotated

import typer

from proper.cli.options import ConfigFile, Overrides, SkipBadRows
from proper.errors import InputError

EXAMPLES = """\
  proper check notes.yaml
  proper check notes.yaml --set split.min_history=20 --skip-bad-rows
  proper check notes.yaml --backbone
  proper check notes.yaml --time --set compute.budget=40m
"""

Backbone = Annotated[
    bool,
    typer.Option(
        "--backbone", help="Check the backbone instead: try all stages and cached decoding on two short rows."
    ),
]


Time = Annotated[
    bool,
    typer.Option("--time", help="Estimate the time of each stage instead, from a few measured steps."),
]


def command(
    config: ConfigFile,
    overrides: Overrides = None,
    skip_bad_rows: SkipBadRows = False,
    backbone: Backbone = False,
    time: Time = False,
) -> None:
    """Check a config and summarize its training data.

    Reports users, rows, histories, leaks, bad rows and how much text the maximum length cuts off. Trains nothing.
    """
    from proper.config import load_config

    if backbone and time:
        raise InputError("give --backbone or --time, not both")
    settings = load_config(config, overrides or ())
    from proper import pipeline

    if backbone:
        typer.echo(pipeline.check_backbone(settings))
        return
    if time:
        for line in pipeline.check_time(settings, skip_bad_rows=skip_bad_rows):
            typer.echo(line)
        return
    for line in pipeline.check(settings, skip_bad_rows=skip_bad_rows):
        typer.echo(line)
