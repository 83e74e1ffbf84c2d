"""CSV, and files in any compression: what is read, and one line for what is refused."""

from __future__ import annotations

from pathlib import Path

import pyarrow as arrow
import pytest
from pyarrow import parquet

from proper.config import DataConfig
from proper.data.interactions import BadRows, Interaction, read_interactions
from proper.files import hash_value
from tests.data.source_reading import ROW, complaints, lines, packed, read, refused

PACKED = ("", ".gz", ".bz2", ".xz", ".zst")


@pytest.mark.parametrize("ending", PACKED)
def test_packed_jsonl_is_read_with_its_line_numbers(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"rows.jsonl{ending}"
    packed(path, lines(ROW) + b"{\n" + lines(*[ROW] * 3000))
    bad = BadRows()
    assert len(list(read_interactions(DataConfig(path=str(path)), bad))) == 3001
    assert bad.first == [f"{path}:2: row: not JSON (Expecting property name enclosed in double quotes at column 2)"]


@pytest.mark.parametrize("ending", PACKED[1:])
def test_packed_files_that_are_cut_or_not_packed_are_refused(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"rows.jsonl{ending}"
    packed(path, lines(*(ROW | {"input": hash_value(n)} for n in range(2000))))
    path.write_bytes(path.read_bytes()[:-200])
    assert refused(path).startswith(f"{path}: cannot be read: ")
    path.write_bytes(b"plain")
    assert refused(path).startswith(f"{path}: cannot be read: ")


@pytest.mark.parametrize("ending", PACKED)
def test_csv_is_read_whatever_it_is_packed_in(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"rows.csv{ending}"
    body = (
        "\ufeffuser_id,item_id,timestamp,input,output\r\n"
        '7,1.0,1700000000.0,"a, ""b""\nc",1.0\r\n\r\n'
        "7.0,,,d,é\r\n"
        "7.1,x-1.0,2018-03-30,1.10,+1\r\n"
    )
    packed(path, body.encode())
    assert read(path) == [
        Interaction("7", 'a, "b"\nc', "1.0", "1", 1700000000.0),
        Interaction("7", "d", "é", None, None),
        Interaction("7.1", "1.10", "+1", "x-1.0", 1522368000.0),
    ]
    packed(tmp_path / f"rows.tsv{ending}", b"user_id\tinput\toutput\nu\ta,b\tc\n")
    assert read(tmp_path / f"rows.tsv{ending}") == [Interaction("u", "a,b", "c", None, None)]


@pytest.mark.parametrize(("mark", "cell"), [(";", "a,b"), ("\t", "a,b"), (",", "a;b"), ("|", "a b")])
def test_a_csv_file_may_separate_its_cells_as_spreadsheets_do(tmp_path: Path, mark: str, cell: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f'user_id{mark}"input"{mark}output{mark}"a;b,c"\nu{mark}"{cell}"{mark}c{mark}d\n')
    assert read(path) == [Interaction("u", cell, "c", None, None)]


def test_the_line_that_tells_excel_what_separates_the_cells_is_no_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b"\xef\xbb\xbfsep=|\r\nuser_id|input|output;x\r\nu|a,b|c\r\nu|d\r\n")
    bad = BadRows()
    good = list(read_interactions(DataConfig(path=str(path), target="{output;x}"), bad))
    assert [(each.prompt, each.target) for each in good] == [("a,b", "c")]
    assert bad.first == [f"{path}:4: row: 2 cells, where the first row has 3"]
    path.write_text("sep=;\n")
    assert refused(path) == f"{path}: empty: no row in it"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.jsonl", "rows.jsonl.gz"])
def test_a_file_in_utf_16_is_refused_by_its_name(tmp_path: Path, name: str, encoding: str) -> None:
    packed(tmp_path / name, lines(ROW).decode().encode(encoding))
    assert refused(tmp_path / name) == f"{tmp_path / name}: UTF-16, expected UTF-8 (iconv -f UTF-16 -t UTF-8 FILE)"


def test_bad_rows_of_csv_have_the_number_of_the_line_where_they_begin(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(
        b'user_id,input,output,timestamp\nu,"two\nlines",a,2018\nu,x\nu,"x"y,b,\nu,\xff,c,\nu,,d,\n'
        b'7.656119796028794e+16,x,e,\nu,x,f,1.7e+18\nu,x,g,soon\nu,"never closed,h,\nu,x,i,\n'
        b'u,"nor this,j,\nu,"but",k,\nu,"two\nlines" x,l,\nu,x,m,\n'
    )
    bad = BadRows()
    good = list(read_interactions(DataConfig(path=str(path)), bad))
    assert [(each.target, each.time) for each in good[:3]] == [("a", 1514764800.0), ("f", 1.7e9), ("i", None)]
    assert [each.target for each in good[3:]] == ["k", "m"]
    assert [message.removeprefix(f"{path}:") for message in bad.first] == [
        "4: row: 2 cells, where the first row has 4",
        "5: row: not CSV (',' expected after '\"')",
        "6: row: not UTF-8",
        "7: input: null",
        "8: user_id: 7.656119796028794e+16: the id has lost digits; write it as text",
        "10: timestamp: 'soon' is not a time",
        *(f"{line}: row: not CSV (a quote is not closed, or more follows behind one that is)" for line in (11, 13, 15)),
        "16: row: 3 cells, where the first row has 4",
    ]


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("user_id,input,é\n".encode("latin-1"), "1: row: not UTF-8"),
        (b'"user_id"x,input\n', "1: row: not CSV (',' expected after '\"')"),
        (b"user_id^input^output\n", " no column 'user_id' (data.user); known: user_id^input^output"),
    ],
)
def test_a_csv_file_whose_first_row_names_no_columns_is_refused(tmp_path: Path, body: bytes, what: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(body)
    assert refused(path) == f"{path}:{what}"


def test_a_csv_cell_may_be_long_but_not_endless(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    long = "word " * 100_000
    path.write_text(f"user_id,input,output\nu,{long},a\nu,{'x' * (1 << 24)}y,b\nu,x,c\n")
    bad = BadRows()
    good = list(read_interactions(DataConfig(path=str(path)), bad))
    assert [(each.target, each.prompt == long) for each in good] == [("a", True), ("c", False)]
    assert bad.first == [f"{path}:3: row: not CSV (field larger than field limit (16777216))"]


def test_a_folder_of_csv_is_read_and_a_table_beside_jsonl_is_not(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.csv").write_text(f"user_id,input,output\nu,{name},x\n")
    assert [each.prompt for each in read(tmp_path)] == ["a", "b"]
    (tmp_path / "rows.jsonl").write_bytes(lines(ROW))
    assert [each.prompt for each in read(tmp_path)] == ["in"]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_two_columns_of_one_name_are_refused_where_they_are_used(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows.{kind}"
    names = ["user_id", "input", "output", "input", "note", "note"]
    if kind == "csv":
        path.write_text(",".join(names) + "\nu,a,b,c,d,e\n")
    else:
        parquet.write_table(arrow.table([arrow.array(["u"])] * len(names), names), path)
    assert refused(path) == f"{path}: 2 columns are called 'input' (data.prompt)"
    assert len(read(path, prompt="{user_id}")) == 1


def test_the_names_of_the_columns_are_no_row_where_csv_files_were_joined(tmp_path: Path) -> None:
    head, again = "user_id,input,output\n", "the columns' names again, as in files that were joined"
    rows = tmp_path / "rows.csv"
    rows.write_text(f"\ufeff{head}u,a,b\n{head}v,c,d\n\ufeff{head}w,e,f\n")
    assert complaints(rows) == [f"3: row: {again}", f"5: row: {again}"]
