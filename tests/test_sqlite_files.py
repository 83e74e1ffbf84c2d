"""Shared SQLite files: the owner's, whole, read where nothing can be written, and damage is named."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from proper.errors import StoreError, UnavailableError
from proper.interactions.log import InteractionLog, LogEntry
from proper.sqlite_files import Schema, open_shared

NUMBERS = Schema("numbers", 3, ("CREATE TABLE numbers (n INTEGER)",))
READ = """
import json, sys
from pathlib import Path
from proper.errors import ProperError
from proper.sqlite_files import Schema, open_shared
try:
    opened = open_shared(Path(sys.argv[1]), Schema("numbers", 3, ("CREATE TABLE numbers (n INTEGER)",)), 1)
    print(json.dumps([opened.read_only, opened.connection.execute("SELECT n FROM numbers").fetchall()]))
except ProperError as error:
    print(json.dumps(str(error)))
"""


@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
def test_a_file_and_what_sqlite_puts_beside_it_are_the_owners(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with closing(open_shared(tmp_path / "new" / "x", NUMBERS, 1).connection) as db:
            db.execute("INSERT INTO numbers VALUES (1)")
            modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "new").iterdir()}
    finally:
        os.umask(before)
    assert modes == {"x": 0o600, "x-wal": 0o600, "x-shm": 0o600}


def test_a_file_that_everybody_could_read_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "x"
    open_shared(path, NUMBERS, 1).connection.close()
    path.chmod(0o644)
    with closing(open_shared(path, NUMBERS, 1).connection) as db:
        db.execute("INSERT INTO numbers VALUES (1)")
        assert {each.stat().st_mode & 0o777 for each in tmp_path.iterdir()} == {0o600}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "the file is empty, so its content is lost; restore a backup"),
        (b"no database at all, but long enough to be one" * 20, "file is not a database"),
    ],
)
def test_damage_is_named_and_left_as_it_is(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(StoreError) as caught:
        open_shared(path, NUMBERS, 1)
    assert str(caught.value) == f"{path}: {said}"
    assert path.read_bytes() == content and [each.name for each in tmp_path.iterdir()] == ["x"]


def test_a_file_of_another_version_is_named(tmp_path: Path) -> None:
    open_shared(tmp_path / "x", Schema("numbers", 2, NUMBERS.tables), 1).connection.close()
    with pytest.raises(StoreError, match=r"x: numbers of another version of proper \(format 2\)"):
        open_shared(tmp_path / "x", NUMBERS, 1)


def test_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").symlink_to(tmp_path / "victim")
    with pytest.raises(StoreError, match="is a symbolic link"):
        open_shared(tmp_path / "x", NUMBERS, 1)
    assert not (tmp_path / "victim").exists()


def test_no_file_is_made_where_one_must_have_been_lost(tmp_path: Path) -> None:
    def lost() -> None:
        raise StoreError("lost")

    with pytest.raises(StoreError, match="lost"):
        open_shared(tmp_path / "x", NUMBERS, 1, lost)
    assert list(tmp_path.iterdir()) == []
    open_shared(tmp_path / "x", NUMBERS, 1).connection.close()
    open_shared(tmp_path / "x", NUMBERS, 1, lost).connection.close()


def test_a_folder_that_cannot_be_written_is_read(
    tmp_path: Path, unprivileged: list[str], read_only: Callable[[Path, Path], Path]
) -> None:
    home = tmp_path / "home"
    db = open_shared(home / "x", NUMBERS, 1).connection
    db.execute("INSERT INTO numbers VALUES (7)")
    running = shutil.copytree(home, tmp_path / "running")
    db.close()
    half = shutil.copytree(running, tmp_path / "half")
    (half / "x-shm").unlink()
    empty = tmp_path / "empty"
    empty.mkdir()
    found = {}
    for source in (home, running, half, empty):
        folder = read_only(source, tmp_path / f"{source.name}-ro")
        command = [*unprivileged, sys.executable, "-c", READ, str(folder / "x")]
        found[source.name] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        assert sorted(os.listdir(folder)) == sorted(os.listdir(source)), "reading leaves nothing behind"
    assert found["home"] == found["running"] == [True, [[7]]]
    assert found["empty"] == [True, []]
    assert "x-wal cannot be read without x-shm in a read-only folder" in found["half"]


CHANGED = """
import sys
from pathlib import Path
from proper.interactions.log import InteractionLog
log = InteractionLog(Path(sys.argv[1]))
for _ in range(4):
    print(log.database.read_only, log.count("", "ann"), flush=True)
    sys.stdin.readline()
"""


def test_changes_by_others_are_seen_where_nothing_can_be_written(tmp_path: Path, unprivileged: list[str]) -> None:
    """As with a volume that one machine mounts `:ro` while another writes."""
    folder = tmp_path / "users"
    command = [*unprivileged, sys.executable, "-c", CHANGED, str(folder)]
    folder.mkdir(mode=0o500)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdin is not None and reader.stdout is not None
        said = [reader.stdout.readline()]
        for rows in (1, 2, 3):
            folder.chmod(0o700)  # where the tests do not run as root
            log = InteractionLog(folder)
            log.append("", "ann", [LogEntry("x" * 3000, "y", id=str(rows))])
            for path in folder.iterdir():
                path.chmod(0o400)
            folder.chmod(0o500)
            if rows < 3:
                log.close()
            reader.stdin.write("\n")
            reader.stdin.flush()
            said.append(reader.stdout.readline())
            log.close()
            for path in folder.iterdir():
                path.chmod(0o600)
        folder.chmod(0o700)
        reader.kill()
    assert said == ["True 0\n", "True 1\n", "True 2\n", "True 3\n"]


@pytest.mark.parametrize("end", ["-wal", "-journal"])
def test_a_lost_file_is_not_made_anew_beside_its_log(tmp_path: Path, end: str) -> None:
    """SQLite would write the pages of the lost file into the new one."""
    (tmp_path / f"x{end}").write_bytes(b"pages of the lost file")
    with pytest.raises(StoreError, match=f"x: is missing, but x{end} is there; restore a backup and remove x{end}"):
        open_shared(tmp_path / "x", NUMBERS, 1)
    assert [each.name for each in tmp_path.iterdir()] == [f"x{end}"]


def test_a_file_system_without_hard_links_loses_no_file_of_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: Path) -> None:
        monkeypatch.undo()
        with closing(open_shared(tmp_path / "x", NUMBERS, 1).connection) as faster:
            faster.execute("INSERT INTO numbers VALUES (7)")
        raise PermissionError

    monkeypatch.setattr(os, "link", link)
    with closing(open_shared(tmp_path / "x", NUMBERS, 1).connection) as db:
        assert db.execute("SELECT n FROM numbers").fetchall() == [(7,)]
    assert [each.name for each in tmp_path.iterdir()] == ["x"]


def test_a_file_system_without_hard_links_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: Path) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", link)
    open_shared(tmp_path / "x", NUMBERS, 1).connection.close()
    assert [each.name for each in tmp_path.iterdir()] == ["x"]


def test_a_full_disk_is_not_damage(tmp_path: Path) -> None:
    """SQLite says "disk I/O error" if it cannot make the index of a write-ahead log."""
    path = tmp_path / "x"
    open_shared(path, NUMBERS, 1).connection.close()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(UnavailableError, match="x: no space is left on the disk") as full:
            open_shared(path, NUMBERS, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert full.value.exit_code == 1
