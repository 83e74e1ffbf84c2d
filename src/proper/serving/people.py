"""/v1/users: who is in the store, in which versions; deleting and going back. Knows nothing about adapters."""

# No postponed annotations here: FastAPI could not look up those that are made inside a function.

import asyncio
from itertools import islice
from typing import Annotated

from fastapi import APIRouter, Depends, Query

from proper.adapters.store import AdapterStore
from proper.errors import ProperError, StoreError
from proper.inference.engine import Engine
from proper.serving.gate import Gate, own_tenant
from proper.serving.keys import Principal
from proper.serving.refusals import Refusal
from proper.serving.wire import Deleted, Rollback, UserCard, UserList, VersionCard, VersionList

Tenant = Annotated[str | None, Query(max_length=512, description="Only the key's own tenant is allowed.")]


def people_routes(engine: Engine, gate: Gate) -> APIRouter:
    """Return the routes over the users of an engine's run."""
    router = APIRouter(prefix="/v1/users", tags=["users"])
    Writing = Annotated[Principal, Depends(gate.needs("write", "admin"))]
    Ruling = Annotated[Principal, Depends(gate.needs("admin"))]

    def store_of(who: Principal, tenant: str | None) -> AdapterStore:
        own = own_tenant(who, tenant)
        try:
            return engine.store(own)
        except StoreError:
            raise
        except ProperError as error:
            raise Refusal(404, str(error), code="no_users") from error

    @router.get("")
    async def listed(
        who: Ruling,
        after: Annotated[str | None, Query(max_length=512)] = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        tenant: Tenant = None,
    ) -> UserList:
        """List users by id, a page at a time."""
        store = store_of(who, tenant)
        found = await asyncio.to_thread(lambda: list(islice(store.users(after), limit + 1)))
        cards = [UserCard(id=user, tier=tier) for user, tier in found[:limit]]
        return UserList(data=cards, next=cards[-1].id if len(found) > limit else None)

    @router.get("/{user:path}/versions")
    async def versions(user: str, who: Writing, tenant: Tenant = None) -> VersionList:
        """List a user's stored versions, newest first."""
        held = store_of(who, tenant).versions(user)
        if not held:
            raise _unknown(user)
        cards = [
            VersionCard(version=one.version, parent=one.parent, tier=one.tier, bytes=one.bytes, written=one.written)
            for one in held
        ]
        return VersionList(data=cards)

    @router.post("/{user:path}/rollback")
    async def rollback(user: str, who: Writing, body: Rollback | None = None, tenant: Tenant = None) -> UserCard:
        """Make an older version current again; requests that run finish on the version they began with."""
        store = store_of(who, tenant)
        if store.head(user) is None:
            raise _unknown(user)
        try:
            version = await asyncio.to_thread(store.rollback, user, body.to if body else None)
        except StoreError as error:
            raise Refusal(409, str(error), code="no_version", param="to") from error
        head = store.head(user)
        return UserCard(id=user, tier=head.tier if head else "none", version=version)

    @router.get("/{user:path}")
    async def read(user: str, who: Writing, tenant: Tenant = None) -> UserCard:
        """Describe a user."""
        head = store_of(who, tenant).head(user)
        if head is None:
            raise _unknown(user)
        return UserCard(id=user, tier=head.tier, version=head.version)

    @router.delete("/{user:path}")
    async def delete(user: str, who: Ruling, tenant: Tenant = None) -> Deleted:
        """Delete all of a user; it is gone from the disk before the reply, and from memory when nothing runs on it."""
        store = store_of(who, tenant)
        if not await asyncio.to_thread(store.delete, user):
            raise _unknown(user)
        engine.forget(store.tenant, user)
        return Deleted(id=user)

    return router


def _unknown(user: str) -> Refusal:
    return Refusal(404, f"there is no user {user!r}", code="user_not_found", param="user")
