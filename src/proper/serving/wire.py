"""What goes over the wire: OpenAI's chat and completions as far as they are served, and the project's own fields.

An option that would be ignored is refused unless it has the value that changes nothing. Knows nothing about how
requests are answered.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Name = Annotated[str, Field(min_length=1, max_length=512)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Wanted(_Asked):
    """The project's own options, in one field.

    Attributes:
        tenant: whose user; only the key's own tenant is allowed.
        tier: the highest tier that may answer; "groups" leaves the user's own adapter out, "population" also experts.
        gates: whether the reply tells, token by token, which experts it came from; of one prompt only.
    """

    tenant: Annotated[str, Field(max_length=512)] | None = None
    tier: Literal["users", "groups", "population"] = "users"
    gates: bool = False


class StreamOptions(_Asked):
    """What a stream carries beside the text."""

    include_usage: bool = False


class Options(_Asked):
    """What chat and completions have in common."""

    model: Name
    user: Name | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    proper: Wanted | None = None
    n: Literal[1] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None


class TextPart(_Asked):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Message(_Asked):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    name: str | None = None

    @property
    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Options):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    logprobs: Literal[False] | None = None
    response_format: Annotated[dict[str, Any], Field(max_length=1)] | None = None


class CompletionRequest(Options):
    """The body of /v1/completions."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=64)]
    echo: Literal[False] | None = None
    logprobs: None = None
    suffix: None = None
    best_of: Literal[1] | None = None


class Extras(BaseModel):
    """Who answered: in every reply and every piece of a stream.

    Attributes:
        tier: "users" (the user's own adapter), "groups" (the user's embedding), "none" (nobody's), "population" (no
            experts); "base" of a run that has come no further.
        version: the user's version that answered; None for nobody's.
        fallback: why a lower tier than the user's own answered; None if it did not.
        gates: for each token of the reply, or of this piece of a stream, the gate of each of the E experts at the place
            where the token was drawn, the mean over modules: E numbers that sum to 1. None unless asked for, and where
            no experts answer.
    """

    tier: str
    version: int | None
    fallback: str | None = None
    gates: list[list[float]] | None = None


class Usage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatAnswer(BaseModel):
    """A message that answers, or a piece of it."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChoice(BaseModel):
    """The answer of a chat: `message` of a whole one, `delta` of a streamed one."""

    index: int
    message: ChatAnswer | None = None
    delta: ChatAnswer | None = None
    finish_reason: Literal["stop", "length"] | None = None


class TextChoice(BaseModel):
    """One answer of a completion, or a piece of it."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"] | None = None
    logprobs: None = None


class Reply(BaseModel):
    """What chat and completions reply with, streamed or not."""

    id: str
    object: Literal["chat.completion", "chat.completion.chunk", "text_completion"]
    created: int
    model: str
    choices: list[ChatChoice] | list[TextChoice]
    usage: Usage | None = None
    proper: Extras | None = None


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


class Taught(_Asked):
    """An interaction to learn from, in final texts: what was asked as a prompt has it, and the answer to give.

    Attributes:
        id: names it among the user's interactions; without one, equal content is the same interaction.
        timestamp: ISO 8601, or seconds since 1970.
    """

    id: Name | None = None
    input: str
    output: str
    timestamp: Annotated[str, Field(max_length=64)] | None = None


Lesson = Annotated[list[Taught], Field(max_length=10_000)]


class Enrolment(_Asked):
    """Who is new, and what is known of them."""

    user: Name
    interactions: Lesson
    tenant: Annotated[str, Field(max_length=512)] | None = None


class Lessons(_Asked):
    """Further interactions of a user."""

    interactions: Lesson


class FitState(BaseModel):
    """How far a user's latest fit is; `version` is what it made, `progress` goes from 0 to 1."""

    state: Literal["idle", "queued", "fitting", "done", "failed"]
    progress: float
    phase: str | None
    message: str | None
    version: int | None


class Learned(BaseModel):
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


class Person(UserCard):
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


class Rollback(_Asked):
    """Which version to go back to; the one before the current one if None."""

    to: Annotated[int, Field(ge=1, lt=2**63)] | None = None


class Deleted(BaseModel):
    """Who was deleted: no byte of them is left in the run's files, but for what all users share."""

    id: str
    object: Literal["user.deleted"] = "user.deleted"
    deleted: bool = True


class Deletion(BaseModel):
    """A deletion that goes on: `running` while bytes of the user are left, then `done`. `id` names it, not the user."""

    id: str
    object: Literal["user.deletion"] = "user.deletion"
    state: Literal["running", "done"]


class Health(BaseModel):
    """How the server is, and the worker that fits people; "off" where it was started without one."""

    status: Literal["ok", "ready"]
    worker: Literal["off", "alive", "down"]
