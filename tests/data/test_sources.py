from __future__ import annotations

import gzip
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import datasets
import pyarrow as arrow
import pytest
from pyarrow import parquet

from proper.config import DataConfig
from proper.data.interactions import BadRows, Interaction, read_interactions
from proper.errors import DataError

ROW = {"user_id": "u", "input": "in", "output": "out"}


def read(path: Path | str, **settings: Any) -> list[Interaction]:
    bad = BadRows()
    found = list(read_interactions(DataConfig(path=str(path), **settings), bad))
    assert bad == BadRows()
    return found


def lines(*rows: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def refused(path: Path | str, **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(path, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


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


@pytest.mark.usefixtures("quiet")
def test_a_dataset_that_is_loaded_by_id_streams(tmp_path: Path) -> None:
    """A folder takes the same way as an id on the hub."""
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "train.jsonl").write_bytes(lines(*(ROW | {"input": str(n)} for n in range(3))))
    found = read(tmp_path / "hub", format="huggingface")
    assert [each.prompt for each in found] == ["0", "1", "2"]


def test_what_is_not_there_or_not_known_is_said(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("a,b")
    (tmp_path / "none").mkdir()
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "a.jsonl").touch()
    (tmp_path / "both" / "a.parquet").touch()
    for name, what in {
        "missing.jsonl": "no such file or folder (data.path)",
        "missing": "no such file or folder (data.path)",
        "data.csv": "format not known by its name; set data.format to jsonl or parquet",
        "none": "no .jsonl or .parquet file in this folder; data.format says which format to read",
        "both": "files of several formats in this folder; data.format says which format to read",
    }.items():
        assert refused(tmp_path / name) == f"{tmp_path / name}: {what}"
    assert refused(tmp_path / "none", format="parquet") == (
        f"{tmp_path / 'none'}: no parquet file in this folder; the names end in .parquet, .pq"
    )


def test_empty_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "b.jsonl").write_text("\n\n")
    parquet.write_table(arrow.table({name: arrow.array([], "string") for name in ROW}), tmp_path / "c.parquet")
    for name in ("a.jsonl", "b.jsonl", "c.parquet"):
        assert refused(tmp_path / name) == f"{tmp_path / name}: empty, there is not a single row"


def test_damaged_files_are_refused_in_one_line(tmp_path: Path) -> None:
    packed = gzip.compress(lines(*[ROW] * 5000))
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "not.jsonl.gz").write_bytes(b"plain")
    (tmp_path / "not.parquet").write_bytes(b"plain")
    assert refused(tmp_path / "cut.jsonl.gz").startswith(f"{tmp_path / 'cut.jsonl.gz'}: cannot be read: ")
    assert refused(tmp_path / "not.jsonl.gz").startswith(f"{tmp_path / 'not.jsonl.gz'}: cannot be read: ")
    assert refused(tmp_path / "not.parquet").startswith(f"{tmp_path / 'not.parquet'}: not readable as Parquet: ")
