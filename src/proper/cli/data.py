"""Commands `proper data ...`: fetch and convert public data sets, or make one from a git history."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from proper.cli.options import examples
from proper.console import progress
from proper.errors import InputError, ProperError, did_you_mean

logger = logging.getLogger(__name__)

app = typer.Typer(
    name="data",
    help="Fetch, convert or make data sets.",
    epilog=examples("data", "list", "fetch movielens-small", "from-git . --out commits.parquet"),
    rich_markup_mode=None,
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="A name of `proper data list`.", show_default=False)]


@app.command("list", epilog=examples("data", "list"))
def list_datasets() -> None:
    """List the public data sets: name, license, and content of a row."""
    from proper.config.lamp_tasks import LAMP_TASKS
    from proper.data.public.catalog import DATASETS
    from proper.data.public.lamp import TERMS

    lines = [(each.name, each.terms, each.title) for each in DATASETS.values()]
    lines += [
        (task.name, TERMS, f"the LaMP benchmark, {task.kind}") for task in LAMP_TASKS.values() if task.name != "lamp-6"
    ]
    widths = [max(len(line[column]) for line in lines) for column in (0, 1)]
    for name, terms, title in lines:
        typer.echo(f"{name:<{widths[0]}}  {terms:<{widths[1]}}  {title}")


@app.command(
    "fetch",
    epilog=examples(
        "data",
        "fetch movielens-small",
        "fetch acl-titles --yes",
        "fetch lamp-3",
        "fetch lamp-2m --split time --out data/movies --yes",
    ),
)
def fetch(
    name: Name,
    split: Annotated[Literal["user", "time"], typer.Option(help="LaMP only: its split by user or by time.")] = "user",
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder to write; by default data/NAME, or data/NAME-time for LaMP by time.",
            show_default=False,
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Agree to the license without being asked.")] = False,
    url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Another address of the file, such as a mirror.", show_default=False),
    ] = None,
    site: Annotated[
        str | None,
        typer.Option(
            metavar="URL", envvar="PROPER_LAMP_SITE", help="LaMP only: another copy of its site.", show_default=False
        ),
    ] = None,
) -> None:
    """Download a public data set.

    Converts it to the columns that configs/ use. Shows the license and asks for agreement first. An interrupted
    download resumes. Checksums are kept in SHA256SUMS beside the files, and files that exist already are compared with
    it. Prints the folder.
    """
    from proper.data.public.catalog import DATASETS, fetch_dataset
    from proper.data.public.lamp import LICENSE, SITE, fetch_task, fetchable_task

    dataset = DATASETS.get(name.lower())
    if dataset is not None:
        folder = out or Path("data") / dataset.name
        fetch_dataset(dataset, folder, url, lambda: _agree(dataset.license, yes))
    else:
        task = fetchable_task(name)
        folder = out or Path("data") / (task.name if split == "user" else f"{task.name}-time")
        _agree(LICENSE, yes)
        fetch_task(task, split, folder, url or site or SITE)
    typer.echo(folder)


@app.command(
    "convert",
    epilog=examples(
        "data",
        "convert huffpost-news ~/Downloads/archive.zip",
        "convert movielens-small ml-latest-small.zip --out data/movielens-small",
    ),
)
def convert(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="movielens-small, huffpost-news or acl-titles.", show_default=False)
    ],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file as published.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder to write; data/NAME by default.", show_default=False)
    ] = None,
) -> None:
    """Convert a published file that you downloaded.

    The rows get the columns that configs/ use. The same file gives the same rows in the same order. Prints the folder.
    """
    from proper.data.public.catalog import DATASETS, convert_dataset

    dataset = DATASETS.get(name.lower())
    if dataset is None:
        raise InputError(f"no data set '{name}' can be converted; {did_you_mean(name, [*DATASETS])}")
    folder = out or Path("data") / dataset.name
    logger.info(dataset.license)
    convert_dataset(dataset, file, folder)
    typer.echo(folder)


@app.command(
    "from-git",
    epilog=examples(
        "data",
        "from-git . --out commits.parquet",
        "from-git ~/src/linux --out linux.parquet --min-words 20",
    ),
)
def from_git(
    repository: Annotated[Path, typer.Argument(metavar="REPO", help="A git repository.", show_default=False)],
    out: Annotated[Path, typer.Option(metavar="FILE.parquet", help="The file to write.", show_default=False)],
    min_words: Annotated[int, typer.Option(min=0, help="Minimum number of words of a commit's body.")] = 12,
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

    if out.suffix.lower() not in (".parquet", ".pq"):
        raise InputError(f"--out {out}: the file is Parquet, and a config takes its format from the name: FILE.parquet")
    total = count_commits(repository)
    with progress("commits", total) as advance:
        rows, users = write_git_history(repository, out, CommitFilter(min_words, max_chars, salt), advance)
    logger.info("%d of %d commits by %d authors", rows, total, users)
    typer.echo(out)


def _agree(license_text: str, yes: bool) -> None:
    """Show a license and ask for agreement unless `yes`."""
    logger.info(license_text)
    if yes:
        return
    if not sys.stdin.isatty():
        raise InputError("the license must be agreed to; --yes agrees without a terminal")
    # Not typer.confirm: it writes a space to stdout.
    typer.echo("Agree and fetch? [y/N]: ", err=True, nl=False)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise ProperError("not agreed to; nothing was fetched")
