"""Commands `proper data ...`: download LaMP benchmark data, or make a data set from a git history."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from proper.console import progress
from proper.errors import InputError, ProperError

logger = logging.getLogger(__name__)

EXAMPLES = """\
  proper data fetch lamp-3
  proper data fetch lamp-2m --split time --out data/movies --yes
"""
FROM_GIT_EXAMPLES = """\
  proper data from-git . --out commits.parquet
  proper data from-git ~/src/linux --out linux.parquet --min-words 20
"""

app = typer.Typer(
    name="data",
    help="Fetch or make data sets.",
    epilog=f"\b\nExamples:\n{EXAMPLES}{FROM_GIT_EXAMPLES}",
    rich_markup_mode=None,
)


@app.callback()
def group() -> None:
    """Fetch benchmark data, or make a data set from a git history."""


@app.command("fetch", epilog=f"\b\nExamples:\n{EXAMPLES}")
def fetch(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="lamp-1, -2m, -2n, -3, -4, -5 or -7.", show_default=False)
    ],
    split: Annotated[Literal["user", "time"], typer.Option(help="The benchmark's split by user or by time.")] = "user",
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder to write; data/NAME or data/NAME-time by default.", show_default=False
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Agree to the license without being asked.")] = False,
    site: Annotated[
        str | None,
        typer.Option(
            metavar="URL", envvar="PROPER_LAMP_SITE", help="Another copy of the benchmark's site.", show_default=False
        ),
    ] = None,
) -> None:
    """Download a task of the LaMP benchmark from its site.

    Shows the license and asks for agreement first. An interrupted download resumes. Checksums are kept in SHA256SUMS
    beside the files, and files that exist already are checked against it. Prints the folder, for data.path.
    """
    from proper.data.public.lamp import LICENSE, SITE, fetch_task, fetchable_task

    task = fetchable_task(name)
    folder = out or Path("data") / (task.name if split == "user" else f"{task.name}-time")
    logger.info(LICENSE)
    if not yes:
        _agree()
    fetch_task(task, split, folder, site or SITE)
    typer.echo(folder)


@app.command("from-git", epilog=f"\b\nExamples:\n{FROM_GIT_EXAMPLES}")
def from_git(
    repository: Annotated[Path, typer.Argument(metavar="REPO", help="A git repository.", show_default=False)],
    out: Annotated[Path, typer.Option(metavar="FILE.parquet", help="The file to write.", show_default=False)],
    min_words: Annotated[int, typer.Option(min=0, help="Fewest words of a commit's body.")] = 12,
    max_chars: Annotated[int, typer.Option(min=1, help="Length in characters to which a body is cut.")] = 800,
    salt: Annotated[
        str, typer.Option(help="Key of the authors' pseudonyms; the first commit's id by default.", show_default=False)
    ] = "",
) -> None:
    """Make a data set from a repository's commits.

    One row is one commit: its author (a pseudonym), time, body, subject, the subject's prefix, and the area it changes.
    Merges, short bodies and repeated subjects are left out, trailers are removed, addresses and URLs are masked. The
    columns are user_id, item_id, timestamp, subject, body, prefix and area. Prints the file's path.
    """
    from proper.data.public.git_history import CommitFilter, count_commits, write_git_history

    total = count_commits(repository)
    with progress("commits", total) as advance:
        rows, users = write_git_history(repository, out, CommitFilter(min_words, max_chars, salt), advance)
    logger.info(f"{rows} of {total} commits by {users} authors")
    typer.echo(out)


def _agree() -> None:
    if not sys.stdin.isatty():
        raise InputError("the license has to be agreed to; --yes does so where nobody can be asked")
    # Not typer.confirm: it writes a space to stdout.
    typer.echo("Agree and fetch? [y/N]: ", err=True, nl=False)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise ProperError("not agreed to; nothing was fetched")
