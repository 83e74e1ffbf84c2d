"""Pydantic schemas of all routes but chat and completions: models, users, interactions, deletions, health."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, Field, StrictFloat, StrictInt

from proper.data.values import MAX_ID_LENGTH
from proper.serving.schemas.requests import Name, RequestSchema, not_a_boolean


class RunCard(BaseModel):
    """Description of the run that is served.

    Attributes:
        stage: the last trained stage: "base", "population", "groups" or "users".
        experts: number of experts, E; 0 before the stage "groups".
        literals, columns: the prompt template of training, of the first of several tasks: `literals[0] {columns[0]}
            literals[1] ...`.
        tasks: the names of several tasks; empty for a run of one.
    """

    stage: str
    experts: int
    literals: list[str]
    columns: list[str]
    tasks: list[str] = []


class ModelCard(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "proper"
    proper: RunCard


class ModelList(BaseModel):
    """The models that are served."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class NewInteraction(RequestSchema):
    """An interaction to train on: `input` is the final prompt text, `output` the target answer.

    Attributes:
        id: unique among the user's interactions; without ids, interactions with equal content are the same one.
        timestamp: ISO 8601, or seconds since 1970 as a number or as text.
    """

    id: Name | None = None
    input: str
    output: str
    timestamp: Annotated[str, Field(max_length=64)] | StrictInt | StrictFloat | None = None


InteractionList = Annotated[list[NewInteraction], Field(max_length=10_000)]


class Enrolment(RequestSchema):
    """A new user and their interactions."""

    user: Name
    interactions: InteractionList
    tenant: Annotated[str, Field(max_length=MAX_ID_LENGTH)] | None = None


class InteractionBatch(RequestSchema):
    """Further interactions of an enrolled user."""

    interactions: InteractionList


class FitState(BaseModel):
    """State of a user's latest fit; `progress` goes from 0 to 1, `version` is the version that the fit made."""

    state: Literal["idle", "queued", "fitting", "done", "failed"]
    progress: float
    phase: str | None
    message: str | None
    version: int | None


class AppendReply(BaseModel):
    """Result of adding interactions: the accepted ones are on the disk and queued for a fit."""

    id: str
    tier: str
    version: int | None
    accepted: int
    duplicates: int
    fit: FitState


class UserCard(BaseModel):
    """A user; the tier is "none" until the first fit."""

    id: str
    object: Literal["user"] = "user"
    tier: str
    version: int | None = None


class UserStatus(UserCard):
    """A user, with the number of their logged interactions and the state of their latest fit."""

    interactions: int
    fit: FitState


class UserList(BaseModel):
    """A page of users, ordered by id; pass `next` as `after` for the next page."""

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
    """The version to roll back to; null for the one before the current version."""

    to: Annotated[int, Field(ge=1, lt=2**63), BeforeValidator(not_a_boolean)] | None = None


class DeleteReply(BaseModel):
    """A completed deletion: the run's files have no data of the user left, except for what all users share."""

    id: str
    object: Literal["user.deleted"] = "user.deleted"
    deleted: bool = True


class DeletionStatus(BaseModel):
    """State of a deletion: `running` while data of the user is left, then `done`; `id` names the deletion."""

    id: str
    object: Literal["user.deletion"] = "user.deletion"
    state: Literal["running", "done"]


class Health(BaseModel):
    """State of the server and of its fit worker; `worker` is "off" if the server runs without one."""

    status: Literal["ok", "ready"]
    worker: Literal["off", "alive", "down"]
