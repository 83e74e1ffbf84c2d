"""Commands `proper bench ...`: benchmarks of speed and memory on this machine."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from proper.cli.options import examples
from proper.config import LastLayers
from proper.errors import InputError, ProperError
from proper.files import write_json

logger = logging.getLogger(__name__)

JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write settings and figures to this file, not to stdout.")
]
Device = Annotated[str, typer.Option(metavar="NAME", help="cpu, cuda or auto.")]
BackboneName = Annotated[
    str | None, typer.Option("--backbone", metavar="NAME", help="The backbone; proper-nano if not given.")
]
ServeBackboneName = Annotated[
    str | None,
    typer.Option("--backbone", metavar="NAME", help="Measure this backbone instead of the two, such as proper-nano."),
]
ShapeName = Annotated[
    str | None,
    typer.Option("--shape", metavar="NAME", help="Use random weights of this model's shape: smollm2-135m."),
]
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
    try:
        write_json(path, result, shared=True)
    except ProperError:
        typer.echo(json.dumps(result, indent=2))  # measured for minutes
        raise
    for name, value in result["figures"].items():
        typer.echo(f"{name:32} {value}")


@app.command(epilog=examples("bench", "users", "users --quick --json figures.json", "users --shape smollm2-135m"))
def users(
    json_file: JsonFile = None,
    quick: Quick = False,
    device: Device = "auto",
    backbone: BackboneName = None,
    shape: ShapeName = None,
    layers: Annotated[
        str, typer.Option(metavar="LIST", help="Adapted layers: all or the last N; several are compared: 10,15,all.")
    ] = "all",
) -> None:
    """Measure how many users per hour get an adapter.

    Compares it with one Trainer per user, with a single slot, and with one LoRA for all users on the same batches.
    Larger backbones than proper-nano get fewer users.
    """
    from proper.benchmarks.backbones import BenchBackbone
    from proper.benchmarks.users import LARGE, QUICK, run
    from proper.benchmarks.users_setup import UsersBenchSize

    chosen = BenchBackbone.of(backbone, shape)
    size = QUICK if quick else UsersBenchSize()
    if chosen != size.backbone:
        size = replace(LARGE, items=6, users=8) if quick else LARGE
    publish(run(replace(size, backbone=chosen, layers=_layers(layers)), device), json_file)


def _layers(text: str) -> tuple[LastLayers, ...]:
    """Return the values of a list of adapted layers."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part == "all" or (part.isdecimal() and int(part) > 0) for part in parts) or len({*parts}) < len(parts):
        raise InputError(f"--layers: '{text}' should be all or numbers of layers, each once, such as 10,15,all")
    return tuple("all" if part == "all" else int(part) for part in parts)


@app.command(epilog=examples("bench", "groups", "groups --quick --json figures.json"))
def groups(
    json_file: JsonFile = None,
    quick: Quick = False,
    device: Device = "auto",
    backbone: BackboneName = None,
    shape: ShapeName = None,
) -> None:
    """Time a training step of stage 2.

    Compares fused experts with a loop over experts and with one LoRA of as many parameters.
    """
    from proper.benchmarks.backbones import BenchBackbone
    from proper.benchmarks.groups import QUICK, GroupsBenchSize, run

    size = QUICK if quick else GroupsBenchSize()
    publish(run(replace(size, backbone=BenchBackbone.of(backbone, shape)), device), json_file)


@app.command(epilog=examples("bench", "serve --quick", "serve --json serve.json"))
def serve(
    json_file: JsonFile = None,
    quick: Quick = False,
    device: Device = "auto",
    backbone: ServeBackboneName = None,
    shape: ShapeName = None,
    layers: Annotated[str, typer.Option(metavar="N", help="Adapted layers: all or the last N.")] = "all",
) -> None:
    """Time answers for 32 users at once.

    Compares them with the backbone alone, one user, PEFT's mixed batch and plain generate. Also measures the time to
    the first token with 16 users per slot. Without --backbone or --shape, two backbones are measured: a random Llama
    and proper-nano.
    """
    from proper.benchmarks.backbones import BenchBackbone
    from proper.benchmarks.serve import QUICK, ServeBenchSize, run

    adapted, *more = _layers(layers)
    if more:
        raise InputError(f"--layers: '{layers}' should be all or one number of layers")
    size = replace(QUICK if quick else ServeBenchSize(), adapted=adapted)
    if backbone is not None or shape is not None:
        size = replace(size, backbone=BenchBackbone.of(backbone, shape))
    publish(run(size, device), json_file)


@app.command(epilog=examples("bench", "store --quick", "store --json store.json", "store --store s3://adapters/bench"))
def store(
    json_file: JsonFile = None,
    quick: Quick = False,
    folder: Annotated[
        Path | None, typer.Option(help="A folder on the disk to measure; uses a temporary folder in it.")
    ] = None,
    url: Annotated[
        str | None,
        typer.Option("--store", metavar="URL", help="Object storage to compare with a folder: s3://BUCKET/PREFIX."),
    ] = None,
) -> None:
    """Time the store: one large adapter, a million small ones.

    Loads an adapter of 11.6 MB into a slot and compares it with a plain memcpy and with PEFT's load_adapter. Writes,
    looks up, deletes and compacts a million users of 4 KiB each (--quick: 100,000), which needs about 7 GB of disk
    (--quick: 0.7 GB). With --store, times loads of the large adapter from the bucket and from its cache instead, beside
    loads from a folder, and removes what it wrote to the bucket.
    """
    from proper.benchmarks.store import MANY, QUICK, run

    publish(run(folder, users=QUICK if quick else MANY, repeats=40 if quick and url else 400, url=url), json_file)
