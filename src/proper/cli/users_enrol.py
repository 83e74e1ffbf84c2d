"""Commands `proper users enrol` and `update`: fit new users, new interactions, or the fit queue (the fit worker)."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from proper.cli.options import RunFolder, examples
from proper.cli.users import known, opened
from proper.config import load_run_config
from proper.console import progress, silent
from proper.errors import InputError, ProperError
from proper.run_folder import Tier, require_run

if TYPE_CHECKING:
    from proper.api import Users
    from proper.enrolment.fit_user import Fitter
    from proper.interactions.log import LogEntry

logger = logging.getLogger(__name__)

app = typer.Typer(rich_markup_mode=None)

_INPUT = typer.Option(
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
    input_file: Annotated[Path, _INPUT],
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
            help="Fit the users. Without, they keep the embeddings that the run's encoder places; 'proper users "
            "update' fits them later.",
        ),
    ] = True,
) -> None:
    """Add and fit new users; print their tier and version.

    Places each user's embedding by the run's encoder, without training. Then fits the embedding, and an adapter, which
    is kept if it helps on held-out items of the user. No other user's state changes. The interactions are kept: after
    an interruption, 'proper users update' continues the fit.
    """
    entries = _entries_of_users(folder, user, input_file)
    with _users(folder) as users:
        for each in entries:
            if each in users:
                raise InputError(f"--user {each}: exists already; 'proper users update' adds interactions")
        if user is not None and refine:
            _append(users, user, entries[user], new=True)
            return
        with _bars(len(entries)) as heard:
            users.enrol_many(entries, refine=refine, heard=heard)
        for each in entries:
            _print(users, each)


@app.command(
    epilog=examples(
        "users",
        "update runs/notes --user ann --input more.jsonl",
        "update runs/notes --user ann",
        "update runs/notes",
        "update runs/notes --watch",
    )
)
def update(
    folder: RunFolder,
    user: Annotated[str | None, typer.Option("--user", metavar="U", help="The user's id.", show_default=False)] = None,
    input_file: Annotated[Path | None, _INPUT] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Keep fitting queued users until SIGTERM or Ctrl-C.")] = False,
    parent: Annotated[
        int | None,
        typer.Option(metavar="PID", help="With --watch: exit when this parent process does."),
    ] = None,
) -> None:
    """Fit a user to new interactions, or all queued users.

    Adds the interactions to the user's log and fits the user to all their interactions: the training data of the run,
    if it still exists, and everything logged since. Without --user, fits every user in the queue. The result is a new
    version; 'proper users rollback' goes back. With --watch this is the fit worker of 'proper serve'.
    """
    if input_file is not None and user is None:
        raise InputError("--input: the user is missing; give --user as well")
    if watch:
        if user is not None:
            raise InputError("--watch: fits all queued users; leave --user out")
        _watch(folder, parent)
        return
    entries = [] if user is None or input_file is None else _entries(folder, user, input_file)
    with _users(folder) as users:
        if user is None:
            _fit_all(users)
            return
        if user not in users:
            known(users.store, user)
        _append(users, user, entries, new=False)


def _entries(folder: Path, user: str, path: Path) -> list[LogEntry]:
    run = require_run(folder)
    from proper.interactions.parsing import read_file, record_reader

    config = load_run_config(run.config)
    return read_file(path, record_reader(config.data, config.task, user))


def _entries_of_users(folder: Path, user: str | None, path: Path) -> dict[str, list[LogEntry]]:
    if user is not None:
        return {user: _entries(folder, user, path)}
    run = require_run(folder)
    from proper.interactions.parsing import read_users

    config = load_run_config(run.config)
    return read_users(path, config.data, config.task)


@contextmanager
def _users(folder: Path) -> Iterator[Users]:
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


def _append(users: Users, user: str, entries: list[LogEntry], *, new: bool) -> None:
    with users.log.queue.lock(wait=False) as free:
        if not free:
            logger.info("another process is fitting a user; waiting for it")
    with _bar(f"fit {user if user.isprintable() else 'the user'}") as heard:
        users.append(user, entries, new=new, heard=heard)
    _print(users, user)


def _fit_all(users: Users) -> None:
    waiting = users.log.queue.waiting()
    with progress("fit", len(waiting)) as advance:
        while users.worker.waiting() and users.worker.fit_next():
            advance(1)
    failed = 0
    for tenant, user in waiting:
        fit = users.log.queue.fit(tenant, user)
        failed += fit.state == "failed"
        if tenant == users.store.tenant:
            _print(users, user)
        if fit.state == "failed":
            logger.warning(f"user {user!r} could not be fitted: {fit.message}")
    if not waiting:
        logger.info("no user is queued")
    if failed:
        raise ProperError(f"{failed} of {len(waiting)} users could not be fitted")


def _print(users: Users, user: str) -> None:
    head, fit = users.head(user), users.log.queue.fit(users.store.tenant, user)
    tier, version = (Tier.NONE, "-") if head is None else (head.tier, str(head.version))
    typer.echo(f"{user if user.isprintable() else repr(user)}\t{tier}\t{version}")
    if fit.message is not None and fit.state == "done":
        logger.info(fit.message)


@contextmanager
def _bar(title: str) -> Iterator[Callable[[str, float], None]]:
    """Show the progress of a fit in percent; yields the callback for its phase and progress."""
    shown = 0
    with progress(title, 100) as advance:

        def heard(phase: str, share: float) -> None:
            nonlocal shown
            now = int(100 * share)
            advance(max(0, now - shown), phase)
            shown = max(shown, now)

        yield heard
        advance(100 - shown)


@contextmanager
def _bars(total: int) -> Iterator[Callable[[str, float], None]]:
    """Show a bar of users for each phase; yields the callback for the phase and its progress."""
    with ExitStack() as bars:
        shown: dict[str, tuple[Callable[..., None], int]] = {}

        def heard(phase: str, share: float) -> None:
            if phase not in shown:
                bars.close()
                shown[phase] = bars.enter_context(progress(f"users: {phase}", total)), 0
            advance, before = shown[phase]
            now = round(share * total)
            advance(now - before)
            shown[phase] = advance, now

        yield heard


class _Ended(BaseException):
    """SIGTERM was received, or the parent process is gone."""


def _watch(folder: Path, parent: int | None) -> None:
    if parent is not None:
        os.nice(10)  # requests of the server have priority

    def end(*_: Any) -> None:
        raise _Ended

    def heard(phase: str, share: float) -> None:
        if parent is not None and os.getppid() != parent:
            raise _Ended

    before = signal.signal(signal.SIGTERM, end)
    try:
        with _users(folder) as users, silent():
            # Messages of fits name users, and user ids stay out of a server's log.
            users.worker.watch(heard)
    except _Ended:
        logger.info("proper: the fit worker stops; an unfinished fit is queued again")
    finally:
        signal.signal(signal.SIGTERM, before)
