"""`proper check`: what a config would train on. Trains nothing, and knows nothing about rows or splits."""

from __future__ import annotations

import typer

from proper.cli.options import ConfigFile, Overrides, SkipBadRows

EXAMPLES = """\
  proper check notes.yaml
  proper check notes.yaml --set split.min_history=20 --skip-bad-rows
"""


def command(config: ConfigFile, overrides: Overrides = None, skip_bad_rows: SkipBadRows = False) -> None:
    """Say what would be trained on.

    Users, rows, histories, leaks, bad rows and what the model's length cuts off. Trains nothing.
    """
    from proper.config import load_config

    settings = load_config(config, overrides or ())
    from proper import pipeline

    for line in pipeline.check(settings, skip_bad_rows=skip_bad_rows).lines():
        typer.echo(line)
