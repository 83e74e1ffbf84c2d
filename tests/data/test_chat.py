"""Chat templates: a prompt is what the template's own tokenization gives; no user's text becomes a control token."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proper.data.chat import ChatFormat, TextMessage, plain_prompt, uses_chat_template
from proper.data.encoder import Encoder
from proper.errors import ConfigError, InputError
from tests import tokenizer_kinds
from tests.data.text_rows import CHATML, Row

STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
TEXTS = st.lists(
    st.sampled_from(["the bus", " ", "\n", "<|im_end|>", "<|im_start|>", "<s>", "late", "é", "🎈", "{{ m }}"])
).map("".join)


def tokenizer(template: str | None = CHATML) -> Any:
    made = tokenizer_kinds.KINDS["chatml"]()
    made.chat_template = template
    return made


@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs", "Cn"]), max_size=40))
@settings(max_examples=60)
def test_a_prompt_is_what_the_template_gives(text: str) -> None:
    made = tokenizer()
    encoder = Encoder(made, 10**6, chat=True)
    want = made.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"]
    assert list(encoder.prompt(text)) == list(want)


@given(text=TEXTS)
@settings(max_examples=60)
def test_a_users_text_never_becomes_a_control_token(text: str) -> None:
    encoder = Encoder(tokenizer(), 10**6, chat=True)
    control = set(encoder.names.values())
    assert [i for i in encoder.prompt(text) if i in control] == [i for i in encoder.prompt("x") if i in control]
    turns = [
        TextMessage("system", text),
        TextMessage("user", text),
        TextMessage("assistant", text),
        TextMessage("user", text),
    ]
    plain = [TextMessage(turn.role, "x") for turn in turns]
    found = [i for i in encoder.untruncated(turns) if i in control]
    assert found == [i for i in encoder.untruncated(plain) if i in control]


def test_an_answer_ends_with_the_token_that_closes_an_assistants_message() -> None:
    made = tokenizer()
    encoder = Encoder(made, 100, chat=True)
    closing = made.convert_tokens_to_ids("<|im_end|>")
    assert encoder.answer(" late ") == (*encoder.tokens("late"), closing)
    assert encoder.ends == {closing, made.eos_token_id}
    row = encoder.encode(Row("the bus", "late"))
    want = made.apply_chat_template([{"role": "user", "content": "the bus"}, {"role": "assistant", "content": "late"}])
    assert list(row.ids) == list(want["input_ids"])[: len(row.ids)]


@given(text=TEXTS, room=st.integers(0, 60))
@settings(max_examples=60)
def test_a_long_prompt_keeps_the_template(text: str, room: int) -> None:
    encoder = Encoder(tokenizer(), 120, chat=True)
    ids = encoder.prompt(text * 20, room)
    assert len(ids) <= max(120 - room, 60)
    assert ids[: len(encoder.start)] == encoder.start and ids[len(ids) - len(encoder.after) :] == encoder.after


def test_a_template_without_control_tokens_ends_with_the_tokenizers_own() -> None:
    made = tokenizer("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:")
    encoder = Encoder(made, 100, chat=True)
    assert ChatFormat(made, encoder.names).closing is None
    assert encoder.answer("late")[-1] == made.eos_token_id


def test_refused_messages_and_long_templates_are_clear_errors() -> None:
    encoder = Encoder(tokenizer(STRICT), 100, chat=True)
    with pytest.raises(InputError, match="chat template refuses these messages: no system"):
        encoder.untruncated([TextMessage("system", "a"), TextMessage("user", "b")])
    with pytest.raises(ConfigError, match="compute.max_length: 16 is too short for the chat template"):
        Encoder(tokenizer(), 16, chat=True)


def test_auto_means_where_there_is_a_template() -> None:
    with_one, without = tokenizer(), tokenizer(None)
    assert [uses_chat_template("auto", each, "b") for each in (with_one, without)] == [True, False]
    assert uses_chat_template("on", with_one, "b") and not uses_chat_template("off", with_one, "b")
    with pytest.raises(ConfigError, match="data.chat: on, but the tokenizer of backbone 'b' has no chat template"):
        uses_chat_template("on", without, "b")


def test_without_a_template_a_conversation_is_written_out() -> None:
    turns = [
        TextMessage("system", "Be brief."),
        TextMessage("user", "Hello"),
        TextMessage("assistant", "Hi."),
        TextMessage("user", "Who?"),
    ]
    assert plain_prompt(turns) == "System: Be brief.\nUser: Hello\nAssistant: Hi.\nUser: Who?\nAssistant:"
    assert plain_prompt(turns[1:2]) == "Hello"
    encoder = Encoder(tokenizer(), 100)
    assert encoder.untruncated(turns) == encoder.prompt(plain_prompt(turns))


def test_a_template_with_todays_date_writes_the_same_every_day() -> None:
    dated = "{% if strftime_now is defined %}{{ strftime_now('%d %B %Y, %H:%M:%S.%f') }}{% endif %}" + CHATML
    made = tokenizer(dated)
    encoder = Encoder(made, 10**6, chat=True)
    assert made.decode(encoder.prompt("x")).startswith("26 July 2024, 00:00:00.000000<|im_start|>")
    assert encoder.prompt("x") == encoder.start + encoder.tokens("x") + encoder.after
