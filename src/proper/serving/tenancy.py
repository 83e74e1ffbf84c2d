"""From whoever asks to what they may reach: their tenant's part of the store and of the log.

Knows nothing about routes or adapters.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import groupby

from proper.adapters.store import AdapterStore
from proper.errors import ProperError, StoreError
from proper.inference.engine import Engine
from proper.interactions.log import InteractionLog
from proper.serving.auth import own_tenant
from proper.serving.errors import APIError, without_folders
from proper.serving.keys import Principal
from proper.serving.schemas import FitState, UserCard


@dataclass(frozen=True)
class Holdings:
    """One tenant's users: those of the store, and those whom only the log knows yet."""

    store: AdapterStore
    log: InteractionLog

    @property
    def tenant(self) -> str:
        """Whose they are."""
        return self.store.tenant

    def knows(self, user: str) -> bool:
        """Whether there is such a user."""
        return self.store.head(user) is not None or self.log.knows(self.tenant, user)

    def require(self, user: str) -> None:
        """See that there is such a user.

        Raises:
            Refusal: 404; there is none.
        """
        if not self.knows(user):
            raise APIError(404, f"there is no user {user!r}", code="user_not_found", param="user")

    def card(self, user: str) -> UserCard:
        """Describe a user who is known."""
        head = self.store.head(user)
        return UserCard(id=user, tier=head.tier if head else "none", version=head.version if head else None)

    def fit(self, user: str) -> FitState:
        """Say how far a user's fit is."""
        state = FitState(**asdict(self.log.queue.fit(self.tenant, user)))
        if state.message is not None:
            state.message = without_folders(state.message, self.store.folder.parent)
        return state

    def users(self, after: str | None) -> Iterator[tuple[str, str]]:
        """Yield users and tiers, ordered by id."""
        waiting = ((user, "none") for user in self.log.people(self.tenant, after))
        both = heapq.merge(self.store.users(after), waiting, key=lambda pair: pair[0].encode("utf-8", "surrogatepass"))
        # The store's comes first of two equal ones.
        return (next(pairs) for _, pairs in groupby(both, key=lambda pair: pair[0]))


Reach = Callable[[Principal, str | None], Holdings]
"""From who asks, and the tenant they name, to what they may reach."""


def reach(engine: Engine, log: InteractionLog | None) -> Reach:
    """Return what finds a tenant's users; it refuses with 403 another's, with 404 those of a run without any."""

    def holdings(who: Principal, tenant: str | None) -> Holdings:
        own = own_tenant(who, tenant)
        try:
            store = engine.store(own)
        except StoreError:
            raise
        except ProperError as error:
            raise APIError(404, str(error), code="no_users") from error
        assert log is not None  # where there is a store, there is a log
        return Holdings(store, log)

    return holdings
