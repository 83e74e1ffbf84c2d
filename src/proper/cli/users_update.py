"""Commands `proper users update` and `drift`: update users with new interactions, run the fit worker, print drift."""

from __future__ import annotations

import json
import logging
import os
import signal
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from proper.cli.options import RunFolder, examples
from proper.cli.users import AsJson, known, log_of_users, opened, printable
from proper.cli.users_enrol import INPUT, append, open_users, print_user, read_entries
from proper.console import progress, silent
from proper.errors import InputError, ProperError
from proper.run_folder import require_run

if TYPE_CHECKING:
    from proper.api import Users

logger = logging.getLogger(__name__)

app = typer.Typer(rich_markup_mode=None)


@app.command(
    epilog=examples(
        "users",
        "update runs/notes --user ann --input more.jsonl",
        "update runs/notes --user ann",
        "update runs/notes",
        "update runs/notes --drifted --budget 100",
        "update runs/notes --watch",
    )
)
def update(
    folder: RunFolder,
    user: Annotated[str | None, typer.Option("--user", metavar="U", help="The user's id.", show_default=False)] = None,
    input_file: Annotated[Path | None, INPUT] = None,
    drifted: Annotated[
        bool, typer.Option("--drifted", help="Update users who have drifted or grown, the most drifted first.")
    ] = False,
    budget: Annotated[int | None, typer.Option(min=1, metavar="N", help="With --drifted: at most N users.")] = None,
    hours: Annotated[
        float | None,
        typer.Option(min=0.001, metavar="H", help="With --drifted: as many users as H hours allow."),
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Keep fitting queued users until SIGTERM or Ctrl-C.")] = False,
    parent: Annotated[
        int | None,
        typer.Option(metavar="PID", help="With --watch: exit when this parent process does."),
    ] = None,
) -> None:
    """Update a user with new interactions, or all queued users.

    Adds the interactions to the user's log and continues training from the version in service, on the new interactions
    and some earlier ones. The result is a new version if it lowers the loss on held-out interactions; otherwise the
    version in service stays, and the reason and both losses are printed and stored. 'proper users rollback' returns to
    the previous version. Without --user, updates all users in the queue; with --drifted, the drifted and grown users of
    'proper users drift'. With --watch this is the fit worker of 'proper serve'.
    """
    if not drifted and (budget is not None or hours is not None):
        raise InputError("--budget and --hours go with --drifted")
    if parent is not None and not watch:
        raise InputError("--parent goes with --watch")
    if drifted and (user is not None or input_file is not None or watch):
        raise InputError("--drifted: chooses the users itself; leave --user, --input and --watch out")
    if input_file is not None and user is None:
        raise InputError("--input: the user is missing; give --user as well")
    if watch:
        if user is not None:
            raise InputError("--watch: fits all queued users; leave --user out")
        _watch(folder, parent)
        return
    entries = [] if user is None or input_file is None else read_entries(folder, user, input_file)
    if user is not None:
        with opened(folder) as store, log_of_users(store, user) as log:
            if not log.knows(store.tenant, user):
                known(store, user)
    with open_users(folder) as users:
        if drifted:
            _update_drifted(users, budget, hours)
        elif user is None:
            _fit_all(users)
        else:
            append(users, user, entries, input_file, new=False)


@app.command(epilog=examples("users", "drift runs/notes", "drift runs/notes --json"))
def drift(folder: RunFolder, as_json: AsJson = False) -> None:
    """Print how unusual users' new interactions are.

    One line per user with new interactions, the most drifted first: user, number of new interactions, their mean loss
    and the user's usual loss (nats per token), the standardized difference, the CUSUM score, and the state: drifted
    (the score is at least users.drift.threshold), grown (as many interactions are new as the version was trained on),
    usual, or unknown. Then, for users whose gates the evaluation measured, the number of drifted users of each group,
    with the probability of at least that number if all groups drift equally; if it is small, 'proper groups refresh' is
    recommended. Nothing is trained, no texts are printed.
    """
    from proper.enrolment.drift import by_group

    with open_users(folder) as users:
        found = users.drift()
        for each in found:
            if as_json:
                typer.echo(json.dumps(asdict(each), ensure_ascii=False))
                continue
            losses = ["-" if value is None else f"{value:.3f}" for value in (each.loss, each.usual, each.z)]
            state = "usual" if each.usual is not None else "unknown"
            state = "drifted" if each.drifted else "grown" if each.grown else state
            typer.echo("\t".join([printable(each.user), str(each.new), *losses, f"{each.score:.2f}", state]))
        for group in by_group(found, _main_groups(folder)):
            line = (
                f"group {group.group}: {group.drifted} of {group.users} users have drifted (chance {group.chance:.3f})"
            )
            typer.echo(json.dumps(asdict(group))) if as_json else logger.info(line)
            if group.together:
                logger.info(
                    f"group {group.group} itself seems to have changed; to retrain, run: proper groups refresh {folder}"
                )
        seconds = users.log.updates.seconds()
    if seconds:
        logger.info(f"an update takes {seconds:.1f} s, about {3600 / seconds:,.0f} users per hour")
    if not found:
        logger.info("no user has new interactions")


def _main_groups(folder: Path) -> dict[str, int]:
    """Return the group with the highest mean gate of the users whose gates the evaluation measured."""
    from proper.reports.reading import objects, read_object  # loads numpy, which --help does not need

    path = require_run(folder).routing
    rows = objects(read_object(path).get("users"))
    return {str(row.get("user")): row["main"] for row in rows if isinstance(row.get("main"), int)}


def _update_drifted(users: Users, budget: int | None, hours: float | None) -> None:
    tried = users.update_drifted(budget, hours)
    for each in tried:
        print_user(users, each.user)
    logger.info(f"{len(tried)} updated or tried" if tried else "no update is due")


def _fit_all(users: Users) -> None:
    waiting = users.log.queue.waiting()
    with progress("fit", len(waiting)) as advance:
        while users.log.queue.has_work() and users.worker.fit_next():
            advance(1)
    failed = 0
    for tenant, user in waiting:
        fit = users.worker.fit(tenant, user)  # another worker may be fitting the user
        failed += fit.state == "failed"
        if tenant == users.store.tenant:
            print_user(users, user)
        if fit.state == "failed":
            logger.warning(f"user {user!r} could not be fitted: {fit.message}")
    if not waiting:
        logger.info("no user is queued")
    if failed:
        raise ProperError(f"{failed} of {len(waiting)} users could not be fitted")


class _Ended(BaseException):
    """SIGTERM was received, or the parent process is gone."""


def _watch(folder: Path, parent: int | None) -> None:
    if parent is not None:
        # Requests of the server have priority. By its weight, niceness 10 is a tenth of a core that other work uses.
        os.nice(5)

    def end(*_: Any) -> None:
        raise _Ended

    def on_progress(phase: str, share: float) -> None:
        if parent is not None and os.getppid() != parent:
            raise _Ended

    before = signal.signal(signal.SIGTERM, end)
    try:
        with open_users(folder) as users, silent():
            # Messages of fits name users, and user ids stay out of a server's log.
            users.worker.watch(on_progress)
    except _Ended:
        logger.info("proper: the fit worker stops; an unfinished fit is queued again")
    finally:
        signal.signal(signal.SIGTERM, before)
