"""From the queue to the store: takes whoever waits, fits them, puts the new version, says how it went.

One process fits at a time. A kill at any moment leaves a fit that is queued again and goes on from its checkpoint; a
user who is deleted meanwhile does not come back. Knows nothing about how a user is fitted.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from proper.adapters.store import AdapterStore, UserRecord
from proper.enrolment.fit_user import Fitter
from proper.enrolment.history import grown_history
from proper.errors import ProperError
from proper.interactions.database import FILE, Database
from proper.interactions.fit_queue import Claim, FitQueue
from proper.interactions.log import InteractionLog
from proper.interactions.personal_files import fits_folder, remove_work, work_folder
from proper.training.users import is_held

TOLD_SECONDS = 0.2
"""How often a fit says how far it is, and hears whether its user was deleted."""
POLL_SECONDS = 0.25

Heard = Callable[[str, float], None]
"""Takes the phase and the share of a fit that is done."""


class _Withdrawn(Exception):
    """The user was deleted while they were fitted."""


def _unheard(phase: str, share: float) -> None:
    """Nobody listens."""


@dataclass(frozen=True)
class FitWorker:
    """A run's queue and who works on it.

    Attributes:
        users: the folder of store and log.
        fitter: makes the run ready; called when there is first something to do, and no claim is held meanwhile.
    """

    users: Path
    log: InteractionLog
    fitter: Callable[[], Fitter]

    def fit_next(self, tenant: str | None = None, user: str | None = None, heard: Heard = _unheard) -> bool:
        """Fit whoever has waited longest, or this user; return False where nobody waits.

        Blocks while another process fits. A fit that fails says so in the queue.
        """
        fitter = self.fitter()
        with self.log.queue.lock():
            self._tidy()
            claim = self.log.queue.take(tenant, user)
            if claim is None:
                return False
            try:
                self._fit(fitter, claim, heard)
            except _Withdrawn:
                remove_work(self.users, claim.tenant, claim.user)
            except Exception as error:
                # Out of memory, a loss that is no number, a disk that is full: the next user may do better.
                self.log.queue.fail(claim, str(error) if isinstance(error, ProperError) else type(error).__name__)
            except BaseException:
                self.log.queue.release(claim)
                raise
        return True

    def watch(self, heard: Heard = _unheard) -> None:
        """Fit whoever comes, until `heard` raises; it is also called now and then while nobody waits."""
        while True:
            heard("idle", 0.0)
            if not (self.waiting() and self.fit_next(heard=heard)):
                time.sleep(POLL_SECONDS)

    def waiting(self) -> int:
        """How many wait, those included whom a dead process left behind."""
        figures = self.log.queue.figures()
        return figures.queued + figures.fitting

    def _fit(self, fitter: Fitter, claim: Claim, heard: Heard) -> None:
        with (
            closing(AdapterStore(self.users, claim.tenant)) as store,
            closing(Database(self.users / FILE, durable=False)) as database,
        ):
            model = fitter.model
            count, kind = model.encoder.count, model.config.task.kind
            grown = grown_history(fitter.dataset, self.log, claim.tenant, claim.user, count, kind)
            if not grown.items:
                self.log.queue.done(claim, None, "no interactions yet")
                return
            tell = _throttled(FitQueue(database), claim, heard)
            work = work_folder(self.users, claim.tenant, claim.user)
            record = fitter.fit(store, claim.user, grown, work, tell)
            self._land(store, claim, record)

    def _land(self, store: AdapterStore, claim: Claim, record: UserRecord) -> None:
        """Put what a fit made, unless its user was deleted meanwhile."""
        with self.log.queue.ending(claim) as stands:
            if not stands:
                raise _Withdrawn
            if not is_held(store, record):  # from before a kill
                store.put([record])
            remove_work(self.users, claim.tenant, claim.user)
            head = store.head(claim.user)
            self.log.queue.done(claim, None if head is None else head.version, describe(record))

    def _tidy(self) -> None:
        """Remove what interrupted fits left of users who do not wait any more."""
        folder = fits_folder(self.users)
        if folder.is_dir():
            kept = {work_folder(self.users, tenant, user) for tenant, user in self.log.queue.waiting()}
            for work in set(folder.iterdir()) - kept:
                shutil.rmtree(work, ignore_errors=True)


def describe(record: UserRecord) -> str:
    """Say in one line what a fit came to."""
    history = record.facts["history"]
    run = "the run's data is gone" if history["run"] is None else f"{history['run']} of the run"
    reason = record.facts.get("reason")
    return f"tier {record.tier}, {run}, {history['logged']} logged{f'; {reason}' if reason else ''}"


def _throttled(queue: FitQueue, claim: Claim, heard: Heard) -> Heard:
    """Return what tells the queue and a listener how far a fit is, not too often.

    What it returns raises `_Withdrawn` if the user was deleted.
    """
    last, before = 0.0, ""

    def tell(phase: str, share: float) -> None:
        nonlocal last, before
        now = time.monotonic()
        if phase == before and now - last < TOLD_SECONDS:
            return
        last, before = now, phase
        if not queue.advance(claim, round(min(share, 0.99), 3), phase):
            raise _Withdrawn
        heard(phase, share)

    return tell
