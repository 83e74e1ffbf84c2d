"""The search of the walk finds a mark in every form that a file can have it in."""

from __future__ import annotations

import base64
import gzip
import sqlite3
import zipfile
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.interactions.mark_search import files, search
from tests.interactions.walk import LEFT


def test_the_search_reads_compressed_and_paged_files(tmp_path: Path) -> None:
    text = f'{{"user": "{LEFT}"}}'
    (tmp_path / "a").write_bytes(gzip.compress(text.encode()))
    with pa.output_stream(tmp_path / "b", compression="zstd") as packed:
        packed.write(text.encode())
    pq.write_table(pa.table({"user": [text]}), tmp_path / "c", compression="zstd", use_dictionary=False)
    with zipfile.ZipFile(tmp_path / "d", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("e", text)
    for at in range(3):
        (tmp_path / f"f{at}").write_bytes(base64.b64encode(b"#" * at + text.encode()))
    (tmp_path / "g").write_text(text.encode().hex())
    (tmp_path / "h").write_text(text, "utf-16")
    (tmp_path / f"i{LEFT}").touch()
    with closing(sqlite3.connect(tmp_path / "j")) as data:
        data.execute("PRAGMA page_size = 512")
        data.execute("CREATE TABLE t(x)")
        data.executemany("INSERT INTO t VALUES (?)", [("#" * at + text + "#" * 9000,) for at in range(0, 512, 4)])
        data.commit()
    assert search(tmp_path) == {path.relative_to(tmp_path): {LEFT} for path in files(tmp_path)}
    assert len(list(files(tmp_path))) == 11
