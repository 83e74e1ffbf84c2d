"""Routes POST /v1/users and POST /v1/users/ID/interactions: enrol a user, append interactions.

Interactions are on the disk, and a fit is queued, before the reply. The fit itself runs in another process.
"""

# No `from __future__ import annotations`: FastAPI could not resolve the types that are defined inside a function.
# The routes are not coroutines: FastAPI runs them on threads, where they may wait for files and locks.

from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Depends, Query

from proper.data.rows import BadValue
from proper.data.values import MAX_ID_LENGTH
from proper.errors import UnstorableError
from proper.interactions.log import ConflictError, DeletedError, ExistsError, LogEntry, UserIdError
from proper.interactions.parsing import Read, plain_reader, with_known_labels
from proper.serving.auth import Authenticator
from proper.serving.engines import AnsweringModel
from proper.serving.errors import APIError
from proper.serving.keys import Principal
from proper.serving.schemas.resources import AppendReply, Enrolment, InteractionBatch, NewInteraction
from proper.serving.tenancy import TenantLookup, TenantUsers, user_in_path


def enrolment_routes(router: APIRouter, model: AnsweringModel, lookup: TenantLookup, auth: Authenticator) -> None:
    """Add the enrolment and append routes to a router at /v1/users."""
    WriteCaller = Annotated[Principal, Depends(auth.needs("write", "admin"))]

    def entries(users: TenantUsers, interactions: Sequence[NewInteraction]) -> list[LogEntry]:
        task = with_known_labels(users.store.folder.parent, model.config.task)
        return _entries(interactions, plain_reader(task, "input", "output"))

    @router.post("")
    def enrol(body: Enrolment, caller: WriteCaller) -> AppendReply:
        """Enrol a new user with their interactions; an adapter is fitted in the background."""
        users = lookup(caller, body.tenant)
        if body.user in (".", ".."):
            raise APIError(400, "user: this id cannot be part of a URL", code="invalid", param="user")
        if users.knows(body.user):
            raise _exists(body.user)
        return _append(users, body.user, entries(users, body.interactions), True)

    @router.post("/{user}/interactions")
    def append(
        user: Annotated[str, Depends(user_in_path)],
        body: InteractionBatch,
        caller: WriteCaller,
        tenant: Annotated[str | None, Query(max_length=MAX_ID_LENGTH)] = None,
    ) -> AppendReply:
        """Add interactions of a user; interactions that are already stored count as duplicates."""
        users = lookup(caller, tenant)
        users.require(user)
        return _append(users, user, entries(users, body.interactions), False)


def _append(users: TenantUsers, user: str, entries: Sequence[LogEntry], new: bool) -> AppendReply:
    try:
        result = users.log.append(users.tenant, user, entries, new=new)
    except UserIdError as error:
        raise APIError(400, str(error), code="invalid", param="user") from error
    except ExistsError as error:
        raise _exists(user) from error
    except DeletedError as error:
        if new:
            raise APIError(409, str(error), code="deletion_running", param="user") from error
        raise APIError(404, str(error), code="user_not_found", param="user") from error
    except ConflictError as error:
        location = f"interactions.{error.at}.id"
        raise APIError(409, f"{location}: {error}", code="interaction_conflict", param=location) from error
    except UnstorableError as error:
        why = "has text that the run's database cannot hold: a character NUL, or ids of more than 2,600 bytes"
        raise APIError(400, f"interactions: {why}", code="invalid", param="interactions") from error
    card = users.card(user)
    return AppendReply(
        id=user,
        tier=card.tier,
        version=card.version,
        accepted=result.accepted,
        duplicates=result.duplicates,
        fit=users.fit(user),
    )


def _entries(interactions: Sequence[NewInteraction], read: Read) -> list[LogEntry]:
    entries = []
    for at, each in enumerate(interactions):
        try:
            entries.append(read(each.model_dump(exclude_none=True)))
        except BadValue as error:
            location = f"interactions.{at}.{error.field}"
            raise APIError(400, f"{location}: {error.what}", code="invalid", param=location) from error
    return entries


def _exists(user: str) -> APIError:
    return APIError(409, f"the user {user!r} exists already", code="user_exists", param="user")
