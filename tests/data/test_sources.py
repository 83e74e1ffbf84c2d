"""JSONL, Parquet and Hugging Face data sets, and their values: what is read, and one line for what is refused."""

from __future__ import annotations

import gzip
import json
import os
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow as arrow
import pytest
from pyarrow import parquet

from proper.config import DataConfig
from proper.data.interactions import BadRows, Interaction, read_interactions
from tests.data.source_reading import ROW, complaints, lines, read, refused


@pytest.fixture
def quiet() -> None:
    datasets.disable_progress_bars()


def test_jsonl_may_be_packed_have_blank_lines_a_mark_and_odd_line_separators(tmp_path: Path) -> None:
    rows = [ROW, ROW | {"input": "a\u2028b\x85c"}]
    body = (
        b"\xef\xbb\xbf"
        + json.dumps(rows[0]).encode()
        + b"\r\n\n  \n"
        + json.dumps(rows[1], ensure_ascii=False).encode()
    )
    (tmp_path / "plain.jsonl").write_bytes(body)
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(body))
    found = read(tmp_path / "plain.jsonl")
    assert [each.prompt for each in found] == ["in", "a\u2028b\x85c"]
    assert read(tmp_path / "packed.jsonl.gz") == found


def test_a_folder_is_read_in_name_order_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b", "a", ".c", "_d"):
        (tmp_path / f"{name}.jsonl").write_bytes(lines(ROW | {"input": name}))
    (tmp_path / "about.json").write_text("{}")
    (tmp_path / "empty.jsonl").touch()
    assert [each.prompt for each in read(tmp_path)] == ["a", "b"]


def test_parquet_keeps_short_floats_lists_and_times(tmp_path: Path) -> None:
    table = arrow.table(
        {
            "user_id": [7, 8],
            "genres": [["Crime", "Drama"], []],
            "rating": arrow.array([3.3, 4.0], arrow.float32()),
            "category": arrow.array(["x", "y"]).dictionary_encode(),
            "timestamp": arrow.array([datetime(2020, 1, 1), None], arrow.timestamp("ns", "Europe/Berlin")),
            "item_id": [1.0, None],
        }
    )
    parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=1)
    assert read(tmp_path, prompt="{genres}|{category}", target="{rating}") == [
        Interaction("7", "Crime, Drama|x", "3.3", "1", 1577836800.0),
        Interaction("8", "|y", "4.0", None, None),
    ]


@pytest.mark.usefixtures("quiet")
def test_a_saved_dataset_gives_the_part_and_the_names_of_classes(tmp_path: Path) -> None:
    features = datasets.Features(
        {
            "user_id": datasets.Value("string"),
            "input": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["SPORTS", "CRIME"]),
            "score": datasets.Value("float32"),
        }
    )
    columns = {"user_id": ["u", "v"], "input": ["x", "y"], "label": [1, 0], "score": [3.3, 1.0]}
    dataset = datasets.Dataset.from_dict(columns, features=features)
    dataset.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": dataset, "test": dataset.select([1])}).save_to_disk(tmp_path / "parts")
    sport = Interaction("v", "y 1.0", "SPORTS", None, None)
    settings = {"prompt": "{input} {score}", "target": "{label}"}
    assert read(tmp_path / "one", **settings) == [Interaction("u", "x 3.3", "CRIME", None, None), sport]
    assert read(tmp_path / "parts", part="test", **settings) == [sport]
    assert refused(tmp_path / "parts", part="tst") == (
        f"{tmp_path / 'parts'}: no part 'tst' (data.part); did you mean 'test'?"
    )
    assert refused(tmp_path / "one", part="test") == (
        f"data.part: 'test': {tmp_path / 'one'} is one data set without parts"
    )
    for name in ("one", "parts"):
        why = f"{tmp_path / name} is a saved data set, which has no configurations"
        assert refused(tmp_path / name, name="small") == f"data.name: 'small': {why}"
    datasets.Dataset.from_dict(columns, features=features, split="test").save_to_disk(tmp_path / "test")
    assert len(read(tmp_path / "test", part="test", **settings)) == 2


@pytest.mark.usefixtures("quiet")
def test_a_dataset_that_is_loaded_by_id_streams(tmp_path: Path) -> None:
    """A folder takes the same way as an id on the hub."""
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "train.jsonl").write_bytes(lines(*(ROW | {"input": str(n)} for n in range(3))))
    found = read(tmp_path / "hub", format="huggingface")
    assert [each.prompt for each in found] == ["0", "1", "2"]


def test_what_is_not_there_or_not_known_is_said(tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text("a,b")
    (tmp_path / "rows").write_bytes(b"PAR1\0\0")
    (tmp_path / "rows.sqlite").write_bytes(b"SQLite format 3\0\x10\0")
    (tmp_path / "array.json").write_text('\ufeff[{"user_id": "u"}]')
    (tmp_path / "lines.json").write_text('[\n  {"user_id": "u"},\n  {"user_id": "v"}\n]')
    for name in ("data.zip", "rows.parquet.gz", "rows.zst"):
        (tmp_path / name).touch()
    (tmp_path / "none").mkdir()
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "a.jsonl").touch()
    (tmp_path / "both" / "a.parquet").touch()
    for name, what in {
        "missing.jsonl": "no such file or folder (data.path)",
        "missing": "no such file or folder (data.path)",
        "data.txt": "format not known by its name; set data.format to jsonl, csv or parquet",
        "rows": "format not known by its name; set data.format to jsonl, csv or parquet",
        "rows.sqlite": "not a text file and no Parquet; convert it to JSONL, CSV or Parquet",
        "array.json": "one JSON array, expected one JSON object per line (jq -c .[] FILE)",
        "lines.json": "one JSON array, expected one JSON object per line (jq -c .[] FILE)",
        "data.zip": "a .zip file is not read; unpack it first",
        "rows.parquet.gz": "a .gz file is not read; unpack it first",
        "rows.zst": "format not known by its name; set data.format to jsonl or csv",
        "none": "no .jsonl, .csv or .parquet file in this folder; data.format says which format to read",
        "both": "files of several formats in this folder; data.format says which format to read",
    }.items():
        assert refused(tmp_path / name) == f"{tmp_path / name}: {what}"
    assert refused(tmp_path / "none", format="parquet") == (
        f"{tmp_path / 'none'}: no parquet file in this folder; the names end in .parquet, .pq"
    )
    (tmp_path / "none" / "rows.json").write_bytes(lines(ROW))
    assert refused(tmp_path / "none", format="jsonl").endswith(".ndjson.xz, .ndjson.zst")  # a .json file is not taken


def test_empty_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "b.jsonl").write_text("\n\n")
    (tmp_path / "d.csv").touch()
    (tmp_path / "e.csv").write_text("user_id,input,output\n\n")
    parquet.write_table(arrow.table({name: arrow.array([], "string") for name in ROW}), tmp_path / "c.parquet")
    for name in ("a.jsonl", "b.jsonl", "c.parquet", "d.csv", "e.csv"):
        assert refused(tmp_path / name) == f"{tmp_path / name}: empty: no row in it"


FAR = 10**12  # seconds; the year 33658


@pytest.mark.parametrize(
    "column",
    [
        arrow.array([1, FAR], arrow.timestamp("s")),
        arrow.array([1000, FAR * 1000], arrow.timestamp("ms", "UTC")),
        arrow.array([1_000_000, FAR * 10**6], arrow.timestamp("us")),
        arrow.array([1_000_000, 2**63 - 1], arrow.timestamp("us", "Europe/Berlin")),
        arrow.array([1, -FAR], arrow.timestamp("s")),
        arrow.array([0, 2**31 - 1], arrow.date32()),
        arrow.array([0, FAR * 1000], arrow.date64()),
        arrow.array([1000, FAR * 1000], arrow.timestamp("ms")).dictionary_encode(),
        arrow.array([1.0, float("inf")], arrow.float64()),
        arrow.array([1.0, 1e21], arrow.float64()),
    ],
    ids=lambda column: str(column.type),
)
def test_a_time_that_no_calendar_has_is_a_bad_row_like_any_other(tmp_path: Path, column: Any) -> None:
    path = tmp_path / "rows.parquet"
    table = arrow.table({**{name: [value] * 2 for name, value in ROW.items()}, "timestamp": column})
    parquet.write_table(table, path)
    bad = BadRows()
    (good,) = read_interactions(DataConfig(path=str(path)), bad)
    assert good.time in (0, 1)
    (message,) = bad.first
    assert message.startswith(f"{path}:2: timestamp: ")
    # A column that is not read has no bad values.
    assert len(read(path, time=None)) == 2


def test_values_that_python_cannot_hold_spoil_their_own_row_only(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    broken = arrow.array([b"fine", b"\xff", b"fine"], arrow.binary()).view(arrow.string())
    times = arrow.array([[0], [0], [FAR]], arrow.list_(arrow.timestamp("s")))
    table = arrow.table({**{name: [value] * 3 for name, value in ROW.items()}, "input": broken, "times": times})
    parquet.write_table(table, path)
    bad = BadRows()
    assert len(list(read_interactions(DataConfig(path=str(path), prompt="{input} {times}"), bad))) == 1
    assert [message.removeprefix(f"{path}:") for message in bad.first] == [
        "2: input: not UTF-8",
        "3: times: a time outside of the years 1 to 9999",
    ]


def test_ids_in_columns_of_floats_and_decimals_are_exact_or_bad(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    lost = "the id has lost digits; write it as text"
    for column, good, message in (
        (arrow.array([2.0**53 - 1, 2.0**53], arrow.float64()), "9007199254740991", f"9007199254740992.0: {lost}"),
        (arrow.array([2.0**24 - 1, 2.0**24], arrow.float32()), "16777215", f"16777216.0: {lost}"),
        (arrow.array([7.0, 7.5], arrow.float64()), "7", "7.5 is not a whole number; write the id as text"),
        (arrow.array([7.0, float("inf")]), "7", "inf is not a whole number; write the id as text"),
        (
            arrow.array([Decimal("90071992547409930.00"), Decimal("0.50")]),
            "90071992547409930",
            "0.50 is not a whole number; write the id as text",
        ),
        (
            arrow.array([Decimal(10**37 + 1), None], arrow.decimal128(38, 0)),
            f"1{'0' * 36}1",
            None,
        ),
    ):
        for name in ("user_id", "item_id"):
            parquet.write_table(arrow.table({**{key: [text] * 2 for key, text in ROW.items()}, name: column}), path)
            bad = BadRows()
            found, *_ = read_interactions(DataConfig(path=str(path)), bad)
            assert (found.user if name == "user_id" else found.item) == good
            if message is not None:
                assert bad.first == [f"{path}:2: {name}: {message}"]


def test_damaged_files_are_refused_in_one_line(tmp_path: Path) -> None:
    packed = gzip.compress(lines(*[ROW] * 5000))
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "not.jsonl.gz").write_bytes(b"plain")
    (tmp_path / "not.parquet").write_bytes(b"plain")
    assert refused(tmp_path / "cut.jsonl.gz").startswith(f"{tmp_path / 'cut.jsonl.gz'}: cannot be read: ")
    assert refused(tmp_path / "not.jsonl.gz").startswith(f"{tmp_path / 'not.jsonl.gz'}: cannot be read: ")
    assert refused(tmp_path / "not.parquet").startswith(f"{tmp_path / 'not.parquet'}: not readable as Parquet: ")


def test_ids_that_a_program_has_shortened_or_made_of_nothing_are_bad(tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("user_id,item_id,input,output\n1.23457E+11,i,a,b\nNA,i,a,b\nnan,i,a,b\n1.2345678E7,NA,a,b\n")
    assert complaints(rows) == [
        "2: user_id: 123457000000.0: the id has lost digits; write it as text",
        "3: user_id: 'NA' stands for a missing id",
        "4: user_id: 'nan' stands for a missing id",
    ]
    bad = BadRows()
    assert [(each.user, each.item) for each in read_interactions(DataConfig(path=str(rows)), bad)] == [
        ("12345678", None)
    ]
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(lines(ROW | {"user_id": "None"}, ROW | {"user_id": "NA"}, ROW | {"user_id": "1.23457E+11"}))
    assert complaints(rows) == ["1: user_id: 'None' stands for a missing id"]


def test_times_of_old_writers_and_of_unknown_zones_are_read(tmp_path: Path) -> None:
    path, texts = tmp_path / "rows.parquet", {key: [value] * 2 for key, value in ROW.items()}
    never = arrow.array([datetime(9999, 12, 31), datetime(2024, 2, 29)], arrow.timestamp("us"))
    parquet.write_table(arrow.table({**texts, "timestamp": never}), path, use_deprecated_int96_timestamps=True)
    assert [each.time for each in read(path)] == [253_402_214_400, 1_709_164_800]
    for unit, second in (("s", 1), ("ns", 10**9)):
        somewhere = arrow.array([second, None], arrow.timestamp(unit, "Mars/Phobos"))
        parquet.write_table(arrow.table({**texts, "timestamp": somewhere}), path)
        assert [each.time for each in read(path)] == [1, None]


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    assert "not a regular file" in refused(tmp_path / "rows.jsonl")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.jsonl").write_bytes(lines(ROW))
    (tmp_path / "folder" / "b.jsonl").symlink_to(tmp_path / "gone.jsonl")
    assert refused(tmp_path / "folder").endswith("b.jsonl: cannot be read: No such file or directory")
    assert refused("~no-such-person/rows.jsonl").startswith("~no-such-person/rows.jsonl: no such file or folder")


@pytest.mark.parametrize(("key", "value"), [("part", "test"), ("name", "small")])
def test_parts_of_hugging_face_data_sets_are_refused_for_files(tmp_path: Path, key: str, value: str) -> None:
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_bytes(lines(ROW))
    message = f"data.{key}: {value!r} is a part of a Hugging Face data set, and {tmp_path} is jsonl"
    assert refused(tmp_path, **{key: value}) == message
    assert len(read(tmp_path, part="train")) == 2
