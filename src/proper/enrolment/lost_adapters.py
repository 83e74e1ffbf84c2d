"""Fits the users as new ones whose adapter was worse under the refreshed groups, and was left out (`refresh`)."""

from __future__ import annotations

import time
from dataclasses import replace

from proper.adapters.records import MADE
from proper.adapters.store import AdapterStore
from proper.console import progress
from proper.enrolment.fit_progress import no_progress
from proper.enrolment.fit_user import Fitter, UserFit
from proper.enrolment.group_versions import BY
from proper.enrolment.worker import POLL_SECONDS, remove_ended_work
from proper.interactions.fit_queue import Claim
from proper.interactions.log import DeletedError, InteractionLog
from proper.interactions.personal_files import work_folder

REASON = "fitted again, since the adapter was worse under the refreshed groups"


def refit(fitter: Fitter, store: AdapterStore, log: InteractionLog) -> tuple[int, int]:
    """Fit the users who lost an adapter; return how many these are, and how many have one again."""
    waiting = [user for user, _, metadata in store.heads() if metadata.get(MADE, {}).get("refit")]
    again = 0
    with progress("refit users", len(waiting)) as advance:
        for user in waiting:
            again += _refit(fitter, store, log, user)
            advance(1)
    return len(waiting), again


def _refit(fitter: Fitter, store: AdapterStore, log: InteractionLog, user: str) -> bool:
    """Fit a user, with the claim on the user; return whether the user has an adapter again."""
    while True:
        with log.queue.lock():
            try:
                claim = log.claim_fit(store.tenant, user)
            except DeletedError:
                return False
            if claim is not None:
                with log.queue.holding([claim]):
                    return _fit_claimed(fitter, store, log, claim)
        time.sleep(POLL_SECONDS)  # another worker fits the user


def _fit_claimed(fitter: Fitter, store: AdapterStore, log: InteractionLog, claim: Claim) -> bool:
    user, head = claim.user, store.head(claim.user)
    grown = fitter.history(log, claim.tenant, user)
    if head is None or not grown.items:
        log.queue.done(claim, None if head is None else head.version, "no interactions yet")
        return False
    work = work_folder(store.folder, claim.tenant, user)
    record = fitter.fit(UserFit(store, user, grown, work, no_progress))
    made = {"by": BY, "of": head.version}
    record = replace(record, metadata={**record.metadata, MADE: made, "reason": REASON})
    with log.queue.ending(claim) as stands:
        now = store.head(user)
        stands = stands and now is not None and now.version == head.version  # else deleted or rolled back meanwhile
        if stands:
            store.put([record], only_if_bound=fitter.bound)
            log.queue.done(claim, head.version + 1, REASON)
    remove_ended_work(log, store.folder, claim)
    return stands and record.adapter is not None
