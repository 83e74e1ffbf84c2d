"""Commands `proper bench ...`: benchmarks of speed and memory on this machine."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from proper.cli.options import examples
from proper.files import write_json

logger = logging.getLogger(__name__)

JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write settings and figures to this file, not to stdout.")
]
Device = Annotated[str, typer.Option(metavar="NAME", help="cpu, cuda or auto.")]
Quick = Annotated[bool, typer.Option("--quick", help="Use a smaller setting, for a first look.")]

app = typer.Typer(
    help="Measure speed and memory on this machine.",
    rich_markup_mode=None,
    epilog=examples("bench", "users --quick", "store --json store.json"),
)


def publish(result: dict[str, Any], path: Path | None) -> None:
    """Print a benchmark's result as JSON; with a file, write the JSON there and print only the figures."""
    if path is None:
        typer.echo(json.dumps(result, indent=2))
        return
    write_json(path, result, shared=True)
    for name, value in result["figures"].items():
        typer.echo(f"{name:32} {value}")


@app.command(epilog=examples("bench", "users", "users --quick --json figures.json"))
def users(json_file: JsonFile = None, quick: Quick = False, device: Device = "auto") -> None:
    """Measure how many users per hour get an adapter.

    Compares it with one Trainer per user, with a single slot, and with one LoRA for all users on the same batches.
    """
    from proper.benchmarks.users import QUICK, UsersBenchSize, run

    publish(run(QUICK if quick else UsersBenchSize(), device), json_file)


@app.command(epilog=examples("bench", "groups", "groups --quick --json figures.json"))
def groups(json_file: JsonFile = None, quick: Quick = False, device: Device = "auto") -> None:
    """Time a training step of stage 2.

    Compares fused experts with a loop over experts and with one LoRA of as many parameters.
    """
    from proper.benchmarks.groups import QUICK, GroupsBenchSize, run

    publish(run(QUICK if quick else GroupsBenchSize(), device), json_file)


@app.command(epilog=examples("bench", "serve --quick", "serve --json serve.json"))
def serve(json_file: JsonFile = None, quick: Quick = False, device: Device = "auto") -> None:
    """Time answers for 32 users at once.

    Compares them with the backbone alone, one user, PEFT's mixed batch and plain generate. Also measures the time to
    the first token with 16 users per slot.
    """
    from proper.benchmarks.serve import QUICK, ServeBenchSize, run

    publish(run(QUICK if quick else ServeBenchSize(), device), json_file)


@app.command(epilog=examples("bench", "store --quick", "store --json store.json", "store --folder /mnt/disk"))
def store(
    json_file: JsonFile = None,
    quick: Quick = False,
    folder: Annotated[
        Path | None, typer.Option(help="A folder on the disk to measure; uses a temporary folder in it.")
    ] = None,
) -> None:
    """Time the store: one large adapter, a million small ones.

    Loads an adapter of 11.6 MB into a slot and compares it with a plain memcpy and with PEFT's load_adapter. Writes,
    looks up, deletes and compacts a million users of 4 KiB each (--quick: 100,000), which needs about 7 GB of disk
    (--quick: 0.7 GB).
    """
    from proper.benchmarks.store import MANY, QUICK, run

    publish(run(folder, users=QUICK if quick else MANY), json_file)
