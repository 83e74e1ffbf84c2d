"""The search for a deleted user: it finds a leftover in every kind of file, and nothing where nothing is."""

from __future__ import annotations

import base64
import bz2
import errno
import gzip
import html
import io
import json
import lzma
import os
import shutil
import sqlite3
import zipfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from proper.adapters.store import AdapterStore, UserRecord
from proper.cli.app import main
from proper.data.database import create
from proper.interactions.byte_search import Search
from proper.interactions.deletion import remove
from proper.interactions.fingerprints import (
    MAX_PRINT_BYTES,
    WINDOW,
    Fingerprints,
    read_fingerprints,
    write_fingerprints,
)
from proper.interactions.log import InteractionLog, LogEntry
from proper.interactions.verification import fingerprint, verify

USER, OTHER = "anna-17", "bo"
TEXT = 'In the "harbour" of Łódź, nobody said <zyzzyva> & left.\nThe answer, as ever, was forty-two herons.'
COMMON = "A text that both of them wrote, word by word."
SALT = bytes(range(32))
DRAW = torch.Generator().manual_seed(3)
ADAPTER = {"x.A": torch.randn(8, 300, generator=DRAW), "x.B": torch.randn(40, 8, generator=DRAW)}
EMBEDDING = torch.randn(16, generator=DRAW)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run in which USER and OTHER are stored, logged and in the data."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("data: {path: x}\n")
    (folder / "metrics.jsonl").write_text('{"loss": 1.25}\n')
    with closing(create(folder / "data.sqlite")) as data:
        data.execute("INSERT INTO meta VALUES ('labels', '[]')")
        for number, user in enumerate((USER, OTHER), 1):
            data.execute("INSERT INTO users (number, id) VALUES (?, ?)", (number, user))
        for row, (user, text) in enumerate([(1, TEXT), (1, COMMON), (2, COMMON)], 1):
            data.execute("INSERT INTO texts VALUES (?, ?, 'a label here', NULL)", (row, text))
            data.execute(
                "INSERT INTO rows VALUES (?, ?, ?, NULL, 2, x'00', NULL, 0, 'history', NULL)", (row, row, user)
            )
    with closing(AdapterStore(folder / "users")) as store, closing(InteractionLog(folder / "users")) as log:
        store.put([UserRecord(USER, "users", EMBEDDING, ADAPTER), UserRecord(OTHER, "groups", EMBEDDING.flip(0))])
        log.append("", USER, [LogEntry("Logged by nobody else than her.", "a label here")])
        log.append("", OTHER, [LogEntry("he writes of anna-17 himself", "a label here")])
    return folder


@pytest.fixture
def gone(run: Path) -> tuple[Path, Fingerprints]:
    """The run after the deletion, and the prints that were made before it."""
    with closing(AdapterStore(run / "users")) as store, closing(InteractionLog(run / "users")) as log:
        prints = fingerprint(store, log, USER, SALT)
        assert not remove(store, log, USER).waits
    return run, prints


def zipped(content: bytes, name: str = "inside") -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return target.getvalue()


def zstd(content: bytes) -> bytes:
    target = pa.BufferOutputStream()
    with pa.CompressedOutputStream(target, "zstd") as packed:
        packed.write(content)
    return bytes(target.getvalue())


def parquet(content: bytes) -> bytes:
    target = io.BytesIO()
    pq.write_table(pa.table({"x": [content.decode()] * 2}), target, compression="zstd", use_dictionary=False)
    return target.getvalue()


def database(path: Path, deleted: bool = False) -> None:
    """Write a table with small pages; `deleted` drops the rows and leaves their bytes in free pages."""
    with closing(sqlite3.connect(path, isolation_level=None)) as data:
        data.execute("PRAGMA page_size = 512")
        data.execute("PRAGMA secure_delete = OFF")
        data.execute("CREATE TABLE t(x, y)")
        data.execute("INSERT INTO t VALUES (?, ?)", (USER, "#" * 300 + TEXT + "#" * 3000))
        if deleted:
            data.execute("DELETE FROM t")


def write_ahead(path: Path) -> None:
    """Write a database whose row is in its write-ahead log only."""
    writer = sqlite3.connect(path, isolation_level=None)
    writer.execute("PRAGMA journal_mode = WAL")
    writer.execute("CREATE TABLE t(x, y)")
    writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    writer.execute("INSERT INTO t VALUES (?, ?)", (USER, TEXT))
    content = {end: path.with_name(path.name + end).read_bytes() for end in ("", "-wal")}
    writer.close()
    for end, each in content.items():
        path.with_name(path.name + end).write_bytes(each)


ROW = json.dumps({"user": USER, "prompt": TEXT}).encode()
PACKED: dict[str, Callable[[bytes], bytes]] = {
    "predictions/users.jsonl": lambda row: b'{"user": "bo"}\n' + row + b"\n",
    "late.jsonl": lambda row: b'{"user": "bo", "x": "some other text"}\n' * 300_000 + row,
    "report.html": lambda row: f"<p>{html.escape(USER)} {html.escape(TEXT)}</p>".encode(),
    "compare-a.csv": lambda row: f"a,{USER},1\n".encode() + TEXT.encode(),
    "server.log": lambda row: b"12:30 GET " + row,
    "a.gz": gzip.compress,
    "a.bz2": bz2.compress,
    "a.xz": lzma.compress,
    "a.zst": zstd,
    "a.zip": lambda row: zipped(zipped(gzip.compress(row))),
    "a.parquet": parquet,
    "a.utf16": lambda row: TEXT.encode("utf-16-le") + USER.encode("utf-16-le"),
    "a.b64": lambda row: base64.b64encode(b"#" + TEXT.encode() + USER.encode()),
    "a.hex": lambda row: TEXT.encode().hex().encode() + USER.encode().hex().encode(),
}


@pytest.mark.parametrize("name", PACKED)
def test_a_leftover_in_any_kind_of_file_is_found(gone: tuple[Path, Fingerprints], name: str) -> None:
    run, prints = gone
    path = run / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(PACKED[name](ROW.replace(USER.encode(), b"bo") if name == "late.jsonl" else ROW))
    verified = verify(run, [(USER, prints)])
    (found,) = (user["found"] for user in verified.certificate["users"])
    assert not verified.clean and {each["file"] for each in found} == {name}
    assert {each["kind"] for each in found} >= ({"text"} if name == "late.jsonl" else {"id", "text"})


@pytest.mark.parametrize("make", [database, lambda path: database(path, True), write_ahead], ids=["row", "free", "wal"])
def test_a_leftover_in_sqlite_is_found(gone: tuple[Path, Fingerprints], make: Callable[[Path], None]) -> None:
    run, prints = gone
    make(run / "odd.db")
    verified = verify(run, [(USER, prints)])
    found = verified.certificate["users"][0]["found"]
    assert {each["file"].removesuffix("-wal") for each in found} == {"odd.db"}
    assert {each["kind"] for each in found} == {"id", "text"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_leftover_tensors_are_found_at_any_place_and_in_any_form(
    gone: tuple[Path, Fingerprints], dtype: torch.dtype
) -> None:
    run, prints = gone
    (run / "groups").mkdir()
    save_file({"a": torch.ones(7), "b": ADAPTER["x.A"].to(dtype)}, run / "groups" / "stage.checkpoint")
    (run / "users" / "blobs" / "9.shard").write_bytes(
        bytes(13) + ADAPTER["x.B"].to(dtype).view(torch.uint8).numpy().tobytes()
    )
    found = verify(run, [(USER, prints)]).certificate["users"][0]["found"]
    assert {(each["file"], each["kind"]) for each in found} == {
        ("groups/stage.checkpoint", "tensor"),
        ("users/blobs/9.shard", "tensor"),
    }
    (run / "users" / "blobs" / "9.shard").write_bytes(EMBEDDING.numpy().tobytes())
    assert "users/blobs/9.shard" in {
        each["file"] for each in verify(run, [(USER, prints)]).certificate["users"][0]["found"]
    }


def test_a_file_name_counts_and_an_unreadable_file_is_not_clean(gone: tuple[Path, Fingerprints]) -> None:
    run, prints = gone
    (run / f"report-user-{USER}.html").touch()
    assert verify(run, [(USER, prints)]).certificate["users"][0]["found"][0]["read_as"] == "file name"
    (run / f"report-user-{USER}.html").unlink()
    (run / "a.gz").write_bytes(gzip.compress(b"x" * 1000)[:-9])
    verified = verify(run, [(USER, prints)])
    assert not verified.clean and verified.certificate["unreadable"][0]["file"] == "a.gz"


def test_files_that_a_server_removes_meanwhile_are_left_out(gone: tuple[Path, Fingerprints]) -> None:
    run, prints = gone
    ends = run / "users" / "fits" / "0" / "stage"
    ends.mkdir(parents=True)
    (ends / "state.sqlite").write_bytes(b"SQLite format 3")

    verified = verify(run, [(USER, prints)], lambda count: shutil.rmtree(ends.parent, ignore_errors=True))
    assert verified.clean
    assert "state.sqlite" not in str(verified.certificate["searched"])


def test_a_folder_that_cannot_be_read_is_not_clean(
    gone: tuple[Path, Fingerprints], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, prints = gone
    (run / "closed").mkdir()
    scandir = os.scandir

    def refuse(path: Any = ".") -> Any:  # a test may run as root, whom no mode keeps out
        if Path(os.fsdecode(path)).name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    verified = verify(run, [(USER, prints)])
    assert not verified.clean and verified.certificate["result"] == "not all files could be read"
    assert [each["file"] for each in verified.certificate["unreadable"]] == ["closed"]


def test_what_others_wrote_too_is_no_evidence(run: Path, gone: tuple[Path, Fingerprints]) -> None:
    verified = verify(run, [(USER, gone[1])])
    assert verified.clean, verified.certificate["users"][0]["found"]
    told = verified.certificate["users"][0]
    # Of TEXT, COMMON, the logged text and the label, the two that nobody else has; an embedding and four forms.
    assert told["texts"] == {"given": 4, "searched": 2, "below_8_bytes": 0}
    assert told["tensors"]["given"] == 1 + 2 + 2 + 4 + 4 and told["tensors"]["searched"] >= 7
    (run / "predictions").mkdir()
    (run / "predictions" / "a.jsonl").write_text(json.dumps({"user": "bo", "prompt": COMMON}))
    assert verify(run, [(USER, gone[1])]).clean
    searched = {each["file"] for each in verified.certificate["searched"]["each"]}
    there = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert {name for name in there - searched if not name.endswith(("-shm", "-wal"))} == {"predictions/a.jsonl"}


def test_an_embedding_that_is_the_mean_of_all_is_no_evidence(gone: tuple[Path, Fingerprints]) -> None:
    run, prints = gone
    (run / "groups").mkdir()
    save_file({"mean_embedding": EMBEDDING}, run / "groups" / "groups.safetensors")
    assert verify(run, [(USER, prints)]).clean
    save_file({"mean_embedding": EMBEDDING.flip(0), "x": EMBEDDING}, run / "groups" / "groups.safetensors")
    assert not verify(run, [(USER, prints)]).clean


def test_a_user_who_is_still_there_is_found(run: Path) -> None:
    found = verify(run, [(USER, Fingerprints(SALT))]).certificate["users"][0]["found"]
    assert {each["read_as"] for each in found} >= {"store", "log", "raw", "SQLite"}


def test_the_commands_delete_and_verify(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prints, archive, certificate = tmp_path / "prints.json", tmp_path / "anna.zip", tmp_path / "certificate.json"
    assert main(["users", "archive", str(run), "--user", USER, "--out", str(archive)]) == 0
    assert main(["users", "verify-deleted", str(run), "--user", USER, "--originals", str(archive)]) == 1
    assert main(["users", "delete", str(run), "--user", USER, "--fingerprints", str(prints)]) == 0
    assert not any(word in prints.read_text() for word in (USER, "harbour", "herons", "Logged by"))
    command = ["users", "verify-deleted", str(run), "--user", USER]
    for options in ([], ["--originals", str(archive)], ["--fingerprints", str(prints)]):
        assert main([*command, *options, "--json", str(certificate)]) == 0
        told = json.loads(certificate.read_text())
        assert told["result"] == "nothing found" and (told["users"][0]["texts"]["searched"] > 0) == bool(options)
    capsys.readouterr()
    (run / "left.txt").write_text(TEXT[-60:])
    for options in (["--originals", str(archive)], ["--fingerprints", str(prints)]):
        assert main([*command, *options]) == 1
        assert "left.txt: text of user 'anna-17', read as raw" in capsys.readouterr().out
    assert main([*command, "--fingerprints", str(tmp_path / "none.json")]) == 2


def test_fingerprints_of_a_second_attempt_are_added(tmp_path: Path) -> None:
    path = tmp_path / "prints.json"
    for texts in (["one text of the user"], ["another text of the user", "one text of the user"], []):
        prints = Fingerprints(SALT)
        prints.add_texts(texts)
        write_fingerprints(path, {USER: prints}, SALT)
    found = read_fingerprints(path, USER)
    assert len({each.source for each in found.prints}) == 2
    for text in ("one text of the user", "another text of the user"):
        assert Search("nobody-here", (), found.prints, SALT).scan([b"..." + text.encode()])


@given(st.data())
def test_a_search_finds_exactly_what_a_plain_search_finds(data: st.DataObject) -> None:
    """Streams in any pieces; the oracle is `bytes.find`."""
    user = data.draw(st.sampled_from(["u7", "anna", "ann", "42", "a b", "ü&<"]))
    words = data.draw(
        st.lists(st.sampled_from(["u7", "u77", "anna", "ann", "42", "4.42", "a b", "ü&<", "x", " ", '"']))
    )
    content = " ".join(words).encode() + b" " * data.draw(st.integers(0, 9000)) + f'"{user}"'.encode()
    cuts = sorted(data.draw(st.sets(st.integers(0, len(content)), max_size=4)))
    pieces = [content[a:b] for a, b in zip([0, *cuts], [*cuts, len(content)], strict=True)]
    text = content.decode()
    word = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_"
    expected = set()
    at = text.find(user)
    while at >= 0:
        before, after = text[at - 1 : at], text[at + len(user) : at + len(user) + 1]
        if user.isdigit():
            fits = before != "" and before in "\0\"'>,;\t\n" and (after == "" or after in "\0\"'<,;\t\r\n")
        else:
            fits = not (before and before in word) and not (after and after in word)
        if fits:
            expected.add(len(text[:at].encode()))
        at = text.find(user, at + 1)
    assert {hit.at for hit in Search(user).scan(pieces)} == expected


@given(
    st.binary(min_size=0, max_size=600),
    st.integers(WINDOW, MAX_PRINT_BYTES),
    st.integers(0, 500),
    st.sets(st.integers(0, 900)),
)
def test_prints_are_found_at_every_offset(noise: bytes, length: int, offset: int, cuts: set[int]) -> None:
    piece = bytes((7 * at + 3) % 251 for at in range(length))
    prints = Fingerprints(SALT)
    prints._add("tensor", 1, 0, piece)
    content = noise[:offset] + piece + noise[offset:]
    edges = [0, *sorted(cut for cut in cuts if cut < len(content)), len(content)]
    pieces = [content[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    hits = {hit.at for hit in Search("nobody-here", (), prints.prints, SALT).scan(pieces)}
    expected = {at for at in range(len(content)) if content[at : at + length] == piece}
    assert hits == expected
