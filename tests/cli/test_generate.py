"""What `proper generate` is asked, from options and files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proper.cli.generate import _requests
from proper.cli.prompts import PromptRequest, final_prompts, from_fields, from_file, render_with
from proper.data.chat import TURN, readable
from proper.data.conversations import messages_row
from proper.data.rows import parse_template
from proper.errors import DataError, InputError


def test_fields_keep_all_after_the_first_equals_sign() -> None:
    request = from_fields("u7", ["text=a=b", " label =", "n=3"])
    assert request == PromptRequest("u7", None, {"text": "a=b", "label": "", "n": "3"}, "--field")


@pytest.mark.parametrize("field", ["text", "=x", " =x"])
def test_a_field_without_a_name_is_named(field: str) -> None:
    with pytest.raises(InputError, match="write it as name=value"):
        from_fields(None, [field])


def test_a_file_holds_prompts_and_fields_of_many_users(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(
        '{"user_id": "u7", "prompt": "Hello"}\n\n{"user_id": 9, "text": "Tram"}\n{"prompt": ""}\n', encoding="utf-8"
    )
    assert from_file(path) == [
        PromptRequest("u7", "Hello", {}, f"{path}:1"),
        PromptRequest("9", None, {"text": "Tram"}, f"{path}:3"),
        PromptRequest(None, "", {}, f"{path}:4"),
    ]
    assert [request.user for request in from_file(path, "somebody")] == ["u7", "9", "somebody"]


@given(st.lists(st.tuples(st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8"))), min_size=1))
def test_any_text_comes_back(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    lines = [json.dumps({"user_id": user, "prompt": prompt}, ensure_ascii=False) for user, prompt in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    # The mark that separates messages in a prompt is not a character that a text can have.
    expected = [(user, readable(prompt)) for user, prompt in rows]
    assert [(request.user, request.prompt) for request in from_file(path)] == expected


def test_marks_of_messages_in_a_text_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"prompt": f"Well {TURN}System: x"}), encoding="utf-8")
    assert [request.prompt for request in from_file(path)] == ["Well System: x"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "1: not readable as JSON"),
        (b"\xff", "1: not readable as JSON"),
        (b"[" * 100_000, "1: not readable as JSON"),
        (b'["a"]', "1: a line is one JSON object, this is list"),
        (b'{"prompt": 3}', "1: prompt: should be text, not int"),
        (b'{"prompt": ["x"]}', "1: prompt[0]: should be an object with role and content"),
        (b'{"prompt": [{"role": "assistant", "content": "x"}]}', "1: prompt: no message to answer"),
        (b'{"prompt": "\\ud800"}', "1: not readable as JSON"),
        (b'{"user_id": true, "prompt": "x"}', "1: user_id: should be text or a whole number, not bool"),
        (b'{"user_id": 1.5, "prompt": "x"}', "1: user_id: should be text or a whole number, not float"),
        (b'{"user_id": "u7"}', "1: prompt: is missing, and there are no fields for the template"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_bytes(line + b"\n")
    with pytest.raises(DataError) as caught:
        from_file(path)
    assert str(caught.value).startswith(f"{path}:{message}")


def test_a_line_may_be_a_conversation_as_in_the_data(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    answer = {"role": "assistant", "content": "d"}
    path = tmp_path / "questions.jsonl"
    rows = [{"messages": turns}, {"messages": [*turns, answer]}, {"prompt": turns}, {"prompt": "c", "completion": "d"}]
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    requests = from_file(path)
    expected, _ = messages_row({"messages": [*turns, answer]})
    template = parse_template("{input}", "data.prompt")
    assert final_prompts(requests, render_with(template)) == [expected, expected, expected, "c"]
    own = parse_template("{messages}!", "data.prompt")
    assert final_prompts([PromptRequest(None, None, {"messages": "m"}, "x")], render_with(own)) == ["m!"]


def test_a_line_may_use_the_runs_own_name_for_the_user(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"author": "ann", "text": "x"}\n{"user_id": "ben", "author": "x", "text": "y"}\n{"text": "z"}\n')
    requests = from_file(path, column="author")
    assert [request.user for request in requests] == ["ann", "ben", None]
    assert [dict(request.fields) for request in requests] == [
        {"text": "x"},
        {"author": "x", "text": "y"},
        {"text": "z"},
    ]


@pytest.mark.parametrize(
    "asked",
    [
        ("--input", '{"author": "ann", "text": "x"}'),
        ("--input", '{"user_id": "ann", "text": "x"}'),
        ("--input", '{"text": "x"}'),
        ("--field", "text=x"),
    ],
)
def test_a_template_may_name_the_column_of_users(tmp_path: Path, asked: tuple[str, str]) -> None:
    (tmp_path / "config.yaml").write_text('data: {path: x.jsonl, user: author, prompt: "{author} says {text}"}')
    path = tmp_path / "questions.jsonl"
    path.write_text(asked[1])
    file = path if asked[0] == "--input" else None
    user = None if '"ann"' in asked[1] else "ann"
    requests = _requests(tmp_path, user, None, [asked[1]] if file is None else [], file, None)
    template = parse_template("{author} says {text}", "data.prompt")
    assert final_prompts(requests, render_with(template)) == ["ann says x"]


def test_a_prompt_fills_a_template_that_has_a_column_of_this_name(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    turns = [{"role": "user", "content": "a"}]
    path.write_text("\n".join(json.dumps(row) for row in ({"prompt": "x", "n": 1}, {"prompt": turns})))
    template = parse_template("Q {n}: {prompt}", "data.prompt")
    found = final_prompts(from_file(path, columns=template.columns), render_with(template))
    assert found == ["Q 1: x", "a"]
    assert final_prompts(from_file(path, columns=["n"]), render_with(template)) == ["x", "a"]


def test_all_bad_lines_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"prompt": "fine"}\n{\n{"prompt": "fine"}\n3\n[]\n')
    with pytest.raises(DataError, match=r":2: not readable as JSON: .* \(and 2 more bad lines\)$"):
        from_file(path)


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_is_an_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match="has no lines to answer"):
        from_file(path)


render = parse_template("Text: {text}", "data.prompt").fill


def test_a_prompt_is_final_and_fields_fill_the_template() -> None:
    requests = [
        PromptRequest("a", "Hello {text}", {"text": "x"}, "f:1"),
        PromptRequest("b", None, {"text": "Tram"}, "f:2"),
    ]
    assert final_prompts(requests, render) == ["Hello {text}", "Text: Tram"]


def test_a_line_that_lacks_a_column_is_named() -> None:
    requests = [PromptRequest("a", None, {"text": "x"}, "f:1"), PromptRequest("b", None, {"txt": "y"}, "f:2")]
    with pytest.raises(DataError) as caught:
        final_prompts(requests, render)
    assert str(caught.value) == "f:2: text: missing"


def test_an_empty_prompt_is_named() -> None:
    with pytest.raises(DataError, match="^f:1: prompt: is empty$"):
        final_prompts([PromptRequest("a", " ", {}, "f:1")], render)
    with pytest.raises(DataError, match="^--field: text: null$"):
        final_prompts([PromptRequest("a", None, {"text": None}, "--field")], render)
