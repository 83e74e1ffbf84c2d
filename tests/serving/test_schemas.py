"""Known options that change nothing pass, texts are whole, and a refusal names its cause; replies have all keys."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import ValidationError

from proper.serving.json_bodies import error_location, first_error, lone_surrogates
from proper.serving.schemas.requests import ChatRequest, CompletionRequest

if TYPE_CHECKING:
    import httpx

    from tests.serving.conftest import Running

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
TEXT: dict[str, Any] = {"model": "tiny", "prompt": "Hello", "max_tokens": 2}
# Every option of OpenAI's two requests, by their API reference.
OPTIONS = [
    "frequency_penalty",
    "logit_bias",
    "max_tokens",
    "metadata",
    "n",
    "presence_penalty",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "seed",
    "service_tier",
    "stop",
    "store",
    "stream",
    "stream_options",
    "temperature",
    "top_p",
    "user",
    "logprobs",
]
CHAT_OPTIONS = [
    "audio",
    "function_call",
    "functions",
    "max_completion_tokens",
    "modalities",
    "parallel_tool_calls",
    "prediction",
    "reasoning_effort",
    "response_format",
    "tool_choice",
    "tools",
    "top_logprobs",
    "verbosity",
    "web_search_options",
]
TEXT_OPTIONS = ["best_of", "echo", "suffix"]
NEUTRAL: list[dict[str, Any]] = [
    {"tools": []},
    {"functions": []},
    {"tool_choice": "none"},
    {"parallel_tool_calls": True},
    {"top_logprobs": 0},
    {"logprobs": False},
    {"service_tier": "auto"},
    {"modalities": ["text"]},
    {"stream": False, "stream_options": {"include_usage": None}},
    {"stream_options": {"include_obfuscation": False}},
    {"response_format": {"type": "text"}},
    {"stop": []},
    {"top_p": 0},
    {"n": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "store": False},
    {"metadata": {}, "prompt_cache_key": "any", "verbosity": "medium"},
    {"proper": {"tier": None, "gates": None, "tenant": None}},
]


def sent(server: Running, path: str, body: dict[str, Any]) -> httpx.Response:
    with server.client() as client:
        reply: httpx.Response = client.post(f"/v1/{path}", json=body)
        return reply


def answer(reply: httpx.Response) -> Any:
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"]


def test_null_is_absence_for_every_known_option(server: Running) -> None:
    for path, body, names in (
        ("chat/completions", CHAT, OPTIONS + CHAT_OPTIONS),
        ("completions", TEXT, OPTIONS + TEXT_OPTIONS),
    ):
        plain = answer(sent(server, path, body))
        for name in names:
            nulled = sent(server, path, {**body, name: None})
            assert name == "max_tokens" or answer(nulled) == plain, name
            assert nulled.status_code == 200, name
        assert answer(sent(server, path, {**body, **dict.fromkeys(set(names) - {"max_tokens"})})) == plain
        assert sent(server, path, {**body, "unknown": None}).status_code == 400


@pytest.mark.parametrize("more", NEUTRAL, ids=json.dumps)
def test_what_changes_nothing_passes(server: Running, more: dict[str, Any]) -> None:
    assert answer(sent(server, "chat/completions", {**CHAT, **more})) == answer(sent(server, "chat/completions", CHAT))


@pytest.mark.parametrize(
    "more",
    [
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"tool_choice": "required"},
        {"n": 2},
        {"store": True},
        {"logit_bias": {"5": 1}},
        {"presence_penalty": 0.1},
        {"reasoning_effort": "high"},
        {"audio": {"voice": "x", "format": "wav"}},
        {"response_format": {"type": "json_object"}},
    ],
    ids=json.dumps,
)
def test_what_would_be_ignored_is_refused(server: Running, more: dict[str, Any]) -> None:
    error = sent(server, "chat/completions", {**CHAT, **more}).json()["error"]
    assert error["param"] == next(iter(more)) and "is not supported" in error["message"]


def test_two_different_lengths_are_refused() -> None:
    assert ChatRequest.model_validate({**CHAT, "max_tokens": 5, "max_completion_tokens": 5}).max_tokens == 5
    with pytest.raises(ValidationError, match="max_completion_tokens\n  differs from max_tokens; send one of them"):
        ChatRequest.model_validate({**CHAT, "max_tokens": 5, "max_completion_tokens": 3})


ECHO = {"refusal": None, "annotations": None, "audio": None, "function_call": None, "tool_calls": None, "name": None}


@pytest.mark.parametrize(
    "name", ["max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "top_logprobs"]
)
def test_true_is_no_number(name: str) -> None:
    with pytest.raises(ValidationError, match="should be a number"):
        ChatRequest.model_validate({**CHAT, "logprobs": True, name: True})


@pytest.mark.parametrize(
    "empty",
    [
        ECHO | {"parsed": None},  # of the SDK's `chat.completions.stream` and `parse`
        {"annotations": [], "tool_calls": []},
        {"provider_specific_fields": {}, "reasoning_content": ""},
    ],
)
def test_an_assistants_message_comes_back_as_it_was_dumped(server: Running, empty: dict[str, Any]) -> None:
    def turns(more: dict[str, Any]) -> list[dict[str, Any]]:
        return [*CHAT["messages"], {"role": "assistant", "content": "Hi", **more}, {"role": "user", "content": "Why?"}]

    plain = answer(sent(server, "chat/completions", {**CHAT, "messages": turns({})}))
    assert answer(sent(server, "chat/completions", {**CHAT, "messages": turns(empty)})) == plain
    part = {"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}
    assert answer(sent(server, "chat/completions", {**CHAT, "messages": turns({"content": [part]})})) == plain
    hollow = answer(sent(server, "chat/completions", {**CHAT, "messages": turns({"content": ""})}))
    for none in (None, []):
        assert answer(sent(server, "chat/completions", {**CHAT, "messages": turns({"content": none})})) == hollow


@pytest.mark.parametrize(
    ("message", "place", "said"),
    [
        (
            {"role": "user", "content": [{"type": "text", "text": "x", "colour": 1}]},
            "content.0.colour",
            "not permitted",
        ),
        ({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, "content.0", ""),
        ({"role": "user", "content": [{"type": "text"}]}, "content.0.text", "required"),
        ({"role": "user", "content": None}, "content", "should be text"),
        ({"role": "user"}, "content", "should be text"),
        ({"role": "user", "content": 5}, "content", "valid string"),
        ({"role": "assistant", "content": "x", "tool_calls": [{}]}, "tool_calls", "not supported"),
        ({"role": "tool", "content": "x"}, "role", "'assistant'"),
    ],
)
def test_a_refused_message_names_the_cause(server: Running, message: Any, place: str, said: str) -> None:
    error = sent(server, "chat/completions", {**CHAT, "messages": [message]}).json()["error"]
    assert error["param"].startswith(f"messages.0.{place}") and said in error["message"], error
    assert "str" not in error["param"] and error["code"] == "invalid"


@pytest.mark.parametrize("text", ["", " \n"])
def test_a_prompt_without_a_text_is_named_by_its_field(server: Running, text: str) -> None:
    chat = {**CHAT, "messages": [{"role": "system", "content": text}, {"role": "user", "content": text}]}
    for route, body, field in (
        ("completions", {**TEXT, "prompt": text}, "prompt"),
        ("chat/completions", chat, "messages"),
    ):
        error = sent(server, route, body).json()["error"]
        assert (error["message"], error["param"], error["code"]) == ("the prompt is empty", field, "invalid")


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({**TEXT, "stop": ["a", ""]}, ("stop", 1)),
        ({**TEXT, "prompt": []}, ("prompt",)),
        ({**TEXT, "prompt": ["a", 5]}, ("prompt", 1)),
        ({**TEXT, "prompt": [[1], []]}, ("prompt", 1)),
        ({**TEXT, "metadata": {"str": 5}}, ("metadata", "str")),
    ],
)
def test_places_are_those_of_the_body(body: dict[str, Any], place: tuple[str | int, ...]) -> None:
    with pytest.raises(ValidationError) as refused:
        CompletionRequest.model_validate(body)
    errors: list[Any] = [{**error, "loc": ("body", *error["loc"])} for error in refused.value.errors()]
    assert first_error(errors, body)[0] == place
    assert all(len(error_location(error, body)) <= len(place) for error in errors)


HALF = "hi \ud83d there"
CUT: list[tuple[str, Any, str]] = [
    ("completions", {**TEXT, "prompt": HALF}, "prompt"),
    ("completions", {**TEXT, "prompt": ["x", HALF]}, "prompt.1"),
    ("completions", {**TEXT, "user": HALF}, "user"),
    ("completions", {**TEXT, "model": HALF}, "model"),
    ("completions", {**TEXT, "stop": [HALF]}, "stop.0"),
    ("completions", {**TEXT, "metadata": {"user_id": HALF}}, "metadata.user_id"),
    ("completions", {**TEXT, "proper": {"tenant": HALF}}, "proper.tenant"),
    ("completions", {**TEXT, "\udc00": 1}, "\\udc00"),
    ("chat/completions", {**CHAT, "messages": [{"role": "user", "content": HALF}]}, "messages.0.content"),
    ("chat/completions", {**CHAT, "messages": [{"role": HALF, "content": "x"}]}, "messages.0.role"),
    ("chat/completions", {**CHAT, "tools": [{"\udc00": 1}]}, "tools.0.\\udc00"),
    ("users", {"user": HALF, "interactions": []}, "user"),
    ("users", {"user": "x", "interactions": [{"input": HALF, "output": "y"}]}, "interactions.0.input"),
    ("users/u0/interactions", {"interactions": [{"input": "x", "output": HALF}]}, "interactions.0.output"),
    ("users/u0/rollback", {"to": HALF}, "to"),
]


@pytest.mark.parametrize(("path", "body", "place"), CUT, ids=[f"{path} {place}" for path, _, place in CUT])
def test_half_a_character_is_refused_by_its_place(server: Running, path: str, body: Any, place: str) -> None:
    escaped = json.dumps(body).encode()
    raw = json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass")
    wide = json.dumps(body, ensure_ascii=False).encode("utf-16-le", "surrogatepass")
    for content in (escaped, raw, wide):
        with server.client() as client:
            headers = {"Content-Type": "application/json"}
            reply = client.post(f"/v1/{path}", content=content, headers=headers)
        assert reply.status_code == 400, reply.text
        assert (reply.json()["error"]["code"], reply.json()["error"]["param"]) == ("invalid", place)


def test_whole_characters_pass() -> None:
    assert not list(lone_surrogates(json.loads('{"a": ["\\ud83d\\ude00", 1, null], "b": {"é": true}}')))


@pytest.mark.parametrize(
    ("named", "user"),
    [
        ({"safety_identifier": "u1"}, "u1"),
        ({"metadata": {"user_id": "u1", "other": "x"}}, "u1"),
        ({"safety_identifier": "u1", "metadata": {"user_id": "u1"}, "user": "u1"}, "u1"),
        ({"user": "u1", "safety_identifier": None, "metadata": {"user_id": None}}, "u1"),
        ({"metadata": {"other": "x"}}, None),
        ({"user": "u1", "safety_identifier": "u2"}, "safety_identifier"),
        ({"user": "u1", "metadata": {"user_id": "u2"}}, "metadata"),
        ({"safety_identifier": "u1", "metadata": {"user_id": "u2"}}, "metadata"),
        ({"metadata": {"user_id": ""}}, "metadata"),
    ],
    ids=str,
)
def test_who_the_user_is(server: Running, named: dict[str, Any], user: str | None) -> None:
    for path, body in (("completions", TEXT), ("chat/completions", CHAT)):
        reply = sent(server, path, {**body, **named})
        if user in (None, "u1"):
            assert reply.json()["proper"]["tier"] == ("none" if user is None else "users")
            assert answer(reply) == answer(sent(server, path, {**body, "user": user}))
        else:
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, user)


def events(server: Running, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    reply = sent(server, path, {**body, "stream": True})
    assert reply.headers["X-Accel-Buffering"] == "no", "nginx would send the whole stream at its end"
    lines = reply.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


@pytest.mark.parametrize(("path", "body"), [("completions", TEXT), ("chat/completions", CHAT)])
@pytest.mark.parametrize("usage", [True, False])
def test_every_piece_has_the_keys_that_openai_requires(server: Running, path: str, body: Any, usage: bool) -> None:
    found = events(server, path, {**body, "stream_options": {"include_usage": usage}})
    pieces = found[:-1] if usage else found
    for piece in pieces:
        (choice,) = piece["choices"]
        assert {"index", "finish_reason", "logprobs", "text" if "prompt" in body else "delta"} == set(choice)
        assert choice["logprobs"] is None and ("usage" in piece) is usage and piece.get("usage") is None
        assert {"id", "object", "created", "model", "proper"} <= set(piece)
    assert [piece["choices"][0]["finish_reason"] for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1]["choices"][0]["finish_reason"] == "length" and len(pieces) > 1
    if usage:
        assert found[-1]["choices"] == [] and found[-1]["usage"]["completion_tokens"] == 2
    (whole,) = answer(sent(server, path, body))
    assert whole["logprobs"] is None
    assert "prompt" in body or set(whole["message"]) == {"role", "content", "refusal"}


def test_the_document_knows_the_neutral_values() -> None:
    schema = ChatRequest.model_json_schema()["properties"]
    assert schema["tools"]["enum"] == [None, []] and schema["n"]["enum"] == [None, 1]
