"""Lists and structs in Parquet files: their parts are read as values of a column are."""

from __future__ import annotations

from pathlib import Path

import pyarrow as arrow
import pytest
from pyarrow import parquet

from proper.config import DataConfig
from proper.data.arrow_files import table_rows
from proper.data.interactions import BadRows, read_interactions


def test_nested_values_of_parquet_are_read_as_others_are(tmp_path: Path) -> None:
    path, struct = tmp_path / "rows.parquet", arrow.struct([("a", arrow.float32()), ("at", arrow.timestamp("us"))])
    columns = {
        "user_id": ["u", "u", "u", "u"],
        "output": ["x", "x", "x", "x"],
        "scores": arrow.array([[3.3, 1.1], [], [4.5], [1.0]], arrow.list_(arrow.float32())),
        "more": arrow.array([{"a": 3.3, "at": 0}, {"a": 1.5, "at": 1}, {"a": 2.5, "at": 2**62}, None], struct),
    }
    parquet.write_table(arrow.table(columns), path)
    bad = BadRows()
    good = [row.prompt for row in read_interactions(DataConfig(path=str(path), prompt="{scores} {more}"), bad)]
    zero = '"at": "1970-01-01T00:00:00'
    assert good == [f'3.3, 1.1 {{"a": 3.3, {zero}"}}', f' {{"a": 1.5, {zero}.000001"}}']
    assert bad.first == [f"{path}:3: more: a time outside of the years 1 to 9999", f"{path}:4: more: null"]
    parquet.write_table(arrow.table({**columns, "bytes": [{"b": b"x"}] * 4}), path)
    assert not [*read_interactions(DataConfig(path=str(path), prompt="{bytes}"), bad)]
    assert bad.first[-1] == f"{path}:4: bytes: bytes, expected text"


@pytest.mark.parametrize("cut", [slice(None), slice(1, None), slice(2, 4)])
def test_lists_and_structs_of_all_kinds_keep_their_shape(cut: slice) -> None:
    pair = arrow.struct([("a", arrow.int64()), ("b", arrow.list_(arrow.string()))])
    for array in (
        arrow.array([[1, 2], None, [], [3]]),
        arrow.array([[1, 2], None, [], [3]], arrow.large_list(arrow.int64())),
        arrow.array([[1, 2], None, [3, 4], [5, 6]], arrow.list_(arrow.int64(), 2)),
        arrow.array([{"a": 1, "b": ["x"]}, None, {"a": None, "b": None}, {"a": 2, "b": []}], pair),
        arrow.array([[{"a": 1, "b": ["x"]}], [], None, [None]], arrow.list_(pair)),
        arrow.array([[["x"]], [[None]], None, [None, []]]),
        arrow.array([[("k", 1)], None, [], [("k", 2), ("l", 3)]], arrow.map_(arrow.string(), arrow.int64())),
    ):
        rows = [row["column"] for row in table_rows(arrow.table({"column": array[cut]}))]
        assert rows == array[cut].to_pylist()
