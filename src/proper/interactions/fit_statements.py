"""SQL statements of the fit queue."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Text, and_, bindparam, case, delete, func, null, or_, select, update

from proper.databases.statements import Insert, Statement, now, of_user
from proper.databases.tables import COUNTERS, FITS

_OWN = of_user(FITS)
_CLAIMED = and_(_OWN, FITS.c.claim == bindparam("number"))
_KEY = (FITS.c.tenant, FITS.c.user)


LEASE_SECONDS = 180.0
"""Seconds without progress after which a worker counts as dead, in PostgreSQL."""
_LEASED = now() + LEASE_SECONDS


def _change(**values: object) -> Statement:
    """Return the statement that sets these columns in the row of a claim."""
    return Statement(lambda _: update(FITS).where(_CLAIMED).values(**values))


def _added(insert: Insert) -> Any:
    fitting, new = FITS.c.state == "fitting", insert(FITS)
    given: dict[str, Any] = {name: bindparam(name) for name in ("tenant", "user", "place")}
    return new.values(**given, state="queued", wanted=1, attempts=0, progress=0.0).on_conflict_do_update(
        index_elements=_KEY,
        set_={
            "wanted": FITS.c.wanted + 1,
            "attempts": 0,
            "place": case((FITS.c.state == "queued", FITS.c.place), else_=new.excluded.place),
            "progress": case((fitting, FITS.c.progress), else_=0.0),
            "phase": case((fitting, FITS.c.phase)),
            "message": case((fitting, FITS.c.message)),
            "state": case((fitting, FITS.c.state), else_="queued"),
        },
    )


ADD = Statement(_added)
FIT = Statement(
    lambda _: select(FITS.c.state, FITS.c.progress, FITS.c.phase, FITS.c.message, FITS.c.version).where(_OWN)
)
STATES = Statement(lambda _: select(FITS.c.state, func.count()).group_by(FITS.c.state))
ENDED = Statement(lambda _: select(COUNTERS.c.name, COUNTERS.c.value))
_WAITING = select(*_KEY).where(or_(FITS.c.state == "queued", FITS.c.state == "fitting"))
WAITING = Statement(lambda _: _WAITING)
ANY_WAITING = Statement(lambda _: _WAITING.limit(1))
_QUEUED = select(*_KEY, FITS.c.wanted).where(FITS.c.state == "queued")
FIRST = Statement(lambda _: _QUEUED.order_by(FITS.c.place).limit(1).with_for_update(skip_locked=True))
GIVEN = Statement(lambda _: _QUEUED.where(_OWN).with_for_update())
TAKE = Statement(
    lambda _: (
        update(FITS)
        .where(_OWN)
        .values(
            state="fitting",
            claim=bindparam("number"),
            attempts=FITS.c.attempts + 1,
            progress=0.0,
            phase="waiting",
            message=null(),
            lease=_LEASED,
        )
    )
)
WANTED = Statement(lambda _: select(FITS.c.wanted).where(_CLAIMED))
_LEFT = select(*_KEY, FITS.c.claim, FITS.c.wanted, FITS.c.attempts).where(FITS.c.state == "fitting")
ALL_LEFT = Statement(lambda _: _LEFT)
LEASE_OVER = Statement(lambda _: _LEFT.where(FITS.c.lease < now()))
ADVANCE = _change(progress=bindparam("new_progress"), phase=bindparam("new_phase"), lease=_LEASED)
RENEW = _change(lease=_LEASED)
CLAIM_OF = Statement(lambda _: select(FITS.c.claim).where(_OWN, FITS.c.state == "fitting"))
# The row's lock keeps other workers from taking a claim on the user.
LOCKED = Statement(lambda _: select(FITS.c.state).where(_OWN).with_for_update())
# The row of a deleted user whose worker has not noticed yet: it names no user.
_VOIDED = FITS.c.state == "withdrawn"
WITHDRAW = Statement(
    lambda insert: insert(FITS).values(
        tenant="",
        user=bindparam("placeholder"),
        state="withdrawn",
        wanted=0,
        attempts=0,
        progress=0.0,
        claim=bindparam("number"),
        lease=_LEASED,
    )
)
VOIDED = Statement(lambda _: select(FITS.c.claim).where(_VOIDED))
LEAVE = Statement(lambda _: delete(FITS).where(_VOIDED, FITS.c.claim == bindparam("number")))
DROP_OVER = Statement(lambda _: delete(FITS).where(_VOIDED, FITS.c.lease < now()))
DROP_ALL = Statement(lambda _: delete(FITS).where(_VOIDED))
RELEASE = _change(state="queued", claim=null(), attempts=FITS.c.attempts - 1, progress=0.0, phase=null())
REQUEUE = _change(state="queued", claim=null(), progress=0.0, phase=null())
RECORD_DONE = _change(version=bindparam("new_version"), message=bindparam("new_message"))
RECORD_FAILURE = _change(message=bindparam("new_message"))
END_AGAIN = _change(state="queued", attempts=0, claim=null(), phase=null(), progress=0.0, message=null())
END = _change(
    state=bindparam("new_state"),
    attempts=0,
    claim=null(),
    phase=null(),
    progress=case((bindparam("new_state", type_=Text) == "done", 1.0), else_=FITS.c.progress),
)
COUNT = Statement(
    lambda insert: (
        insert(COUNTERS)
        .values(name=bindparam("name"), value=1)
        .on_conflict_do_update(index_elements=[COUNTERS.c.name], set_={"value": COUNTERS.c.value + 1})
    )
)
