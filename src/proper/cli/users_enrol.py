"""Command `proper users enrol`: adds and fits new users; and helpers of all commands that fit users."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from proper.cli.options import RunFolder, examples
from proper.cli.users import opened, printable
from proper.config import load_run_config
from proper.console import progress
from proper.errors import InputError
from proper.run_folder import Tier, require_run

if TYPE_CHECKING:
    from proper.api import Users
    from proper.enrolment.fit_user import Fitter
    from proper.interactions.log import LogEntry

logger = logging.getLogger(__name__)

app = typer.Typer(rich_markup_mode=None)

INPUT = typer.Option(
    "--input",
    metavar="FILE",
    help="JSONL, one interaction per line: the run's columns, or prompt and target. Equal ids count once.",
    show_default=False,
)


@app.command(
    epilog=examples(
        "users",
        "enrol runs/notes --user ann --input ann.jsonl",
        "enrol runs/notes --input new-users.jsonl",
        "enrol runs/notes --input new-users.jsonl --no-refine",
    )
)
def enrol(
    folder: RunFolder,
    input_file: Annotated[Path, INPUT],
    user: Annotated[
        str | None,
        typer.Option(
            "--user",
            metavar="U",
            help="The user's id. Without it, every line names its user in the run's user column.",
            show_default=False,
        ),
    ] = None,
    refine: Annotated[
        bool,
        typer.Option(
            "--refine/--no-refine",
            help="Fit the users now. With --no-refine they keep the encoder's embeddings until 'proper users update'.",
        ),
    ] = True,
) -> None:
    """Add and fit new users; print their tier and version.

    Places each user's embedding with the run's encoder, without training. Then fits the embedding and an adapter, which
    is kept if it helps on held-out items of the user. No other user's state changes. The interactions are logged first:
    after an interruption, 'proper users update' continues the fit.
    """
    entries = _entries_of_users(folder, user, input_file)
    with open_users(folder) as users:
        for each in entries:
            if each in users:
                where = f"--user {each}:" if user is not None else f"{input_file}: user {each!r}"
                raise InputError(f"{where} exists already; 'proper users update' adds interactions")
        if user is not None and refine:
            append(users, user, entries[user], input_file, new=True)
            return
        with _naming(input_file), _bars(len(entries)) as on_progress:
            users.enrol_many(entries, refine=refine, on_progress=on_progress)
        for each in entries:
            print_user(users, each)


def read_entries(folder: Path, user: str, path: Path) -> list[LogEntry]:
    """Read one user's interactions from a file, for the run's columns."""
    run = require_run(folder)
    from proper.interactions.parsing import read_file, record_reader, with_known_labels

    config = load_run_config(run.config)
    return read_file(path, record_reader(config.data, with_known_labels(folder, config.task), user))


def _entries_of_users(folder: Path, user: str | None, path: Path) -> dict[str, list[LogEntry]]:
    if user is not None:
        return {user: read_entries(folder, user, path)}
    run = require_run(folder)
    from proper.interactions.parsing import read_users, with_known_labels

    config = load_run_config(run.config)
    return read_users(path, config.data, with_known_labels(folder, config.task))


@contextmanager
def open_users(folder: Path) -> Iterator[Users]:
    """Open a run's users; the model is loaded when there is a user to fit."""
    with opened(folder) as store:
        from proper.api import Users

        with _fitter(folder) as fitter, closing(Users(folder, store, fitter)) as users:
            yield users


@contextmanager
def _fitter(folder: Path) -> Iterator[Callable[[], Fitter]]:
    made: list[Fitter] = []

    def make() -> Fitter:
        if not made:
            from proper.enrolment.fit_user import open_fitter
            from proper.inference import load

            made.append(open_fitter(folder, load(folder)))
        return made[0]

    try:
        yield make
    finally:
        for fitter in made:
            fitter.close()


@contextmanager
def _naming(path: Path | None) -> Iterator[None]:
    """Name the file in the error for an interaction that another one contradicts."""
    from proper.interactions.log import ConflictError

    try:
        yield
    except ConflictError as error:
        raise InputError(f"{path}: {error}") from error


def append(users: Users, user: str, entries: list[LogEntry], path: Path | None, *, new: bool) -> None:
    """Log a user's interactions from a file, fit the user with a progress bar, and print the result."""
    with users.log.queue.lock(wait=False) as free:
        if not free:
            logger.info("another process is fitting a user; waiting for it")
    with _naming(path), _bar(f"fit {user if user.isprintable() else 'the user'}") as on_progress:
        users.append(user, entries, new=new, on_progress=on_progress)
    print_user(users, user)


def print_user(users: Users, user: str) -> None:
    """Print a user's tier and version, and log the message of the latest fit."""
    head, fit = users.head(user), users.log.queue.fit(users.store.tenant, user)
    tier, version = (Tier.NONE, "-") if head is None else (head.tier, str(head.version))
    typer.echo(f"{printable(user)}\t{tier}\t{version}")
    if fit.message is not None and fit.state == "done":
        logger.info(fit.message)


@contextmanager
def _bar(title: str) -> Iterator[Callable[[str, float], None]]:
    """Show the progress of a fit in percent; yields the callback for its phase and progress."""
    shown = 0
    with progress(title, 100) as advance:

        def on_progress(phase: str, share: float) -> None:
            nonlocal shown
            now = int(100 * share)
            advance(max(0, now - shown), phase)
            shown = max(shown, now)

        yield on_progress
        advance(100 - shown)


@contextmanager
def _bars(total: int) -> Iterator[Callable[[str, float], None]]:
    """Show a bar of users for each phase; yields the callback for the phase and its progress."""
    with ExitStack() as bars:
        shown: dict[str, tuple[Callable[..., None], int]] = {}

        def on_progress(phase: str, share: float) -> None:
            if phase not in shown:
                bars.close()
                shown[phase] = bars.enter_context(progress(f"users: {phase}", total)), 0
            advance, before = shown[phase]
            now = round(share * total)
            advance(now - before)
            shown[phase] = advance, now

        yield on_progress
