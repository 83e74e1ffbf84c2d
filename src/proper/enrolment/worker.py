"""Fitting worker: claims users from the fit queue, fits them, puts new versions into the store, records the outcome.

One process fits at a time. After a kill at any moment, the fit is queued again and resumes from its checkpoint; a user
who is deleted during the fit is not added again.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

from proper.adapters.store import AdapterStore
from proper.enrolment.drift import Drift, KnownVariance, drifts, not_due
from proper.enrolment.fit_progress import ProgressCallback, WithdrawnError, bar_of, no_progress, shares_of, throttled
from proper.enrolment.fit_user import Fitter, UserFit
from proper.enrolment.many_users import USERS_PER_BATCH, fit_many, place_users
from proper.enrolment.update_user import FitOutcome, fit_or_update
from proper.errors import ChangedError, ProperError, UnavailableError
from proper.files import is_full
from proper.interactions.database import Database
from proper.interactions.deletion import working
from proper.interactions.fit_queue import Claim, Fit, FitQueue
from proper.interactions.log import DeletedError, InteractionLog, LogEntry
from proper.interactions.personal_files import remove_work, work_folder
from proper.run_folder import UsersFolder
from proper.training.user_stage import is_stored

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.25


@dataclass(frozen=True)
class FitWorker:
    """Fits the users in a run's fit queue.

    Attributes:
        users: the folder of store and log.
        fitter: loads the run; called when the first fit is due, while no claim is held.
        placed: tenants and users in the queue whose embeddings have been placed.
        variances: the usual variance of each tenant's users.
    """

    users: Path
    log: InteractionLog
    fitter: Callable[[], Fitter]
    placed: set[tuple[str, str]] = field(default_factory=set)
    variances: dict[str, KnownVariance] = field(default_factory=dict)

    def fit_next(
        self,
        tenant: str | None = None,
        user: str | None = None,
        on_progress: ProgressCallback = no_progress,
        *,
        even_if_not_due: bool = False,
    ) -> bool:
        """Fit the user who has waited longest, or the given one; return False if no such fit is queued.

        With `users.update.when: drifted`, a user who has a version keeps it until an update is due (`drift`), unless
        `even_if_not_due`. Blocks while another process fits. A failure is recorded in the queue.

        Raises:
            ChangedError: the groups were refreshed since the run was loaded; the user keeps the place in the queue.
            UnavailableError: the run's database or bucket does not answer, or the disk is full; the user keeps the
                place in the queue.
        """
        fitter = self.fitter()
        with self.log.queue.lock():
            _refuse_outdated(fitter)
            self._remove_stale_work()
            if fitter.placer.encoder is not None:
                self._place_waiting(fitter)
            claim = self.log.queue.take(tenant, user)
            if claim is not None:
                self._fit_claimed(fitter, claim, on_progress, even_if_not_due)
            return claim is not None

    def fit(
        self, tenant: str, user: str, on_progress: ProgressCallback = no_progress, *, even_if_not_due: bool = False
    ) -> Fit:
        """Fit a user until no fit of the user is due, or wait for the worker that does; return the latest fit.

        Errors as for `fit_next`.
        """
        while (latest := self.log.queue.fit(tenant, user)).state in ("queued", "fitting"):
            if not self.fit_next(tenant, user, on_progress, even_if_not_due=even_if_not_due):
                time.sleep(POLL_SECONDS)
        return latest

    def enrol(
        self,
        store: AdapterStore,
        entries: Mapping[str, Sequence[LogEntry]],
        *,
        refine: bool,
        on_progress: ProgressCallback,
    ) -> None:
        """Enrol many new users, all or none: place their embeddings in one batch, then fit them if `refine` is set.

        Raises:
            InputError: the log knows a user, or two interactions of a user have the same id and different content.
            ChangedError: the groups were refreshed since the run was loaded; the users are in the queue.
            ProperError: fits failed; the message says how many and why the first one did. The others are done.
        """
        users = list(entries)
        self.log.enrol_all(store.tenant, entries)
        fitter = self.fitter()
        place_users(fitter, store, self.log, users, shares_of("place", len(users), on_progress))
        done, placed = (shares_of(phase, len(users), on_progress) for phase in ("fit", "embeddings"))
        for at in range(0, len(users) if refine else 0, USERS_PER_BATCH):
            some = users[at : at + USERS_PER_BATCH]
            # Users who are fitted together do not notice a deletion, which has to wait for the end of this block.
            with working(self.users.parent), self.log.queue.lock():
                _refuse_outdated(fitter)
                claims = [claim for user in some if (claim := self.log.queue.take(store.tenant, user)) is not None]
                with self.log.queue.holding(claims):  # another worker has fitted the other users, or does it now
                    fit_many(fitter, store, self.log, [claim.user for claim in claims], placed, bar_of(on_progress))
                    for claim in claims:
                        self._fit_claimed(fitter, claim, no_progress, even_if_not_due=False)
                        done(1)
                done(len(some) - len(claims))
        fits = [(user, self.fit(store.tenant, user)) for user in users if refine]
        failed = [(user, fit.message) for user, fit in fits if fit.state == "failed"]
        if failed:
            raise ProperError(f"{len(failed)} users could not be fitted; user {failed[0][0]!r}: {failed[0][1]}")

    def drift(self, store: AdapterStore) -> list[Drift]:
        """Return the drift of all users of a store who have new interactions, the highest score first."""
        known, fitter = [user for user, _ in store.users()], self.fitter()
        with self.log.queue.lock():  # a fit would use the model at the same time
            return drifts(fitter, store, self.log, known)

    def update_drifted(self, store: AdapterStore, budget: int | None, hours: float | None) -> list[Drift]:
        """Update the users for whom it is due, those who have drifted most first; return whom it tried to update.

        Args:
            store: the users' store.
            budget: at most so many users; None for no limit.
            hours: about so long, by the mean time of past updates; None for no limit.
        """
        chosen, begun = [drift for drift in self.drift(store) if drift.due][:budget], time.monotonic()
        tried = list[Drift]()
        for drift in chosen:
            each = self.log.updates.seconds() or 0.0
            if hours is not None and tried and time.monotonic() - begun + each > 3600 * hours:
                break
            with suppress(DeletedError):  # since the drift was measured
                self.log.request_fit(store.tenant, drift.user)
                self.fit(store.tenant, drift.user, even_if_not_due=True)
                tried.append(drift)
        return tried

    def watch(self, on_progress: ProgressCallback = no_progress) -> None:
        """Fit queued users until `on_progress` raises; it is also called from time to time while the queue is empty."""
        while True:
            on_progress("idle", 0.0)
            if not (self.log.queue.has_work() and self.fit_next(on_progress=on_progress)):
                time.sleep(POLL_SECONDS)

    def _fit_claimed(self, fitter: Fitter, claim: Claim, on_progress: ProgressCallback, even_if_not_due: bool) -> None:
        """Fit the user of a claim, and end or release it."""
        try:
            self._fit(fitter, claim, on_progress, even_if_not_due)
        except WithdrawnError:
            remove_work(self.users, claim.tenant, claim.user)
        except (UnavailableError, ChangedError):
            self.log.queue.release(claim)  # not for this user's sake, and the next user's fit would meet the same
            raise
        except Exception as error:
            if is_full(error):
                self.log.queue.release(claim)
                raise UnavailableError(f"fits wait until there is room again: {error}") from error
            # Out of memory, a NaN loss: go on, because the next user's fit may succeed.
            self.log.queue.fail(claim, str(error) if isinstance(error, ProperError) else type(error).__name__)
        except BaseException:
            self.log.queue.release(claim)
            raise
        finally:
            self.log.queue.leave(claim)

    def _fit(self, fitter: Fitter, claim: Claim, on_progress: ProgressCallback, even_if_not_due: bool) -> None:
        with (
            closing(AdapterStore(self.users, claim.tenant)) as store,
            closing(Database(UsersFolder(self.users).log, durable=False)) as database,
        ):
            grown = fitter.history(self.log, claim.tenant, claim.user)
            if not grown.items:
                self.log.queue.done(claim, None, "no interactions yet")
                return
            if fitter.model.config.users.update.when == "drifted" and not even_if_not_due:
                variance = self.variances.setdefault(claim.tenant, KnownVariance())
                waits = not_due(fitter, store, self.log, claim.user, grown, variance)
                if waits is not None:
                    self.log.queue.done(claim, waits.version, f"{waits.text()}; version {waits.version} stays")
                    return
            report = throttled(FitQueue(database), claim, on_progress)
            work = work_folder(self.users, claim.tenant, claim.user)
            started = time.monotonic()
            fitted = fit_or_update(fitter, UserFit(store, claim.user, grown, work, report))
            self._commit(fitter, store, claim, fitted, time.monotonic() - started)

    def _place_waiting(self, fitter: Fitter) -> None:
        """Give every new user in the queue an embedding at once, which answers until the user's fit is done.

        The store leaves out users who are deleted meanwhile.
        """
        waiting = set(self.log.queue.waiting())
        self.placed.intersection_update(waiting)
        for tenant, user in sorted(waiting - self.placed):
            self.placed.add((tenant, user))
            with closing(AdapterStore(self.users, tenant)) as store, self.log.queue.placing(tenant, user):
                if store.head(user) is None:
                    try:
                        place_users(fitter, store, self.log, [user], lambda count: None)
                    except Exception as error:
                        # The user's own fit meets the same error and records it; the users behind must not wait.
                        logger.warning(f"a new user could not be placed: {type(error).__name__}")

    def _commit(self, fitter: Fitter, store: AdapterStore, claim: Claim, fitted: FitOutcome, seconds: float) -> None:
        """Put the new version into the store, unless its user was deleted or rolled back meanwhile.

        Raises:
            ChangedError: the groups were refreshed meanwhile, which the lock of the only worker would have prevented.
        """
        with self.log.queue.ending(claim) as stands:
            if not stands:
                raise WithdrawnError
            if fitted.record is not None and not is_stored(store, fitted.record):  # stored already before a kill
                head = store.head(claim.user)
                if fitted.base != (None if head is None else head.version):
                    self.log.queue.release(claim)  # another version is in service by now: fit again, from that one
                    return
                store.put([fitted.record], only_if_bound=fitter.bound)
            head = store.head(claim.user)
            version = None if head is None else head.version
            if fitted.base is not None and fitted.metrics:
                made = None if fitted.record is None else version
                outcome = fitted.base, made, seconds, fitted.reason or "", fitted.metrics
                self.log.updates.add(claim.tenant, claim.user, *outcome)
            self.log.queue.done(claim, version, describe(fitted))
        # Not before: after a kill, the folder says that the version in service is this fit's result.
        remove_ended_work(self.log, self.users, claim)

    def _remove_stale_work(self) -> None:
        """Remove work folders of interrupted fits whose users are no longer queued."""
        folder = UsersFolder(self.users).fits
        if not folder.is_dir() or not self._stale(folder):
            return
        with self.log.database.transaction():  # in which no other worker takes a claim, and with it a folder
            for work in self._stale(folder):
                shutil.rmtree(work, ignore_errors=True)

    def _stale(self, folder: Path) -> set[Path]:
        found = set(folder.iterdir())
        return found and found - {work_folder(self.users, *owner) for owner in self.log.queue.waiting()}


def remove_ended_work(log: InteractionLog, users: Path, claim: Claim) -> None:
    """Remove the work folder of a fit that has ended, unless another worker has taken the user's next fit already."""
    with log.queue.unclaimed(claim.tenant, claim.user) as free:
        if free:
            remove_work(users, claim.tenant, claim.user)


def describe(fitted: FitOutcome) -> str:
    """Return the result of a fit as one line."""
    record = fitted.record
    if record is None:
        return f"{fitted.reason}; version {fitted.base} stays"
    history = record.metadata["history"]
    run = "the run's data is gone" if history["run"] is None else f"{history['run']} of the run"
    reason = record.metadata.get("reason")
    return f"tier {record.tier}, {run}, {history['logged']} logged{f'; {reason}' if reason else ''}"


def _refuse_outdated(fitter: Fitter) -> None:
    if fitter.model.served is not None and fitter.model.served.outdated:
        raise ChangedError("the groups were refreshed since this process loaded them; start it again")
