"""Arguments and options that several commands share, and their checks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from proper.errors import InputError, did_you_mean
from proper.run_folder import require_run

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML config.", show_default=False)]
RunFolder = Annotated[Path, typer.Argument(metavar="DIR", help="A run folder.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, as in groups.experts=8; repeatable."),
]
SkipBadRows = Annotated[
    bool, typer.Option("--skip-bad-rows", help="Leave out rows that cannot be read, and report how many.")
]


def existing_run(folder: Path) -> Path:
    """Return `folder` if it is a run folder.

    Raises:
        RunFolderError: it is not one.
    """
    return require_run(folder).path


def size_in_bytes(option: str, text: str) -> int:
    """Return the bytes that `64MiB`, `1.5G`, `4096` or `0` stand for; K, M and G are powers of 1024.

    Raises:
        InputError: `text` is not a size; the message names the option.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?)(?:i?b)?", text.strip(), re.IGNORECASE)
    if found is None:
        raise InputError(f"{option}: {text!r} is not a size, write it as 64MiB, 1GiB or 0")
    return int(float(found[1]) * 1024 ** ["", "k", "m", "g"].index(found[2].lower()))


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
