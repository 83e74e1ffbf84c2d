"""Multi-tenancy: maps a principal to its tenant's users in the adapter store and the log, and URL paths to user ids.

A user id is one percent-encoded segment of a path, whatever characters it has. Frameworks decode a path before they
match it, so the user "a/versions" could not be distinguished from the versions of the user "a"; `RawRoute`
matches the undecoded path.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Annotated
from urllib.parse import unquote_to_bytes

from fastapi import Path
from starlette.routing import Match
from starlette.types import Scope

from proper.adapters.store import AdapterStore
from proper.errors import ProperError, StoreError
from proper.interactions.log import InteractionLog
from proper.run_folder import Tier
from proper.serving.auth import own_tenant
from proper.serving.engines import AnsweringEngine
from proper.serving.errors import APIError, without_folders, without_places
from proper.serving.json_bodies import CheckedRoute
from proper.serving.keys import Principal
from proper.serving.schemas.resources import FitState, UserCard


@dataclass(frozen=True)
class TenantUsers:
    """One tenant's users: those in the store, and those that so far are only in the log."""

    store: AdapterStore
    log: InteractionLog

    @property
    def tenant(self) -> str:
        """The tenant's name."""
        return self.store.tenant

    def knows(self, user: str) -> bool:
        """Return whether a user exists."""
        return self.store.head(user) is not None or self.log.knows(self.tenant, user)

    def require(self, user: str) -> None:
        """Check that a user exists.

        Raises:
            APIError: 404; the user does not exist.
        """
        if not self.knows(user):
            raise APIError(404, f"there is no user {user!r}", code="user_not_found", param="user")

    def card(self, user: str) -> UserCard:
        """Return tier and version of an existing user."""
        head = self.store.head(user)
        return UserCard(id=user, tier=head.tier if head else Tier.NONE, version=head.version if head else None)

    def fit(self, user: str) -> FitState:
        """Return the state of a user's latest fit."""
        state = FitState(**asdict(self.log.queue.fit(self.tenant, user)))
        if state.message is not None:
            state.message = without_places(without_folders(state.message, self.store.folder.parent))
        return state

    def users(self, after: str | None) -> Iterator[UserCard]:
        """Yield all users, ordered by id."""
        stored = (UserCard(id=user, tier=head.tier, version=head.version) for user, head, _ in self.store.heads(after))
        unfitted = (UserCard(id=user, tier=Tier.NONE) for user in self.log.users(self.tenant, after))
        both = heapq.merge(stored, unfitted, key=lambda card: card.id.encode("utf-8", "surrogatepass"))
        # For a user in both, the store's entry comes first.
        return (next(cards) for _, cards in groupby(both, key=lambda card: card.id))


TenantLookup = Callable[[Principal, str | None], TenantUsers]
"""Function from a principal and the tenant that the request names to that tenant's users."""


def tenant_lookup(engine: AnsweringEngine, log: InteractionLog | None) -> TenantLookup:
    """Return the look-up of a tenant's users; it raises 403 for another tenant and 404 for a run without users."""

    def look_up(principal: Principal, tenant: str | None) -> TenantUsers:
        own = own_tenant(principal, tenant)
        try:
            store = engine.store(own)
        except StoreError:
            raise
        except ProperError as error:
            raise APIError(404, str(error), code="no_users") from error
        assert log is not None  # where there is a store, there is a log
        return TenantUsers(store, log)

    return look_up


class RawRoute(CheckedRoute):
    """A route that is matched against the undecoded path."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Return whether a request matches this route, and its scope."""
        raw = scope.get("raw_path")
        return super().matches(scope if raw is None else {**scope, "path": raw.decode("ascii")})


def user_in_path(user: Annotated[str, Path(description="The user's id, percent-encoded as one segment.")]) -> str:
    """Return the user id that a path names.

    Raises:
        APIError: 400; its bytes are not UTF-8.
    """
    try:
        return unquote_to_bytes(user).decode()
    except UnicodeDecodeError as error:
        raise APIError(400, "user: not UTF-8", code="invalid", param="user") from error
