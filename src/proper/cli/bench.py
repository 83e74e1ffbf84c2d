"""`proper bench`: speed and memory on this machine. Knows nothing about how they are measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from proper.console import say
from proper.files import write_json

JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write setting and figures here, not to stdout.")
]
Device = Annotated[str, typer.Option(metavar="NAME", help="cpu, cuda or auto.")]
Quick = Annotated[bool, typer.Option("--quick", help="A smaller setting, for a first look.")]

app = typer.Typer(
    help="Measure speed and memory on this machine.",
    rich_markup_mode=None,
    epilog="\b\nExamples:\n  proper bench users --quick\n  proper bench store --json store.json",
)


def examples(*lines: str) -> str:
    """Return the end of a command's help."""
    return "\b\nExamples:\n" + "\n".join(f"  proper bench {line}" for line in lines)


def publish(result: dict[str, Any], path: Path | None) -> None:
    """Print what a benchmark found; with a file, all goes there and the figures alone are printed."""
    if path is None:
        typer.echo(json.dumps(result, indent=2))
        return
    write_json(path, result, shared=True)
    for name, value in result["figures"].items():
        typer.echo(f"{name:32} {value}")


@app.command(epilog=examples("users", "users --quick --json users.json"))
def users(json_file: JsonFile = None, quick: Quick = False, device: Device = "auto") -> None:
    """Time how many users an hour get an adapter.

    Beside it: a Trainer per user, one slot, and one LoRA for everybody on the same batches.
    """
    from proper.benchmarks.users import QUICK, UsersBenchSize, run

    publish(run(QUICK if quick else UsersBenchSize(), device, say), json_file)


@app.command(epilog=examples("groups", "groups --quick --json groups.json"))
def groups(json_file: JsonFile = None, quick: Quick = False, device: Device = "auto") -> None:
    """Time a step of stage 2.

    Fused experts beside a loop over experts and beside one LoRA of as many numbers.
    """
    from proper.benchmarks.groups import QUICK, GroupsBenchSize, run

    publish(run(QUICK if quick else GroupsBenchSize(), device, say), json_file)


@app.command(epilog=examples("serve --quick", "serve --json serve.json"))
def serve(json_file: JsonFile = None, quick: Quick = False, device: Device = "auto") -> None:
    """Time answers for 32 people at once.

    Beside them: the backbone alone, one person, PEFT's mixed batch and plain generate; and the time to the first token
    with 16 users to a slot.
    """
    from proper.benchmarks.serve import QUICK, ServeBenchSize, run

    publish(run(QUICK if quick else ServeBenchSize(), device, say), json_file)


@app.command(epilog=examples("store --quick", "store --json store.json", "store --folder /mnt/disk"))
def store(
    json_file: JsonFile = None,
    quick: Quick = False,
    folder: Annotated[
        Path | None, typer.Option(help="On the disk to measure; a temporary folder in it is used and removed.")
    ] = None,
) -> None:
    """Load one large adapter and keep a million small ones.

    The load of 11.6 MB into its slot stands beside a plain memcpy and PEFT's load_adapter. A million users of 4 KiB
    (--quick: 100,000) are put, looked up, deleted and compacted; that needs some 7 GB of disk (--quick: 0.7 GB).
    """
    from proper.benchmarks.store import MANY, QUICK, run

    publish(run(folder, users=QUICK if quick else MANY, say=say), json_file)
