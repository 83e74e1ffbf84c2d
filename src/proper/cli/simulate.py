"""Command `proper simulate`: estimate machines and waiting times for very many users by simulation."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated

import typer

from proper.extras import needs_extra
from proper.files import write_json

logger = logging.getLogger(__name__)

EXAMPLES = """\
  proper simulate configs/simulation/two-cores.yaml
  proper simulate configs/simulation/two-cores.yaml --json simulation.json
"""

Settings = Annotated[Path, typer.Argument(metavar="FILE", help="A YAML file of settings.", show_default=False)]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the result to this file, not to stdout.")
]


def command(file: Settings, json_file: JsonFile = None) -> None:
    """Simulate how many machines N users need.

    N is 10,000 to 1,000,000,000; the users' requests go to replicas of the server. Costs (decoding step by batch size,
    prefill, cold load, fit) come from files of 'proper bench' or from the settings. Reports slot hit rate, times to
    the first token, queueing, missed refits, storage, machines and price, with and without affinity of users to
    replicas. The result is JSON; a table goes to stderr, or to stdout with --json.
    """
    with needs_extra("simulate", "'proper simulate'"):
        from proper.simulation.simulate import in_words, load_simulation, simulate
    result = simulate(*load_simulation(file))
    if json_file is None:
        for line in in_words(result):
            logger.info(line)
        typer.echo(json.dumps(result, indent=2))
        return
    write_json(json_file, result, shared=True)
    for line in in_words(result):
        typer.echo(line)
