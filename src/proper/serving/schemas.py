"""What goes over the wire about the run, its users and their interactions: the project's own routes.

Knows nothing about how requests are answered.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from proper.serving.request_schemas import Name, RequestSchema


class RunCard(BaseModel):
    """What a run answers with.

    Attributes:
        stage: how far it has come: "base", "population", "groups" or "users".
        experts: E; 0 before the groups.
        literals, columns: how prompts were written in training: `literals[0] {columns[0]} literals[1] ...`.
    """

    stage: str
    experts: int
    literals: list[str]
    columns: list[str]


class ModelCard(BaseModel):
    """A model that can be asked."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "proper"
    proper: RunCard


class ModelList(BaseModel):
    """The models that can be asked."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class NewInteraction(RequestSchema):
    """An interaction to learn from, in final texts: what was asked as a prompt has it, and the answer to give.

    Attributes:
        id: names it among the user's interactions; without one, equal content is the same interaction.
        timestamp: ISO 8601, or seconds since 1970.
    """

    id: Name | None = None
    input: str
    output: str
    timestamp: Annotated[str, Field(max_length=64)] | None = None


Lesson = Annotated[list[NewInteraction], Field(max_length=10_000)]


class Enrolment(RequestSchema):
    """Who is new, and what is known of them."""

    user: Name
    interactions: Lesson
    tenant: Annotated[str, Field(max_length=512)] | None = None


class InteractionBatch(RequestSchema):
    """Further interactions of a user."""

    interactions: Lesson


class FitState(BaseModel):
    """How far a user's latest fit is; `version` is what it made, `progress` goes from 0 to 1."""

    state: Literal["idle", "queued", "fitting", "done", "failed"]
    progress: float
    phase: str | None
    message: str | None
    version: int | None


class AppendReply(BaseModel):
    """What became of the interactions that were handed in: on the disk, and queued for a fit."""

    id: str
    tier: str
    version: int | None
    accepted: int
    duplicates: int
    fit: FitState


class UserCard(BaseModel):
    """A user; of the tier "none" until the first fit."""

    id: str
    object: Literal["user"] = "user"
    tier: str
    version: int | None = None


class UserStatus(UserCard):
    """A user, with how many interactions were logged for them and how far their fit is."""

    interactions: int
    fit: FitState


class UserList(BaseModel):
    """A page of users, ordered by id; `next` asks for the page after it."""

    object: Literal["list"] = "list"
    data: list[UserCard]
    next: str | None = None


class VersionCard(BaseModel):
    """A stored version of a user."""

    version: int
    parent: int | None
    tier: str
    bytes: int
    written: int


class VersionList(BaseModel):
    """A user's stored versions, newest first."""

    object: Literal["list"] = "list"
    data: list[VersionCard]


class Rollback(RequestSchema):
    """Which version to go back to; the one before the current one if None."""

    to: Annotated[int, Field(ge=1, lt=2**63)] | None = None


class DeleteReply(BaseModel):
    """Who was deleted: no byte of them is left in the run's files, but for what all users share."""

    id: str
    object: Literal["user.deleted"] = "user.deleted"
    deleted: bool = True


class DeletionStatus(BaseModel):
    """A deletion that goes on: `running` while bytes of the user are left, then `done`. `id` names it, not the user."""

    id: str
    object: Literal["user.deletion"] = "user.deletion"
    state: Literal["running", "done"]


class Health(BaseModel):
    """How the server is, and the worker that fits people; "off" where it was started without one."""

    status: Literal["ok", "ready"]
    worker: Literal["off", "alive", "down"]
