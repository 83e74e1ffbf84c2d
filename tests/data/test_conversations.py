"""Conversational rows of every format: prompts have the tokens of the HTTP chat route, labels are the answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from proper.config import Config, DataConfig, make_config
from proper.data.batching import IGNORED, collate
from proper.data.chat import TURN, TextMessage, plain_prompt, readable
from proper.data.conversations import join_turns, split_turns
from proper.data.encoder import Encoder
from proper.data.interactions import BadRows, read_interactions
from proper.errors import ConfigError
from tests import tokenizer_kinds
from tests.data.text_rows import CHATML, Row

FORGETFUL = CHATML.replace("messages %}", "messages[-2:] %}")
TALK = [("system", "Be brief."), ("user", "Hello"), ("assistant", "Hi."), ("user", "Who?"), ("assistant", "Ann.")]
TEXTS = st.lists(
    st.sampled_from(["the bus", " ", "\n", "User: x", "<|im_end|>", "</s>", TURN, "late"]), min_size=1
).map("".join)
TURNS = st.lists(st.tuples(TEXTS, TEXTS), max_size=3)


def messages(talk: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in talk]


def turns(talk: list[tuple[str, str]]) -> list[TextMessage]:
    return [TextMessage(*each) for each in talk]


def made(template: str = CHATML) -> Any:
    found = tokenizer_kinds.KINDS["chatml"]()
    found.chat_template = template
    return found


def read(path: Path, **more: Any) -> tuple[list[tuple[str, str]], list[str]]:
    bad = BadRows()
    found = list(read_interactions(DataConfig(path=str(path), **more), bad))
    return [(each.prompt, each.target) for each in found], [each.removeprefix(f"{path}:") for each in bad.first]


def test_every_format_gives_the_same_prompt_and_answer(tmp_path: Path) -> None:
    whole, prompt = messages(TALK), messages(TALK[:-1])
    rows = {
        "messages": {"messages": [*whole, {"role": "user", "content": "Thanks!"}]},
        "lists": {"prompt": prompt, "completion": whole[-1:]},
        "parts": {"messages": [*prompt, {"role": "assistant", "content": [{"type": "text", "text": "Ann."}]}]},
        "mixed": {"prompt": prompt, "completion": "Ann."},
        "developer": {"messages": [{"role": "developer", "content": TALK[0][1]}, *whole[1:]]},
    }
    want = [(join_turns(turns(TALK[:-1])), "Ann.")]
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"user_id": "ann", **row}) + "\n")
        assert read(tmp_path / f"{name}.jsonl") == (want, []), name
    for name in ("messages", "lists"):
        table = arrow.Table.from_pylist([{"user_id": "ann", **rows[name]}])
        parquet.write_table(table, tmp_path / f"{name}.parquet")
        assert read(tmp_path / f"{name}.parquet") == (want, [])
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"user_id": "ann", **rows["messages"]}]).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved") == (want, [])


def test_one_message_is_its_text_and_templates_come_first(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    row = {"user_id": "u", "prompt": "Well?", "completion": " So. ", "input": "a", "output": "b"}
    path.write_text(json.dumps(row) + "\n")
    assert read(path) == ([("a", "b")], [])
    assert read(path, rows="completion") == ([("Well?", "So.")], [])
    assert read(path, prompt="{prompt}", target="{completion}") == ([("Well?", "So.")], [])
    path.write_text(
        json.dumps({"user_id": "u", "messages": messages([("user", "Well?"), ("assistant", "So.")])}) + "\n"
    )
    assert read(path) == ([("Well?", "So.")], [])


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"messages": []}, "messages: should be a list of messages"),
        ({"messages": "hello"}, "messages: should be a list of messages"),
        ({"messages": None}, "messages: null"),
        ({"messages": messages(TALK[:2])}, "messages: no message of the assistant, which would be the answer"),
        ({"messages": messages(TALK[2:3])}, "messages: no message before the assistant's"),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            "messages[0].role: should be one of system, user, assistant, not 'tool'",
        ),
        ({"messages": [{"from": "human", "value": "x"}]}, "messages[0].role: missing"),
        ({"messages": [*messages(TALK[:1]), {"role": "user"}]}, "messages[1].content: null"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content: should be text, not int"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages[0].content: empty"),
        ({"messages": ["hello"]}, "messages[0]: should be an object with role and content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content: has a part that is no text",
        ),
        ({"prompt": 3, "completion": "x"}, "prompt: should be a list of messages, or text"),
        ({"prompt": "x", "completion": None}, "completion: null"),
    ],
)
def test_a_bad_row_names_what_is_wrong(tmp_path: Path, row: dict[str, Any], what: str) -> None:
    path = tmp_path / "x.jsonl"
    good = {
        "user_id": "u",
        **({"messages": messages(TALK)} if "messages" in row else {"prompt": "a", "completion": "b"}),
    }
    path.write_text(json.dumps(good) + "\n" + json.dumps({"user_id": "u", **row}) + "\n")
    found, bad = read(path)
    assert (len(found), bad) == (1, [f"2: {what}"])


@given(pairs=TURNS, system=st.none() | TEXTS, last=TEXTS)
def test_a_prompt_keeps_its_messages(pairs: list[tuple[str, str]], system: str | None, last: str) -> None:
    talk = [] if system is None else [("system", system)]
    talk += [each for asked, answered in pairs for each in (("user", asked), ("assistant", answered))]
    talk.append(("user", last))
    text = join_turns(turns(talk))
    clean = [TextMessage(role, readable(each)) for role, each in talk]
    found = split_turns(text)
    assert (found or [TextMessage("user", text)]) == clean
    assert readable(text) == plain_prompt(clean)


@given(pairs=TURNS, last=TEXTS, chat=st.booleans())
@settings(max_examples=60)
def test_training_asks_as_the_chat_route_does(pairs: list[tuple[str, str]], last: str, chat: bool) -> None:
    talk = [("system", "Be brief.")]
    talk += [each for asked, answered in pairs for each in (("user", asked), ("assistant", answered))]
    talk.append(("user", last))
    clean = [TextMessage(role, readable(text)) for role, text in talk]
    encoder = Encoder(made(), 10**6, chat=chat)
    row = encoder.encode(Row(join_turns(turns(talk)), "late"))
    assert row.ids[: row.start] == encoder.untruncated(clean)
    control = set(encoder.names.values())
    plain = encoder.untruncated([TextMessage(turn.role, "x") for turn in clean])
    assert [i for i in row.ids[: row.start] if i in control] == [i for i in plain if i in control]
    assert encoder.count([join_turns(turns(talk))], ["late"]) == [len(row.ids)]


@pytest.mark.parametrize("chat", [True, False])
def test_the_loss_is_on_the_assistants_messages(chat: bool) -> None:
    talk = [*TALK[:3], ("user", "Where?"), ("assistant", "<|im_end|> here"), *TALK[3:4]]
    row = Row(join_turns(turns(talk)), "Ann.")
    last, every = (Encoder(made(), 1000, chat=chat, every_turn=each) for each in (False, True))
    first, second = last.encode(row), every.encode(row)
    assert first.ids == second.ids and every.encode(row, last=True) == first
    batch = collate([first, second], pad=0)
    sides = [[int(i) for i in labels if i != IGNORED] for labels in batch.labels]
    decode = last.tokenizer.decode
    end = "<|im_end|>" if chat else "</s>"
    assert decode(sides[0]).strip() == f"Ann.{end}"
    middle = end if chat else ""
    assert decode(sides[1]).replace(" ", "") == f"Hi.{middle}<|im_end|>here{middle}Ann.{end}"
    assert second.answers == len(sides[1]) and first.answers == len(sides[0])


def test_a_long_conversation_loses_its_oldest_messages() -> None:
    old = [("user", "the bus " * 40), ("assistant", "late")]
    encoder = Encoder(made(), 120, chat=True, every_turn=True)
    found = encoder.encode(Row(join_turns(turns([TALK[0], *old, *TALK[1:4]])), "Ann."))
    want = encoder.encode(Row(join_turns(turns(TALK[:4])), "Ann."))
    assert found == want and found.between
    alone = encoder.encode(Row(join_turns(turns([TALK[0], old[0]])), "Ann."))
    assert len(alone.ids) <= 120 and alone.ids[: len(encoder.start)] == encoder.start


def slow_newest(encoder: Encoder, talk: list[TextMessage], limit: int) -> list[TextMessage]:
    """Try every user's message as the first one, the oldest first."""
    system = [turn for turn in talk if turn.role == "system"]
    others = [turn for turn in talk if turn.role != "system"]
    starts = [at for at, turn in enumerate(others) if turn.role == "user" and at > 0]
    tried = [talk, *([*system, *others[at:]] for at in starts)]
    return next((kept for kept in tried if len(encoder.untruncated(kept)) <= limit), [])


@given(talk=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=9), limit=st.integers(1, 120), data=st.data())
@settings(max_examples=60, deadline=None)
def test_the_newest_messages_are_those_that_a_search_from_the_oldest_finds(
    talk: list[tuple[str, str]], limit: int, data: st.DataObject
) -> None:
    pairs = [pair for ask, reply in talk for pair in (("user", ask), ("assistant", reply))]
    said = turns([TALK[0], *pairs] if data.draw(st.booleans()) else pairs)
    for chat in (True, False):
        encoder = Encoder(made(), 120, chat=chat)
        assert encoder._newest(said, limit) == slow_newest(encoder, said, limit)


def test_a_template_that_forgets_cannot_train_on_every_answer() -> None:
    encoder = Encoder(made(FORGETFUL), 1000, chat=True, every_turn=True)
    with pytest.raises(ConfigError, match="data.assistant_loss: all, but the backbone's chat template rewrites"):
        encoder.encode(Row(join_turns(turns(TALK[:4])), "Ann."))


def test_the_settings_are_checked(jsonl: Callable[..., Path]) -> None:
    config: Config = make_config({"data": {"path": "x", "rows": "messages", "assistant_loss": "all"}}, "x")
    assert (config.data.rows, config.data.assistant_loss) == ("messages", "all")
    with pytest.raises(ConfigError, match="data.assistant_loss"):
        make_config({"data": {"path": "x", "assistant_loss": "first"}}, "x")
