"""Routes below /v1/users and /v1/deletions: list users and versions, roll back, delete."""

# No `from __future__ import annotations`: FastAPI could not resolve the types that are defined inside a function.
# The routes are not coroutines: FastAPI runs them on threads, where they may wait for files and locks.

from itertools import islice
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query, Response

from proper.errors import NoVersionError
from proper.inference.engine import Engine
from proper.interactions.deletion import remove
from proper.interactions.log import InteractionLog
from proper.serving.auth import Authenticator
from proper.serving.enrolment import enrolment_routes
from proper.serving.errors import APIError
from proper.serving.keys import Principal
from proper.serving.paths import RawRoute, user_in_path
from proper.serving.schemas import (
    DeleteReply,
    DeletionStatus,
    Rollback,
    UserCard,
    UserList,
    UserStatus,
    VersionCard,
    VersionList,
)
from proper.serving.tenancy import Reach, reach

Tenant = Annotated[str | None, Query(max_length=512, description="Only the key's own tenant is allowed.")]
User = Annotated[str, Depends(user_in_path)]
PATIENCE = 2.0
"""Seconds for which a DELETE waits for other processes before it answers 202."""


def people_routes(engine: Engine, log: InteractionLog | None, gate: Authenticator) -> APIRouter:
    """Return the routes for the users of an engine's run, and for their interactions if there is a log."""
    router = APIRouter(prefix="/v1/users", tags=["users"], route_class=RawRoute)
    holdings = reach(engine, log)
    _listing(router, holdings, gate)
    enrolment_routes(router, engine.model, holdings, gate)
    _versions(router, holdings, gate)
    _persons(router, engine, holdings, gate)
    return router


def _listing(router: APIRouter, holdings: Reach, gate: Authenticator) -> None:
    Ruling = Annotated[Principal, Depends(gate.needs("admin"))]

    @router.get("")
    def listed(
        who: Ruling,
        after: Annotated[str | None, Query(max_length=512)] = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        tenant: Tenant = None,
    ) -> UserList:
        """List users ordered by id, one page at a time."""
        held = holdings(who, tenant)
        found = list(islice(held.users(after), limit + 1))
        cards = [UserCard(id=user, tier=tier) for user, tier in found[:limit]]
        return UserList(data=cards, next=cards[-1].id if len(found) > limit else None)


def _versions(router: APIRouter, holdings: Reach, gate: Authenticator) -> None:
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
        """Make an older version current again; running requests finish on the version that they started with."""
        held = holdings(who, tenant)
        held.require(user)
        try:
            held.store.rollback(user, body.to if body else None)
        except NoVersionError as error:
            raise APIError(409, str(error), code="no_version", param="to") from error
        return held.card(user)


def _persons(router: APIRouter, engine: Engine, holdings: Reach, gate: Authenticator) -> None:
    Writing = Annotated[Principal, Depends(gate.needs("write", "admin"))]
    Ruling = Annotated[Principal, Depends(gate.needs("admin"))]

    @router.get("/{user}")
    def read(user: User, who: Writing, tenant: Tenant = None) -> UserStatus:
        """Return a user's tier, version, number of logged interactions and state of the latest fit."""
        held = holdings(who, tenant)
        held.require(user)
        count = held.log.count(held.tenant, user)
        return UserStatus(**held.card(user).model_dump(), interactions=count, fit=held.fit(user))

    @router.delete("/{user}", responses={202: {"model": DeletionStatus, "description": "The deletion goes on."}})
    def delete(user: User, who: Ruling, response: Response, tenant: Tenant = None) -> DeleteReply | DeletionStatus:
        """Delete all data of a user; with 200 it is gone from the disk, and from memory once no request uses it.

        If another process is reading or writing the run's files, the reply is 202 with the id of the deletion, which
        the server continues; GET /v1/deletions/ID returns its state.
        """
        held = holdings(who, tenant)
        if not held.log.deletions.of(held.tenant, user):
            held.require(user)
        removal = remove(held.store, held.log, user, PATIENCE)
        engine.forget(held.tenant, user)
        if not removal.waits:
            return DeleteReply(id=user)
        response.status_code = 202
        response.headers["Location"] = f"/v1/deletions/{removal.job}"
        return DeletionStatus(id=removal.job, state="running")


def deletion_routes(engine: Engine, log: InteractionLog | None, gate: Authenticator) -> APIRouter:
    """Return the route for the state of a deletion."""
    router = APIRouter(prefix="/v1/deletions", tags=["users"])
    holdings = reach(engine, log)
    Ruling = Annotated[Principal, Depends(gate.needs("admin"))]

    @router.get("/{deletion}")
    def read(deletion: Annotated[str, Path(max_length=64)], who: Ruling, tenant: Tenant = None) -> DeletionStatus:
        """Return the state of a deletion; available for a week after it is done."""
        held = holdings(who, tenant)
        state = held.log.deletions.state(held.tenant, deletion)
        if state is None:
            raise APIError(404, "there is no such deletion", code="deletion_not_found", param="deletion")
        return DeletionStatus(id=deletion, state="done" if state == "done" else "running")

    return router
