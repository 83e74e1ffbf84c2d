"""Routes below /v1/users and /v1/deletions: list users and versions, roll back, archive, delete."""

# No `from __future__ import annotations`: FastAPI could not resolve the types that are defined inside a function.
# The routes are not coroutines: FastAPI runs them on threads, where they may wait for files and locks.

from io import BytesIO
from itertools import islice
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query, Response

from proper.data.values import MAX_ID_LENGTH
from proper.errors import InputError, NoVersionError
from proper.interactions.archive import write_archive
from proper.interactions.deletion import TrainingError, remove
from proper.interactions.log import InteractionLog
from proper.serving.auth import Authenticator
from proper.serving.engines import AnsweringEngine
from proper.serving.errors import APIError
from proper.serving.keys import Principal
from proper.serving.routes.interactions import enrolment_routes
from proper.serving.schemas.resources import (
    DeleteReply,
    DeletionStatus,
    Rollback,
    UserCard,
    UserList,
    UserStatus,
    VersionCard,
    VersionList,
)
from proper.serving.tenancy import RawRoute, TenantLookup, tenant_lookup, user_in_path

Tenant = Annotated[str | None, Query(max_length=MAX_ID_LENGTH, description="Only the key's own tenant is allowed.")]
User = Annotated[str, Depends(user_in_path)]
DeletionId = Annotated[str, Path(max_length=64)]
Deletion = DeleteReply | DeletionStatus
PATIENCE = 2.0
"""Seconds for which a DELETE waits for other processes before it answers 202."""


class ZipReply(Response):
    """A zip file as a reply."""

    media_type = "application/zip"


def user_routes(engine: AnsweringEngine, log: InteractionLog | None, auth: Authenticator) -> APIRouter:
    """Return the routes for the users of an engine's run, and for their interactions if there is a log."""
    router = APIRouter(prefix="/v1/users", tags=["users"], route_class=RawRoute)
    lookup = tenant_lookup(engine, log)
    _listing(router, lookup, auth)
    enrolment_routes(router, engine.model, lookup, auth)
    _versions(router, lookup, auth)
    _one_user(router, lookup, auth)
    _deletion(router, engine, lookup, auth)
    return router


def _listing(router: APIRouter, lookup: TenantLookup, auth: Authenticator) -> None:
    AdminCaller = Annotated[Principal, Depends(auth.needs("admin"))]

    @router.get("")
    def listed(
        caller: AdminCaller,
        after: Annotated[str | None, Query(max_length=MAX_ID_LENGTH)] = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        tenant: Tenant = None,
    ) -> UserList:
        """List users ordered by id, one page at a time."""
        tenant_users = lookup(caller, tenant)
        cards = list(islice(tenant_users.users(after), limit + 1))
        return UserList(data=cards[:limit], next=cards[limit - 1].id if len(cards) > limit else None)


def _versions(router: APIRouter, lookup: TenantLookup, auth: Authenticator) -> None:
    WriteCaller = Annotated[Principal, Depends(auth.needs("write", "admin"))]

    @router.get("/{user}/versions")
    def versions(user: User, caller: WriteCaller, tenant: Tenant = None) -> VersionList:
        """List a user's stored versions, newest first."""
        tenant_users = lookup(caller, tenant)
        tenant_users.require(user)
        cards = [
            VersionCard(version=one.version, parent=one.parent, tier=one.tier, bytes=one.bytes, written=one.written)
            for one in tenant_users.store.versions(user)
        ]
        return VersionList(data=cards)

    @router.post("/{user}/rollback")
    def rollback(user: User, caller: WriteCaller, body: Rollback | None = None, tenant: Tenant = None) -> UserCard:
        """Make an older version current again; running requests finish on the version that they started with."""
        tenant_users = lookup(caller, tenant)
        tenant_users.require(user)
        try:
            tenant_users.store.rollback(user, body.to if body else None)
        except NoVersionError as error:
            raise APIError(409, str(error), code="no_version", param="to") from error
        return tenant_users.card(user)


def _one_user(router: APIRouter, lookup: TenantLookup, auth: Authenticator) -> None:
    WriteCaller = Annotated[Principal, Depends(auth.needs("write", "admin"))]
    AdminCaller = Annotated[Principal, Depends(auth.needs("admin"))]

    @router.get("/{user}")
    def read(user: User, caller: WriteCaller, tenant: Tenant = None) -> UserStatus:
        """Return a user's tier, version, number of logged interactions and state of the latest fit."""
        tenant_users = lookup(caller, tenant)
        tenant_users.require(user)
        count = tenant_users.log.count(tenant_users.tenant, user)
        return UserStatus(**tenant_users.card(user).model_dump(), interactions=count, fit=tenant_users.fit(user))

    @router.get(
        "/{user}/archive",
        response_class=ZipReply,
        responses={200: {"content": {"application/zip": {}}, "description": "A zip file."}},
    )
    def archive(user: User, caller: AdminCaller, tenant: Tenant = None) -> Response:
        """Return everything that the run holds of a user, texts included, as a zip file with a README.txt."""
        tenant_users = lookup(caller, tenant)
        tenant_users.require(user)
        content = BytesIO()
        try:
            write_archive(content, tenant_users.store, tenant_users.log, user)
        except InputError as error:
            tenant_users.require(user)
            raise APIError(409, f"user {user!r} is being deleted", code="deletion_running", param="user") from error
        return ZipReply(content.getvalue(), headers={"Content-Disposition": 'attachment; filename="archive.zip"'})


def _deletion(router: APIRouter, engine: AnsweringEngine, lookup: TenantLookup, auth: Authenticator) -> None:
    AdminCaller = Annotated[Principal, Depends(auth.needs("admin"))]

    @router.delete("/{user}", responses={202: {"model": DeletionStatus, "description": "The deletion goes on."}})
    def delete(user: User, caller: AdminCaller, response: Response, tenant: Tenant = None) -> Deletion:
        """Delete all data of a user; with 200 it is gone from the disk, and from memory once no request uses it.

        If another process is reading or writing the run's files, the reply is 202 with the id of the deletion, which
        the server continues; GET /v1/deletions/ID returns its state.
        """
        tenant_users = lookup(caller, tenant)
        if not tenant_users.log.deletions.of(tenant_users.tenant, user):
            tenant_users.require(user)
        try:
            removal = remove(tenant_users.store, tenant_users.log, user, PATIENCE)
        except TrainingError as error:
            raise APIError(409, str(error), code="training_running", param="user") from error
        engine.forget(tenant_users.tenant, user)
        if not removal.waits:
            return DeleteReply(id=user)
        response.status_code = 202
        response.headers["Location"] = f"/v1/deletions/{removal.job}"
        return DeletionStatus(id=removal.job, state="running")


def deletion_routes(engine: AnsweringEngine, log: InteractionLog | None, auth: Authenticator) -> APIRouter:
    """Return the route for the state of a deletion."""
    router = APIRouter(prefix="/v1/deletions", tags=["users"])
    lookup = tenant_lookup(engine, log)
    AdminCaller = Annotated[Principal, Depends(auth.needs("admin"))]

    @router.get("/{deletion}")
    def read(deletion: DeletionId, caller: AdminCaller, tenant: Tenant = None) -> DeletionStatus:
        """Return the state of a deletion; available for a week after it is done."""
        tenant_users = lookup(caller, tenant)
        state = tenant_users.log.deletions.state(tenant_users.tenant, deletion)
        if state is None:
            raise APIError(404, "this deletion does not exist", code="deletion_not_found", param="deletion")
        return DeletionStatus(id=deletion, state="done" if state == "done" else "running")

    return router
