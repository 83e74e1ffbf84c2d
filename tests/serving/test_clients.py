"""LangChain's and LiteLLM's clients, unchanged, against a real server; skipped where the extra `clients` is missing."""

from __future__ import annotations

import asyncio
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest

from proper.inference import PersonalizedModel
from proper.inference.generate import generate

if TYPE_CHECKING:
    from tests.serving.conftest import Running

# What these two packages warn of on import is not ours.
pytestmark = pytest.mark.filterwarnings("default")
PROMPT = "What does this say?"
AGAIN = "And why?"


@pytest.fixture
def expected(alone: PersonalizedModel) -> list[str]:
    """The answers to the first and the second turn, as `proper generate` gives them."""
    first = generate(alone, [PROMPT], ["u1"], max_new_tokens=8)[0]
    turns = f"User: {PROMPT}\nAssistant: {first}\nUser: {AGAIN}\nAssistant:"
    return [first, generate(alone, [turns], ["u1"], max_new_tokens=8)[0]]


@pytest.mark.skipif(find_spec("langchain_openai") is None, reason="langchain-openai is not installed")
def test_langchain(server: Running, expected: list[str]) -> None:
    from langchain_openai import ChatOpenAI, OpenAI

    common: dict[str, Any] = {"base_url": f"{server.url}/v1", "api_key": "none needed", "model": "tiny"}
    chat = ChatOpenAI(**common, max_completion_tokens=8, max_retries=0, model_kwargs={"user": "u1"})
    first = chat.invoke(PROMPT)
    assert first.content == expected[0] and first.usage_metadata is not None
    assert first.usage_metadata["output_tokens"] == 8
    assert chat.invoke([("user", PROMPT), first, ("user", AGAIN)]).content == expected[1]
    pieces = list(chat.stream(PROMPT))
    assert "".join(str(piece.content) for piece in pieces) == expected[0]
    told = chat.bind(logprobs=True, top_logprobs=2).invoke(PROMPT).response_metadata["logprobs"]
    assert len(told["content"]) == 8 and len(told["content"][0]["top_logprobs"]) == 2
    parts: Any = [{"type": "text", "text": PROMPT, "cache_control": {"type": "ephemeral"}}]
    assert chat.invoke([("user", parts)]).content == expected[0]
    assert [one.content for one in asyncio.run(chat.abatch([PROMPT, PROMPT]))] == expected[:1] * 2
    plain = OpenAI(**common, max_tokens=8, temperature=0, max_retries=0, model_kwargs={"user": "u1"})
    assert plain.invoke(PROMPT) == expected[0]
    assert "".join(plain.stream(PROMPT)) == expected[0]
    with pytest.raises(Exception, match="this value is not supported"):
        chat.bind(n=2).invoke(PROMPT)


@pytest.mark.skipif(find_spec("litellm") is None, reason="litellm is not installed")
def test_litellm(server: Running, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it asks a server for prices otherwise
    import litellm

    litellm.telemetry = False
    # LiteLLM drops `user` for a model that it does not know, unless it is allowed by name; not `safety_identifier`.
    common: dict[str, Any] = {
        "api_base": f"{server.url}/v1",
        "api_key": "none needed",
        "model": "openai/tiny",
        "max_tokens": 8,
        "num_retries": 0,
        "safety_identifier": "u1",
    }
    turns: list[Any] = [{"role": "user", "content": PROMPT}]
    whole = litellm.completion(messages=turns, **common)
    assert whole.choices[0].message.content == expected[0] and whole.usage.completion_tokens == 8
    for message in (whole.choices[0].message, whole.choices[0].message.model_dump()):
        again = litellm.completion(messages=[*turns, message, {"role": "user", "content": AGAIN}], **common)
        assert again.choices[0].message.content == expected[1]
    pieces = litellm.completion(messages=turns, stream=True, stream_options={"include_usage": True}, **common)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == expected[0]
    named = {**common, "safety_identifier": None, "user": "u1", "allowed_openai_params": ["user"]}
    told = litellm.completion(messages=turns, logprobs=True, top_logprobs=1, **named)
    assert told.choices[0].message.content == expected[0]
    assert len(told.choices[0].logprobs.content) == 8
    named["model"] = "text-completion-openai/tiny"
    text = litellm.text_completion(prompt=PROMPT, **named)
    assert text.choices[0].text == expected[0]
