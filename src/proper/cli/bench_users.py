"""`proper bench users` and `proper bench groups`: how fast adapters and experts are trained.

Knows nothing about what is timed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

USERS_EXAMPLES = """\
  proper bench users
  proper bench users --quick --json users.json
"""

GROUPS_EXAMPLES = """\
  proper bench groups
  proper bench groups --quick --json groups.json
"""

Quick = Annotated[bool, typer.Option("--quick", help="Fewer users and repeats; at most 5 minutes on 2 cores.")]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures there as well.")]
Device = Annotated[str, typer.Option(metavar="NAME", help="cpu, cuda or auto.")]


def users(quick: Quick = False, json: Json = None, device: Device = "auto") -> None:
    """Time how many users an hour get an adapter.

    Beside it: a Trainer per user, one slot, and one LoRA for everybody on the same batches.
    """
    from proper.benchmarks import users as benchmark
    from proper.console import say

    _tell(benchmark.run(benchmark.QUICK if quick else benchmark.Size(), device, say), json)


def groups(quick: Quick = False, json: Json = None, device: Device = "auto") -> None:
    """Time a step of stage 2.

    Fused experts beside a loop over experts and beside one LoRA of as many numbers.
    """
    from proper.benchmarks import groups as benchmark
    from proper.console import say

    _tell(benchmark.run(benchmark.QUICK if quick else benchmark.Size(), device, say), json)


def _tell(found: dict[str, object], path: Path | None) -> None:
    """Print the figures, one a line, and write everything to a file where one is given."""
    from proper.files import write_json

    figures = found["figures"]
    assert isinstance(figures, dict)
    for name, value in figures.items():
        typer.echo(f"{name:32} {value}")
    if path is not None:
        write_json(path, found)
        typer.echo(path)
