"""/v1/users: who there is, in which versions; deleting and going back. Knows nothing about adapters or fits."""

# No postponed annotations here: FastAPI could not look up those that are made inside a function.
# The routes are no coroutines: FastAPI runs them on threads, where they may wait for files and locks.

from itertools import islice
from typing import Annotated

from fastapi import APIRouter, Depends, Query

from proper.errors import NoVersionError
from proper.inference.engine import Engine
from proper.people.log import InteractionLog
from proper.people.removal import remove
from proper.serving.enrolment import enrolment_routes
from proper.serving.gate import Gate
from proper.serving.keys import Principal
from proper.serving.paths import RawRoute, user_in_path
from proper.serving.refusals import Refusal
from proper.serving.tenancy import Reach, reach
from proper.serving.wire import Deleted, Person, Rollback, UserCard, UserList, VersionCard, VersionList

Tenant = Annotated[str | None, Query(max_length=512, description="Only the key's own tenant is allowed.")]
User = Annotated[str, Depends(user_in_path)]


def people_routes(engine: Engine, log: InteractionLog | None, gate: Gate) -> APIRouter:
    """Return the routes over the users of an engine's run, and their interactions where there is a log."""
    router = APIRouter(prefix="/v1/users", tags=["users"], route_class=RawRoute)
    holdings = reach(engine, log)
    _listing(router, holdings, gate)
    enrolment_routes(router, engine.model, holdings, gate)
    _versions(router, holdings, gate)
    _persons(router, engine, holdings, gate)
    return router


def _listing(router: APIRouter, holdings: Reach, gate: Gate) -> None:
    Ruling = Annotated[Principal, Depends(gate.needs("admin"))]

    @router.get("")
    def listed(
        who: Ruling,
        after: Annotated[str | None, Query(max_length=512)] = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        tenant: Tenant = None,
    ) -> UserList:
        """List users by id, a page at a time."""
        held = holdings(who, tenant)
        found = list(islice(held.users(after), limit + 1))
        cards = [UserCard(id=user, tier=tier) for user, tier in found[:limit]]
        return UserList(data=cards, next=cards[-1].id if len(found) > limit else None)


def _versions(router: APIRouter, holdings: Reach, gate: Gate) -> None:
    Writing = Annotated[Principal, Depends(gate.needs("write", "admin"))]

    @router.get("/{user}/versions")
    def versions(user: User, who: Writing, tenant: Tenant = None) -> VersionList:
        """List a user's stored versions, newest first."""
        held = holdings(who, tenant)
        held.require(user)
        cards = [
            VersionCard(version=one.version, parent=one.parent, tier=one.tier, bytes=one.bytes, written=one.written)
            for one in held.store.versions(user)
        ]
        return VersionList(data=cards)

    @router.post("/{user}/rollback")
    def rollback(user: User, who: Writing, body: Rollback | None = None, tenant: Tenant = None) -> UserCard:
        """Make an older version current again; requests that run finish on the version they began with."""
        held = holdings(who, tenant)
        held.require(user)
        try:
            held.store.rollback(user, body.to if body else None)
        except NoVersionError as error:
            raise Refusal(409, str(error), code="no_version", param="to") from error
        return held.card(user)


def _persons(router: APIRouter, engine: Engine, holdings: Reach, gate: Gate) -> None:
    Writing = Annotated[Principal, Depends(gate.needs("write", "admin"))]
    Ruling = Annotated[Principal, Depends(gate.needs("admin"))]

    @router.get("/{user}")
    def read(user: User, who: Writing, tenant: Tenant = None) -> Person:
        """Describe a user: tier, version, how many interactions were logged, how far their fit is."""
        held = holdings(who, tenant)
        held.require(user)
        count = held.log.count(held.tenant, user)
        return Person(**held.card(user).model_dump(), interactions=count, fit=held.fit(user))

    @router.delete("/{user}")
    def delete(user: User, who: Ruling, tenant: Tenant = None) -> Deleted:
        """Delete all of a user; it is gone from the disk before the reply, and from memory when nothing runs on it."""
        held = holdings(who, tenant)
        held.require(user)
        remove(held.store, held.log, user)
        engine.forget(held.tenant, user)
        return Deleted(id=user)
