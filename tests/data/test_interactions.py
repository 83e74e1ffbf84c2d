from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pytest
from pyarrow import parquet

from proper.config import DataConfig, TaskConfig
from proper.data.interactions import BadRows, Interaction, read_interactions
from proper.data.rows import BadValue
from proper.errors import DataError

ROW: dict[str, Any] = {"user_id": "u7", "input": "in", "output": "out", "timestamp": "2018-03-30", "item_id": "i1"}


def read(path: Path, task: TaskConfig | None = None, **settings: Any) -> tuple[list[Interaction], list[str]]:
    bad = BadRows()
    good = list(read_interactions(DataConfig(path=str(path), **settings), bad, task))
    assert bad.count == len(bad.first)
    return good, [message.removeprefix(f"{path}:") for message in bad.first]


def nested(depth: int) -> list[Any]:
    """Return a list in a list in a list."""
    made: list[Any] = []
    for _ in range(depth):
        made = [made]
    return made


def complaint(path: Path, raw: str, **settings: Any) -> str:
    """Return what is said about one line that follows a good one."""
    path.write_text(json.dumps(ROW) + "\n" + raw + "\n")
    good, (message,) = read(path, **settings)
    assert len(good) == 1
    return message.removeprefix("2: ")


def test_a_good_row_is_mapped(jsonl: Callable[..., Path]) -> None:
    (good,), bad = read(jsonl([ROW]), prompt="Say: {input}\n")
    assert good == Interaction("u7", "Say: in\n", "out", "i1", 1522368000.0)
    assert bad == []


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("{", "row: not JSON (Expecting property name enclosed in double quotes at column 2)"),
        ("[1]", "row: a JSON array, expected an object"),
        ("3", "row: a JSON number, expected an object"),
        ("null", "row: a JSON null, expected an object"),
        ("[" * 100_000, "row: not JSON that can be read (a number too long, or nested too deep)"),
        ("9" * 5000, "row: not JSON that can be read (a number too long, or nested too deep)"),
        ('{"user_id": "u", "input": "a", "input": "b"}', "row: the key 'input' occurs twice"),
        ('{"user_id": "u", "x": [{"\\ud800": 1, "\\ud800": 2}]}', "row: the key '\\ud800' occurs twice"),
    ],
)
def test_lines_that_are_no_objects(tmp_path: Path, raw: str, message: str) -> None:
    assert complaint(tmp_path / "a.jsonl", raw) == message


def test_lines_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"user_id": "\xff"}\n' + json.dumps(ROW).encode())
    assert read(path)[1] == ["1: row: not UTF-8"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"user_id": None}, "user_id: null"),
        ({"user_id": ""}, "user_id: empty"),
        ({"user_id": " "}, "user_id: empty"),
        ({"user_id": float("nan")}, "user_id: null"),
        ({"user_id": ["u"]}, "user_id: a list, expected text or a number"),
        ({"user_id": True}, "user_id: a bool, expected text or a number"),
        ({"user_id": "\ud800"}, "user_id: half of a surrogate pair, which is no character"),
        ({"input": None}, "input: null"),
        ({"input": " \n"}, "input: empty"),
        ({"input": "\ud800"}, "input: half of a surrogate pair, which is no character"),
        ({"output": None}, "output: null"),
        ({"output": float("nan")}, "output: NaN"),
        ({"output": "  "}, "output: empty"),
        ({"item_id": {}}, "item_id: a dict, expected text or a number"),
        ({"item_id": "\ud800"}, "item_id: half of a surrogate pair, which is no character"),
        ({"output": "\ud800"}, "output: half of a surrogate pair, which is no character"),
        ({"input": ["\ud800"]}, "input: half of a surrogate pair, which is no character"),
        ({"input": {"\ud800": 1}}, "input: half of a surrogate pair, which is no character"),
        ({"input": nested(600)}, "input: nested too deep"),
        ({"user_id": 2.0**53}, "user_id: 9007199254740992.0: the id has lost digits; write it as text"),
        (
            {"user_id": -7.656119796028794e16},
            "user_id: -7.656119796028794e+16: the id has lost digits; write it as text",
        ),
        ({"user_id": 1e300}, "user_id: 1e+300: the id has lost digits; write it as text"),
        ({"user_id": 1.5}, "user_id: 1.5 is not a whole number; write the id as text"),
        ({"item_id": 2.0**53}, "item_id: 9007199254740992.0: the id has lost digits; write it as text"),
        ({"item_id": float("inf")}, "item_id: inf is not a whole number; write the id as text"),
        ({"timestamp": 10**300}, "timestamp: a time outside of the years 1 to 9999"),
        ({"timestamp": "soon"}, "timestamp: 'soon' is not a time"),
        ({"timestamp": float("nan")}, "timestamp: NaN is not a time"),
        ({"timestamp": ""}, "timestamp: '' is not a time"),
    ],
)
def test_bad_values_name_their_column(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    assert complaint(tmp_path / "a.jsonl", json.dumps(ROW | change)) == message


@pytest.mark.parametrize("column", ["user_id", "input", "output"])
def test_a_row_without_a_column_that_others_have(tmp_path: Path, column: str) -> None:
    row = {name: value for name, value in ROW.items() if name != column}
    assert complaint(tmp_path / "a.jsonl", json.dumps(row)) == f"{column}: missing"


def test_a_prompt_of_several_columns_may_have_an_empty_one_but_no_null(tmp_path: Path) -> None:
    settings = {"prompt": "{input}{item_id}"}
    path = tmp_path / "a.jsonl"
    assert complaint(path, json.dumps(ROW | {"input": None}), **settings) == "input: null"
    assert complaint(path, json.dumps(ROW | {"input": " ", "item_id": ""}), **settings) == "data.prompt: empty"
    path.write_text(json.dumps(ROW | {"input": ""}))
    assert read(path, **settings)[0][0].prompt == "i1"


def test_ids_are_text_and_empty_items_and_null_times_are_none(jsonl: Callable[..., Path]) -> None:
    rows = [
        ROW | {"user_id": 7, "item_id": 3.0},
        ROW | {"user_id": "ü 7\t", "item_id": ""},
        {key: value for key, value in ROW.items() if key not in ("timestamp", "item_id")},
        ROW | {"timestamp": None, "item_id": "  "},
        ROW | {"user_id": 2.0**53 - 1, "item_id": 76561197960287931},
    ]
    good, bad = read(jsonl(rows))
    assert [(each.user, each.item) for each in good] == [
        *[("7", "3"), ("ü 7\t", None), ("u7", None), ("u7", None)],
        ("9007199254740991", "76561197960287931"),
    ]
    assert [each.time for each in good][2:4] == [None, None]
    assert bad == []


def test_any_script_and_any_length_is_taken_as_it_is(jsonl: Callable[..., Path]) -> None:
    texts = ["🦊👩‍👩‍👧 emoji", "مرحبا بالعالم", "שלום \u202e עולם", "nul\x00inside", "word " * 200_000]
    good, bad = read(jsonl([ROW | {"input": text, "output": text} for text in texts]))
    assert [each.prompt for each in good] == texts
    assert [each.target for each in good] == [text.strip() for text in texts]
    assert bad == []


def test_an_id_is_no_longer_than_the_server_takes(jsonl: Callable[..., Path]) -> None:
    good, bad = read(jsonl([ROW | {"user_id": "é" * 512}, ROW | {"user_id": "e" * 513}]))
    assert [each.user for each in good] == ["é" * 512]
    assert bad == ["2: user_id: longer than 512 characters"]


def test_ratings_are_numbers(jsonl: Callable[..., Path]) -> None:
    rows = [ROW | {"output": value} for value in (4, 4.0, "3.5", "four", "nan", True)]
    good, bad = read(jsonl(rows), TaskConfig(kind="rating"))
    assert [each.target for each in good] == ["4", "4.0", "3.5"]
    assert bad == [f"{n}: output: '{text}' is not a number" for n, text in ((4, "four"), (5, "nan"), (6, "True"))]


def test_ratings_are_small_enough_to_be_squared_and_told_apart(jsonl: Callable[..., Path]) -> None:
    rows = [ROW | {"output": value} for value in (1e300, "-9007199254740992", 9007199254740991)]
    good, bad = read(jsonl(rows), TaskConfig(kind="rating"))
    assert [each.target for each in good] == ["9007199254740991"]
    assert bad == [
        "1: output: '1e+300' is not a number below 2**53 in size",
        "2: output: '-9007199254740992' is not a number below 2**53 in size",
    ]


def test_configured_labels_are_the_only_ones(jsonl: Callable[..., Path]) -> None:
    rows = [ROW | {"output": value} for value in ("SPORTS", "SPORT", "x" * 50)]
    good, bad = read(jsonl(rows), TaskConfig(kind="classification", labels=["SPORTS", "CRIME"]))
    assert [each.target for each in good] == ["SPORTS"]
    assert bad == [
        "2: output: 'SPORT' is none of the task's labels; did you mean 'SPORTS'?",
        f"3: output: '{'x' * 40}...' is none of the task's labels; known: SPORTS, CRIME",
    ]


def test_a_rating_takes_the_configured_label_of_its_value(jsonl: Callable[..., Path]) -> None:
    rows = [ROW | {"output": value} for value in (1.0, "2", 2.5)]
    good, bad = read(jsonl(rows), TaskConfig(kind="rating", labels=["1", "2"]))
    assert [each.target for each in good] == ["1", "2"]
    assert bad == ["3: output: '2.5' is none of the task's labels; known: 1, 2"]


def test_a_class_takes_the_configured_label_of_its_number(jsonl: Callable[..., Path]) -> None:
    rows = [ROW | {"output": value} for value in (1.0, "2", "2.00", "02")]
    good, bad = read(jsonl(rows), TaskConfig(kind="classification", labels=["1", "2"]))
    assert [each.target for each in good] == ["1", "2", "2"]
    assert bad == ["4: output: '02' is none of the task's labels; known: 1, 2"]


@pytest.mark.parametrize(
    ("kind", "labels", "message"),
    [
        ("classification", ["a", "b", "a"], "'a' and 'a' are the same label; leave one out"),
        ("classification", ["3", "3.0"], "'3' and '3.0' are the same label; leave one out"),
        (
            "classification",
            ["caf\u00e9", "cafe\u0301"],
            "'caf\u00e9' and 'cafe\u0301' are the same label; leave one out",
        ),
        ("classification", ["a", " "], "' ' is empty"),
        ("rating", ["1", "good"], "'good' is not a number, as ratings are"),
    ],
)
def test_configured_labels_are_distinct_and_of_their_kind(
    jsonl: Callable[..., Path], kind: Any, labels: list[str], message: str
) -> None:
    config = DataConfig(path=str(jsonl([ROW])))
    with pytest.raises(DataError) as caught:
        next(read_interactions(config, BadRows(), TaskConfig(kind=kind, labels=labels)))
    assert str(caught.value) == f"task.labels: {message}"


def test_parquet_rows_are_numbered_from_one(tmp_path: Path) -> None:
    columns = {name: [value] * 3000 for name, value in ROW.items()}
    columns["output"] = [None if n == 2500 else "out" for n in range(3000)]
    parquet.write_table(arrow.table(columns), tmp_path / "a.parquet", row_group_size=700)
    good, bad = read(tmp_path / "a.parquet")
    assert len(good) == 2999
    assert bad == ["2501: output: null"]


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"user": "user"}, "no column 'user' (data.user); did you mean 'user_id'?"),
        ({"prompt": "{inputs}"}, "no column 'inputs' (data.prompt); did you mean 'input'?"),
        ({"target": "{outptu} {input}"}, "no column 'outptu' (data.target); did you mean 'output'?"),
        ({"time": "time_stamp"}, "no column 'time_stamp' (data.time); did you mean 'timestamp'?"),
        ({"item": "xy"}, "no column 'xy' (data.item); known: user_id, input, output, timestamp, item_id"),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_missing_column_is_one_error_before_any_row(
    tmp_path: Path, settings: dict[str, str], what: str, kind: str
) -> None:
    first, second = tmp_path / f"a.{kind}", tmp_path / f"b.{kind}"
    full = ROW | {name: "x" for name in ("user", "inputs", "outptu", "time_stamp", "xy")}
    for path, row in ((first, full), (second, ROW)):
        if kind == "jsonl":
            path.write_text(json.dumps(row))
        else:
            parquet.write_table(arrow.table({name: [value] for name, value in row.items()}), path)
    with pytest.raises(DataError) as caught:
        read_interactions(DataConfig(path=str(tmp_path), **settings), BadRows())
    assert str(caught.value) == f"{second}: {what}"


def test_time_and_item_may_be_absent_at_their_default_names_or_switched_off(jsonl: Callable[..., Path]) -> None:
    path = jsonl([{"user_id": "u", "input": "in", "output": "out"}])
    assert read(path)[0] == [Interaction("u", "in", "out", None, None)]
    path = jsonl([ROW | {"timestamp": "soon"}])
    assert read(path, time=None, item=None)[0] == [Interaction("u7", "in", "out", None, None)]


def test_an_answer_without_a_column_is_refused(jsonl: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match="^data.target: 'yes' names no column, so every answer would be the same$"):
        read(jsonl([ROW]), target="yes")


def test_a_prompt_that_contains_its_answer_is_refused(jsonl: Callable[..., Path]) -> None:
    path, message = (
        jsonl([ROW]),
        "^data.prompt: has every column of data.target, so each prompt would contain its answer$",
    )
    with pytest.raises(DataError, match=message):
        read(path, prompt="{input}\nAnswer: {output}")
    with pytest.raises(DataError, match=message):
        read(path, prompt="{output} {input}", target="{input}: {output}")
    assert read(path, prompt="{input}", target="{input}: {output}")[0][0].target == f"{ROW['input']}: {ROW['output']}"


def test_bad_rows_are_all_counted_and_twenty_are_shown() -> None:
    bad, reasons = BadRows(), list[int]()

    def reason() -> str:
        reasons.append(len(reasons))
        return "null"

    bad.add("a.jsonl:1", BadValue("input", "null"))
    assert bad.message() == "a.jsonl:1: input: null (--skip-bad-rows leaves it out)"
    bad.add("a.jsonl:2", BadValue("input", "null"))
    assert bad.message() == "a.jsonl:1: input: null (and 1 more bad row; --skip-bad-rows leaves them out)"
    for number in range(3, 43):
        bad.add(f"a.jsonl:{number}", BadValue("input", reason))
    assert bad.message() == "a.jsonl:1: input: null (and 41 more bad rows; --skip-bad-rows leaves them out)"
    assert bad.message(all_bad=True) == "a.jsonl:1: input: null (no row is good, of 42)"
    assert (bad.count, len(bad.first)) == (42, 20)
    assert bad.first[19] == "a.jsonl:20: input: null"
    assert len(reasons) == 18, "only reasons that are shown are looked for"
