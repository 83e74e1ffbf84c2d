"""Pydantic schemas of chat and completion requests: the supported part of OpenAI's API, plus the field `proper`.

An unsupported option is refused, not ignored, unless its value changes nothing: null for every known option, and the
neutral values listed by `AcceptOnly`. Hints that cannot change an answer are accepted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictInt,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from proper.data.values import MAX_ID_LENGTH

MAX_PROMPTS = 64
"""Most prompts of one request."""


def not_a_boolean(value: Any) -> Any:
    """Refuse true and false for a number, as which pydantic would take them: 1 and 0."""
    if isinstance(value, bool):
        raise PydanticCustomError("number", "should be a number")
    return value


def _without_nulls(value: Any) -> Any:
    """Leave out null fields, whatever their names: SDKs send back what a message could have had."""
    return {name: one for name, one in value.items() if one is not None} if isinstance(value, dict) else value


Name = Annotated[str, Field(min_length=1, max_length=MAX_ID_LENGTH)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Length = Annotated[int, Field(ge=1, le=1 << 20), BeforeValidator(not_a_boolean)]
Ids = Annotated[list[StrictInt], Field(min_length=1)]


class RequestSchema(BaseModel):
    """Base of all request bodies; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class AcceptOnly:
    """Marks an option that is known but not supported: null and `values` are accepted, other values are refused."""

    values: tuple[Any, ...] = ()

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        """Return the validator; an accepted value becomes None."""
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: Any) -> dict[str, Any]:
        """Return the JSON schema."""
        return {"enum": [None, *self.values]}

    def _check(self, value: Any) -> None:
        if value is not None and value not in self.values:
            raise PydanticCustomError("unsupported", "this value is not supported; leave the option out or send null")


Unsupported = Annotated[None, AcceptOnly()]


class ProperOptions(RequestSchema):
    """Options that OpenAI's API does not have.

    Attributes:
        tenant: the tenant of the user; only the key's own tenant is allowed.
        tier: the highest tier that may answer; "groups" leaves out the user's adapter, "population" also the experts.
        gates: whether the reply has the expert gates of each token; for one prompt only.
        task: name of the prompt's task in a run of several; the first one if absent.
    """

    tenant: Annotated[str, Field(max_length=MAX_ID_LENGTH)] | None = None
    tier: Literal["users", "groups", "population"] | None = None
    gates: bool | None = None
    task: Annotated[str, Field(max_length=512)] | None = None


class StreamOptions(RequestSchema):
    """Options of a stream."""

    include_usage: bool | None = None
    include_obfuscation: Annotated[None, AcceptOnly((False,))] = None


class Options(RequestSchema):
    """Options that chat and completion requests share.

    Attributes:
        user: the user whose personal model answers. If absent, `safety_identifier` or `metadata.user_id` is used, where
            clients that no longer send `user` put the user. Two different users are refused.
        metadata, prompt_cache_key, prompt_cache_retention: hints that cannot change an answer.
    """

    model: Name
    user: Name | None = None
    safety_identifier: Name | None = None
    metadata: dict[str, str | None] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Length | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False), BeforeValidator(not_a_boolean)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), BeforeValidator(not_a_boolean)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1), BeforeValidator(not_a_boolean)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    proper: ProperOptions | None = None
    prompt_cache_key: Annotated[str, Field(max_length=512)] | None = None
    prompt_cache_retention: Annotated[str, Field(max_length=64)] | None = None
    n: Annotated[None, AcceptOnly((1,))] = None
    frequency_penalty: Annotated[None, AcceptOnly((0,))] = None
    presence_penalty: Annotated[None, AcceptOnly((0,))] = None
    logit_bias: Annotated[None, AcceptOnly(({}, []))] = None
    store: Annotated[None, AcceptOnly((False,))] = None
    service_tier: Annotated[None, AcceptOnly(("auto", "default"))] = None

    @field_validator("safety_identifier", "metadata")
    @classmethod
    def _names_one_user(cls, value: Any, info: ValidationInfo) -> Any:
        named = _named(value)
        if named is not None and not 1 <= len(named) <= MAX_ID_LENGTH:
            raise PydanticCustomError("user", f"user_id should have 1 to {MAX_ID_LENGTH} characters")
        others = [info.data.get("user"), info.data.get("safety_identifier")]
        if named is not None and any(other not in (None, named) for other in others):
            raise PydanticCustomError("user", "differs from the user in another field of the request")
        return value

    @model_validator(mode="after")
    def _find_user(self) -> Options:
        if self.user is None:
            self.user = self.safety_identifier or _named(self.metadata)
        return self


def _named(value: str | dict[str, str | None] | None) -> str | None:
    return value.get("user_id") if isinstance(value, dict) else value


class TextPart(RequestSchema):
    """A text part of a message; `cache_control` is a hint that cannot change an answer."""

    type: Literal["text"]
    text: str
    cache_control: dict[str, Any] | None = None

    _leave_out_nulls = model_validator(mode="before")(_without_nulls)


class Message(RequestSchema):
    """One message of a chat; an assistant's message is accepted as clients send it back, with null and empty fields.

    The role `developer`, OpenAI's newer name of `system`, becomes `system`: chat templates leave out roles that they do
    not know.
    """

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str | list[TextPart] | None, Field(validate_default=True)] = None
    name: str | None = None
    refusal: Annotated[None, AcceptOnly(("",))] = None
    annotations: Annotated[None, AcceptOnly(([],))] = None
    audio: Unsupported = None
    function_call: Unsupported = None
    tool_calls: Annotated[None, AcceptOnly(([],))] = None
    tool_call_id: Unsupported = None
    # Messages of LiteLLM and LangChain have these fields.
    reasoning_content: Annotated[None, AcceptOnly(("",))] = None
    thinking_blocks: Annotated[None, AcceptOnly(([],))] = None
    images: Annotated[None, AcceptOnly(([],))] = None
    provider_specific_fields: Annotated[dict[str, Unsupported], Field()] | None = None

    _leave_out_nulls = model_validator(mode="before")(_without_nulls)

    @field_validator("role")
    @classmethod
    def _of_the_data(cls, value: str) -> str:
        return "system" if value == "developer" else value

    @field_validator("content")
    @classmethod
    def _is_there(cls, value: Any, info: ValidationInfo) -> Any:
        if not value and value != "" and info.data.get("role") != "assistant":
            raise PydanticCustomError("missing", "should be text, or a list of text parts")
        return value

    @property
    def text(self) -> str:
        """The content as one text."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content or ())


class ChatRequest(Options):
    """The request body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)]
    max_completion_tokens: Length | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20), BeforeValidator(not_a_boolean)] | None = None
    response_format: Annotated[None, AcceptOnly(({"type": "text"},))] = None
    tools: Annotated[None, AcceptOnly(([],))] = None
    tool_choice: Annotated[None, AcceptOnly(("none", "auto"))] = None
    parallel_tool_calls: Annotated[None, AcceptOnly((True, False))] = None
    functions: Annotated[None, AcceptOnly(([],))] = None
    function_call: Annotated[None, AcceptOnly(("none", "auto"))] = None
    reasoning_effort: Annotated[None, AcceptOnly(("none",))] = None
    verbosity: Annotated[None, AcceptOnly(("medium",))] = None
    modalities: Annotated[None, AcceptOnly((["text"], []))] = None
    prediction: Unsupported = None
    audio: Unsupported = None
    web_search_options: Unsupported = None

    @field_validator("max_completion_tokens")
    @classmethod
    def _one_length(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("max_tokens") not in (None, value):
            raise PydanticCustomError("length", "differs from max_tokens; send one of them")
        return value

    @field_validator("top_logprobs")
    @classmethod
    def _with_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and not info.data.get("logprobs"):
            raise PydanticCustomError("logprobs", "needs logprobs: true")
        return value

    @property
    def alternatives(self) -> int | None:
        """Number of likeliest tokens reported at each token of the answer; None if no logprobs are requested."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Options):
    """The request body of /v1/completions; a prompt is text or a list of token ids."""

    prompt: str | Annotated[list[str], Field(min_length=1)] | Ids | Annotated[list[Ids], Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=5, strict=True)] | Literal[False] | None = None
    echo: Annotated[None, AcceptOnly((False,))] = None
    suffix: Annotated[None, AcceptOnly(("",))] = None
    best_of: Annotated[None, AcceptOnly((1,))] = None

    @field_validator("prompt")
    @classmethod
    def _not_too_many(cls, value: Any) -> Any:
        if isinstance(value, list) and not isinstance(value[0], int) and len(value) > MAX_PROMPTS:
            raise PydanticCustomError("prompt", "should be at most {most} prompts", {"most": MAX_PROMPTS})
        return value

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts as a list, also if there is only one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[one for one in self.prompt if isinstance(one, int)]]
        return [one for one in self.prompt if not isinstance(one, int)]

    @property
    def alternatives(self) -> int | None:
        """Number of likeliest tokens reported at each token of the answer; None if no logprobs are requested."""
        return None if self.logprobs is None or self.logprobs is False else int(self.logprobs)
