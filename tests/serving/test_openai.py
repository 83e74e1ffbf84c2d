"""The official client, unchanged: 64 people at once get what `proper generate` answers them, streamed or not."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from proper.inference import PersonalizedModel, load
from proper.inference.generate import generate

PROMPTS = ("What does this say?", "Short", "A rather longer text: what does it say, and to whom?", "Well?")
USERS = (*(f"u{at}" for at in range(8)), "group", "stranger", None)

if TYPE_CHECKING:
    from tests.serving.conftest import Running


def named(user: str | None) -> dict[str, str]:
    return {} if user is None else {"user": user}


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none needed", max_retries=0) as made:
        yield made


def test_64_people_at_once(server: Running, alone: PersonalizedModel) -> None:
    asked = [(PROMPTS[at % 4], USERS[at % 11], 3 + at % 9) for at in range(64)]

    async def one(client: AsyncOpenAI, at: int) -> str:
        prompt, user, length = asked[at]
        common: dict[str, Any] = {"model": "tiny", "max_tokens": length, "stream": at % 2 == 1, **named(user)}
        if at % 4 < 2:
            reply: Any = await client.completions.create(prompt=prompt, **common)
            if at % 2:
                return "".join([part.choices[0].text async for part in reply])
            return str(reply.choices[0].text)
        reply = await client.chat.completions.create(messages=[{"role": "user", "content": prompt}], **common)
        if at % 2:
            return "".join([part.choices[0].delta.content or "" async for part in reply])
        return str(reply.choices[0].message.content)

    async def everybody() -> list[str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none needed", max_retries=0) as client:
            return await asyncio.gather(*(one(client, at) for at in range(64)))

    answers = asyncio.run(everybody())
    for (prompt, user, length), answer in zip(asked, answers, strict=True):
        assert answer == generate(alone, [prompt], [user], max_new_tokens=length)[0]
    stats = server.engine.stats()
    assert stats.adapters.evictions > 0, "there were more people than slots"


def test_who_answered_is_said_in_one_field(client: OpenAI) -> None:
    for user, tier, version in (("u0", "users", 1), ("group", "groups", 1), ("stranger", "none", None)):
        whole = client.completions.create(model="tiny", prompt="Well?", user=user)
        assert whole.model_extra is not None
        assert whole.model_extra["proper"]["tier"] == tier
        assert whole.model_extra["proper"].get("version") == version
        for part in client.completions.create(model="tiny", prompt="Well?", user=user, stream=True):
            assert part.model_extra is not None and part.model_extra["proper"]["tier"] == tier
    lower = client.completions.create(
        model="tiny", prompt="Well?", user="u0", extra_body={"proper": {"tier": "groups"}}
    )
    assert lower.model_extra is not None and lower.model_extra["proper"]["tier"] == "groups"


def test_the_population_beside_the_others(client: OpenAI, long_run: Path, alone: PersonalizedModel) -> None:
    lower = load(long_run, "population")
    expected = generate(lower, PROMPTS, [None] * 4, max_new_tokens=9)
    lower.close()
    for at, prompt in enumerate(PROMPTS):
        reply = client.completions.create(
            model="tiny", prompt=prompt, user="u0", max_tokens=9, extra_body={"proper": {"tier": "population"}}
        )
        assert reply.choices[0].text == expected[at] != generate(alone, [prompt], ["u0"], max_new_tokens=9)[0]
        assert reply.model_extra is not None and reply.model_extra["proper"] == {"tier": "population"}


def test_gates_of_every_token_whole_or_streamed(client: OpenAI) -> None:
    common: dict[str, Any] = {"model": "tiny", "user": "u0", "max_tokens": 9}
    wanted: dict[str, Any] = {"extra_body": {"proper": {"gates": True}}}
    whole = client.completions.create(prompt=PROMPTS[2], **common, **wanted)
    assert whole.model_extra is not None and whole.usage is not None
    gates = whole.model_extra["proper"]["gates"]
    assert len(gates) == whole.usage.completion_tokens and {len(token) for token in gates} == {5}
    assert all(sum(token) == pytest.approx(1, abs=1e-3) for token in gates)
    pieces = [
        part.model_extra["proper"].get("gates", [])
        for part in client.completions.create(prompt=PROMPTS[2], stream=True, **common, **wanted)
        if part.model_extra is not None
    ]
    assert sum(pieces, []) == gates and len([piece for piece in pieces if piece]) > 1
    without = client.completions.create(prompt=PROMPTS[2], **common)
    assert without.model_extra is not None and "gates" not in without.model_extra["proper"]
    with pytest.raises(openai.BadRequestError, match="a request with one prompt"):
        client.completions.create(prompt=list(PROMPTS), **common, **wanted)


def test_usage_and_ends(client: OpenAI, alone: PersonalizedModel) -> None:
    size = len(alone.encoder.prompt(PROMPTS[0]))
    whole = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": PROMPTS[0]}], user="u0", max_completion_tokens=7
    )
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (size, 7)
    assert whole.choices[0].finish_reason == "length" and whole.choices[0].message.role == "assistant"
    parts = list(
        client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": PROMPTS[0]}],
            user="u0",
            max_tokens=7,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert parts[-1].usage is not None and parts[-1].usage.total_tokens == size + 7 and not parts[-1].choices
    assert [part.choices[0].finish_reason for part in parts[:-1] if part.choices][-1] == "length"
    assert "".join(part.choices[0].delta.content or "" for part in parts[:-1]) == whole.choices[0].message.content


def test_several_prompts_and_a_stop_text(client: OpenAI, alone: PersonalizedModel) -> None:
    expected = generate(alone, PROMPTS, ["u1"] * 4, max_new_tokens=12)
    both = client.completions.create(model="tiny", prompt=list(PROMPTS), user="u1", max_tokens=12)
    assert [choice.text for choice in both.choices] == expected
    streamed = [""] * 4
    for part in client.completions.create(model="tiny", prompt=list(PROMPTS), user="u1", max_tokens=12, stream=True):
        streamed[part.choices[0].index] += part.choices[0].text
    assert streamed == expected
    stop = expected[0][len(expected[0]) // 2 :][:3]
    cut = client.completions.create(model="tiny", prompt=PROMPTS[0], user="u1", max_tokens=12, stop=[stop])
    assert cut.choices[0].text == expected[0].partition(stop)[0].strip() and cut.choices[0].finish_reason == "stop"


def test_draws_follow_the_seed(client: OpenAI, alone: PersonalizedModel) -> None:
    options: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9}
    drawn = [
        client.completions.create(model="tiny", prompt="Well?", user="u2", max_tokens=9, seed=seed, **options)
        for seed in (1, 1, 2)
    ]
    texts = [one.choices[0].text for one in drawn]
    assert texts[0] == texts[1] == generate(alone, ["Well?"], ["u2"], max_new_tokens=9, seed=1, **options)[0]
    assert texts[2] != texts[0]


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    assert client.models.retrieve("tiny").model_extra == {
        "proper": {"stage": "users", "experts": 5, "literals": ["", ""], "columns": ["input"], "tasks": []}
    }
    with pytest.raises(openai.NotFoundError, match="the model 'gpt' does not exist"):
        client.models.retrieve("gpt")
    with pytest.raises(openai.NotFoundError, match="the model 'gpt' does not exist"):
        client.completions.create(model="gpt", prompt="x")


def test_a_chat_of_several_turns_is_written_out(client: OpenAI, alone: PersonalizedModel) -> None:
    reply = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}],
        user="u3",
    )
    expected = generate(alone, ["System: Be brief.\nUser: Who?\nAssistant:"], ["u3"])
    assert reply.choices[0].message.content == expected[0]


def test_the_next_turn_of_a_chat_goes_on_from_the_last(
    client: OpenAI, server: Running, alone: PersonalizedModel
) -> None:
    turns: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPTS[2]}]
    for turn in range(3):
        before = server.figures()["proper_prompt_tokens_reused_total"]
        reply = client.chat.completions.create(model="tiny", messages=turns, user="u4", max_tokens=8)
        text = "\n".join([*(f"{one['role'].capitalize()}: {one['content']}" for one in turns), "Assistant:"])
        said = reply.choices[0].message.content
        assert said == generate(alone, [text], ["u4"], max_new_tokens=8)[0]
        reused = server.figures()["proper_prompt_tokens_reused_total"] - before
        assert reused == 0 if turn == 0 else reused > 25 * turn
        turns += [{"role": "assistant", "content": said}, {"role": "user", "content": "And why?"}]
