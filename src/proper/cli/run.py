"""Command `proper run`: train the stages of a config, evaluate and report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from proper.cli.options import ConfigFile, Overrides, SkipBadRows, Stores, chosen
from proper.cli.results_table import print_results

EXAMPLES = """\
  proper run notes.yaml --out runs/notes
  proper run notes.yaml --out runs/notes8 --set groups.experts=8 --set 'evaluation.seeds=[0,1,2]'
  proper run notes.yaml --out runs/notes --stages population,groups
  proper run notes.yaml --out runs/notes --cluster local:2
  proper run notes.yaml --out runs/notes --store postgresql://proper@db.example.org/proper
  proper run notes.yaml --out runs/notes --store s3://adapters/notes
"""


def command(
    config: ConfigFile,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The run folder.", show_default=False)],
    overrides: Overrides = None,
    stages: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Any of population, groups, users, evaluate, report.", show_default=False),
    ] = None,
    skip_bad_rows: SkipBadRows = False,
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS", help="Train on a Ray cluster: auto, local:N or ray://HOST:PORT.", show_default=False
        ),
    ] = None,
    stores: Stores = None,
) -> None:
    """Train the three stages, evaluate and report.

    Each stage is evaluated on held-out queries. After an interruption, the same command continues where it stopped.
    """
    from proper.config import load_config

    # Read before torch is imported, so that an error in the config is reported at once.
    settings = load_config(config, overrides or ())
    from proper.cluster.address import check_address

    if cluster is not None:
        check_address(cluster)
    from proper.adapters.store_urls import check_store

    for url in stores or ():
        check_store(url)
    from proper import pipeline

    wanted = pipeline.STAGES if stages is None else chosen("--stages", stages, pipeline.STAGES)
    print_results(
        pipeline.run(settings, out, stages=wanted, skip_bad_rows=skip_bad_rows, cluster=cluster, stores=stores or ())
    )
