"""Log-probabilities are the model's own, in OpenAI's shapes, whole and streamed; prompts may be ids of tokens."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncGenerator, Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import openai
import pytest
import torch
from openai import OpenAI

from proper.data.encoder import Encoder
from proper.inference import PersonalizedModel
from proper.inference.sampling import MIN_LOGPROB, logprobs_of
from proper.serving.answers import AnswerPiece, Answers
from proper.serving.reply_format import ReplyFormat
from proper.serving.routes.generation import server_sent
from tests import tokenizer_kinds

if TYPE_CHECKING:
    from tests.serving.conftest import Running

PROMPT = "What does this say?"
LENGTH = 6


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none needed", max_retries=0) as made:
        yield made


def by_hand(alone: PersonalizedModel, user: str) -> tuple[list[int], torch.Tensor]:
    """The greedy answer token by token, every prompt computed anew; the (T, V) log-probabilities behind it."""
    ids, rows, all_shares = list(alone.encoder.prompt(PROMPT)), alone.rows([user]), []
    for _ in range(LENGTH):
        with torch.no_grad(), alone.model.routing.use(rows):
            logits = alone.model.backbone.model(input_ids=torch.tensor([ids])).logits[0, -1]
        all_shares.append(logits.float().log_softmax(-1))
        ids.append(int(logits.argmax()))
    return ids[-LENGTH:], torch.stack(all_shares)


def test_chat_and_completion_tell_the_models_own(client: OpenAI, alone: PersonalizedModel) -> None:
    ids, shares = by_hand(alone, "u0")
    tokens = [alone.encoder.tokenizer.decode([one]) for one in ids]
    expected = [float(row[one]) for row, one in zip(shares, ids, strict=True)]
    common: dict[str, Any] = {"model": "tiny", "user": "u0", "max_tokens": LENGTH}
    # The likeliest token comes at a low temperature too, and the temperature does not show.
    for temperature in (0, 1e-4):
        common["temperature"] = temperature
        told = client.completions.create(prompt=PROMPT, logprobs=3, **common).choices[0].logprobs
        assert told is not None and told.token_logprobs is not None and told.top_logprobs is not None
        assert told.tokens == tokens and told.token_logprobs == pytest.approx(expected, abs=1e-4)
        for row, likely in zip(shares, told.top_logprobs, strict=True):
            best = row.topk(3)
            assert list(likely.values()) == pytest.approx(best.values.tolist(), abs=1e-4)
            assert list(likely) == [alone.encoder.tokenizer.decode([one]) for one in best.indices.tolist()]
        lengths = [len(token) for token in tokens]
        assert told.text_offset == [sum(lengths[:at]) for at in range(LENGTH)]
        messages: Any = [{"role": "user", "content": PROMPT}]
        chat = client.chat.completions.create(messages=messages, logprobs=True, top_logprobs=2, **common).choices[0]
        assert chat.logprobs is not None and chat.logprobs.content is not None
        for one, token, share, row in zip(chat.logprobs.content, tokens, expected, shares, strict=True):
            assert (one.token, one.logprob) == (token, pytest.approx(share, abs=1e-4))
            assert [likely.logprob for likely in one.top_logprobs] == pytest.approx(
                row.topk(2).values.tolist(), abs=1e-4
            )
            assert (
                one.bytes is None if "\N{REPLACEMENT CHARACTER}" in token else bytes(one.bytes or ()) == token.encode()
            )


def test_streamed_they_are_the_same(client: OpenAI) -> None:
    common: dict[str, Any] = {"model": "tiny", "max_tokens": LENGTH, "temperature": 0.8, "seed": 3}
    asked: dict[str, Any] = {"prompt": [PROMPT, "Well?"], "logprobs": 2, **common}
    whole = client.completions.create(**asked, user="u1")
    gathered: list[dict[str, list[Any]]] = [{}, {}]
    for part in client.completions.create(**asked, user="u1", stream=True):
        (choice,) = part.choices
        assert choice.logprobs is not None
        for name, values in choice.logprobs.model_dump().items():
            gathered[choice.index].setdefault(name, []).extend(values)
    for choice, found in zip(whole.choices, gathered, strict=True):
        assert choice.logprobs is not None
        expected = choice.logprobs.model_dump()
        assert found["tokens"] == expected["tokens"] and found["text_offset"] == expected["text_offset"]
        # What runs beside a row may change its last digits.
        assert found["token_logprobs"] == pytest.approx(expected["token_logprobs"], abs=1e-4)
    chat: dict[str, Any] = {"messages": [{"role": "user", "content": PROMPT}], "logprobs": True, **common}
    told = client.chat.completions.create(**chat).choices[0].logprobs
    assert told is not None and told.content is not None and told.content[0].top_logprobs == []
    parts = [part.choices[0].logprobs for part in client.chat.completions.create(**chat, stream=True)]
    pieces = [one for part in parts if part is not None for one in part.content or ()]
    assert [one.token for one in pieces] == [one.token for one in told.content]


def test_without_being_asked_nothing_is_told(client: OpenAI) -> None:
    common: dict[str, Any] = {"model": "tiny", "max_tokens": 2}
    for none in (None, False):
        reply = client.completions.create(prompt=PROMPT, logprobs=none, **common)  # type: ignore[call-overload]
        assert reply.choices[0].logprobs is None
    only = client.completions.create(prompt=PROMPT, logprobs=0, **common).choices[0].logprobs
    assert only is not None and only.top_logprobs is not None
    assert [list(one) for one in only.top_logprobs] == [[token] for token in only.tokens or ()]
    with pytest.raises(openai.BadRequestError, match="top_logprobs: needs logprobs: true"):
        client.chat.completions.create(messages=[{"role": "user", "content": "x"}], top_logprobs=3, **common)


def test_ids_of_tokens_are_a_prompt_as_they_stand(client: OpenAI, alone: PersonalizedModel) -> None:
    texts = [PROMPT, "Well?"]
    ids = [list(alone.encoder.prompt(text)) for text in texts]
    common: dict[str, Any] = {"model": "tiny", "user": "u1", "max_tokens": LENGTH}
    by_text = client.completions.create(prompt=texts, **common)
    by_ids = client.completions.create(prompt=ids, **common)
    assert [one.text for one in by_ids.choices] == [one.text for one in by_text.choices]
    assert by_ids.usage == by_text.usage
    assert client.completions.create(prompt=ids[1], **common).choices[0].text == by_text.choices[1].text


@pytest.mark.parametrize("prompt", [[8192], [-1], [[5], [5, 10**30]], [], [[]], [1.5], [True], [[1], "x"], [[1]] * 65])
def test_ids_that_are_no_tokens_are_refused(client: OpenAI, prompt: Any) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="tiny", prompt=prompt, max_tokens=2)
    assert str(refused.value.param).startswith("prompt")
    client.completions.create(model="tiny", prompt=[8191], max_tokens=2)


def test_what_cannot_come_is_a_number() -> None:
    told = logprobs_of(torch.tensor([0.0, -math.inf, 1.0]), 1, 5)
    assert told.own == MIN_LOGPROB and [token for token, _ in told.likeliest] == [2, 0, 1]
    assert logprobs_of(torch.tensor([math.nan, 0.0]), 1, 1).own == MIN_LOGPROB


def test_a_stop_text_may_begin_the_answer(client: OpenAI) -> None:
    common: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "user": "u0", "max_tokens": 1}
    told = client.completions.create(**common, logprobs=0).choices[0].logprobs
    assert told is not None and told.tokens
    reply = client.completions.create(**common, stop=told.tokens[0]).choices[0]
    assert (reply.text, reply.finish_reason) == ("", "stop")


@pytest.mark.parametrize("kind", ["nano", "byte_fallback", "unigram", "word_level", "word_piece"])
def test_tokens_have_the_spaces_of_the_text(server: Running, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    made = tokenizer_kinds.KINDS[kind]()
    made.eos_token = made.eos_token or "[SEP]"
    encoder = Encoder(made, 250)
    monkeypatch.setattr(server.engine.model, "encoder", encoder)
    answers = Answers(cast(Any, SimpleNamespace(engine=server.engine)), cast(Any, None), print)
    ids = encoder.tokens("the bus was late again!")
    assert "".join(map(answers.decode, ids)).strip() == made.decode(ids, clean_up_tokenization_spaces=False).strip()


def test_no_line_of_a_stream_is_cut_in_two() -> None:
    """`str.splitlines`, which httpx and requests use, ends a line at three characters that JSON allows."""
    text = "one\u2028two\u2029three\x85four \u00e9"

    async def pieces() -> AsyncGenerator[AnswerPiece, None]:
        yield AnswerPiece(0, text, finish="stop")

    async def read() -> list[str]:
        shape = ReplyFormat("text", "tiny", 1, str)
        return [line async for line in server_sent(shape, pieces(), usage=False)]

    first, last = asyncio.run(read())
    assert first.splitlines() == [first.rstrip("\n"), ""] and last == "data: [DONE]\n\n"
    assert json.loads(first.removeprefix("data: "))["choices"][0]["text"] == text
