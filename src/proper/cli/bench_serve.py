"""`proper bench serve`: speed of many people's answers. Knows nothing about how it is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from proper.console import say
from proper.files import write_json


def command(
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write setting and figures here, not to stdout.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A smaller setting, for a first look.")] = False,
    device: Annotated[str, typer.Option(metavar="NAME", help="cpu, cuda or auto.")] = "auto",
) -> None:
    """Time answers for 32 people at once.

    Beside them: the backbone alone, one person, PEFT's mixed batch and plain generate; and the time to the first token
    with 16 users to a slot.
    """
    from proper.benchmarks.serve import QUICK, Size, run

    result = run(QUICK if quick else Size(), device, say)
    if json_file is None:
        typer.echo(json.dumps(result, indent=2))
        return
    write_json(json_file, result)
    for name, value in result["figures"].items():
        typer.echo(f"{name:32} {value}")
