"""Command `proper demo`: all stages, evaluation and report on generated data, offline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from proper.cli.results_table import print_results

EXAMPLES = """\
  proper demo
  proper demo --out runs/rating --task rating --seed 1
"""

Task = Literal["classification", "rating", "style"]


def command(
    out: Annotated[Path, typer.Option(metavar="DIR", help="The run folder.")] = Path("runs/demo"),
    task: Annotated[Task, typer.Option(help="Task of the simulated users.")] = "classification",
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the data and of the training.")] = 0,
    users: Annotated[
        int, typer.Option("--users", "--people", min=1, metavar="N", help="Number of users to simulate.")
    ] = 300,
) -> None:
    """Run all stages on simulated users, offline.

    Their true groups and habits are known, so the report shows how much of them the model recovers.
    """
    from proper import pipeline

    print_results(pipeline.demo(out, task=task, seed=seed, users=users))
