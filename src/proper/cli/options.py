"""Arguments and options that several commands share, and their checks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from proper.errors import InputError, did_you_mean

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML config.", show_default=False)]
RunFolder = Annotated[Path, typer.Argument(metavar="DIR", help="A run folder.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, as in groups.experts=8; repeatable."),
]
SkipBadRows = Annotated[
    bool, typer.Option("--skip-bad-rows", help="Leave out rows that cannot be read, and report how many.")
]

Stores = Annotated[
    list[str] | None,
    typer.Option(
        "--store",
        metavar="URL",
        help="Where a new run keeps its adapters (s3://BUCKET/PREFIX) or its state (postgresql://USER@HOST/DATABASE); "
        "repeatable.",
    ),
]


def examples(group: str, *lines: str) -> str:
    """Return the examples at the end of the help of a command of `proper GROUP`."""
    return "\b\nExamples:\n" + "\n".join(f"  proper {group} {line}" for line in lines)


def chosen(option: str, text: str, known: Sequence[str] | None = None) -> list[str]:
    """Split `a,b` into names, and check them against `known` if it is given.

    Raises:
        InputError: there is no name, or an unknown one; the message names the option.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise InputError(f"{option}: names are missing, write it as a,b")
    for name in names:
        if known is not None and name not in known:
            raise InputError(f"{option}: unknown name '{name}'; {did_you_mean(name, known)}")
    return names
