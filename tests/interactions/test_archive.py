"""An archive has everything that a run holds of a user, from every file of the registry, and nothing of others."""

from __future__ import annotations

import io
import json
import shutil
import sqlite3
import zipfile
from collections.abc import Iterator
from contextlib import closing
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from proper.adapters.store import AdapterStore, UserRecord
from proper.cli.app import main
from proper.data.database import create
from proper.errors import InputError
from proper.interactions import archive
from proper.interactions.archive import write_archive
from proper.interactions.deletion import remove
from proper.interactions.log import InteractionLog, LogEntry
from proper.interactions.personal_files import PERSONAL_FILES, work_folder
from proper.interactions.updates import UpdateAttempt
from proper.run_folder import Personal

ANN, OTHER = "ann <ü>&'", "other-user"
MARK, SECRET = "zyzzyva", "not-anns"
"""Texts of the user and of the other one."""

PLANTED = {
    "*.jsonl": lambda user, mark: json.dumps({"user": user, "id": 1, "item": mark, "prompt": mark}) + "\n",
    "predictions/*.lamp.json": lambda user, mark: json.dumps({"golds": [{"id": mark, "output": f"{mark} answer"}]}),
    "data/*.json": lambda user, mark: json.dumps({"groups": {user: mark}, "items": {f"{user}-1": f"{mark} 1"}}),
    "*.json": lambda user, mark: json.dumps({"users": [{"user": user, "said": mark}], "losses": {user: f"{mark}!"}}),
    "*.html": lambda user, mark: f"<p>{user.replace('&', '&amp;').replace('<', '&lt;')}: <b>{mark}</b></p>",
    "*.csv": lambda user, mark: f'a,"{user}",{mark}\n',
}


def plant(path: Path, pattern: str) -> None:
    """Write a file of a kind with data of both users."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".sqlite", ".between"):
        with closing(create(path)) as data:
            for number, (user, mark) in enumerate([(ANN, MARK), (OTHER, SECRET)], 1):
                data.execute("INSERT INTO users (number, id) VALUES (?, ?)", (number, user))
                data.execute("INSERT INTO texts VALUES (?, ?, 'y', NULL)", (number, mark))
                data.execute(
                    "INSERT INTO rows VALUES (?, ?, ?, NULL, 2, x'00', NULL, 0, 'history', NULL)",
                    (number, *[number] * 2),
                )
        return
    write = next(write for name, write in PLANTED.items() if fnmatch(pattern, name))
    mine, theirs = write(ANN, MARK), write(OTHER, SECRET)
    if path.suffix == ".json":  # one object with the content of both
        merged = json.loads(mine)
        for key, value in json.loads(theirs).items():
            merged[key] = merged[key] + value if isinstance(value, list) else merged[key] | value
        path.write_text(json.dumps(merged), "utf-8")
    else:
        path.write_text(mine + theirs, "utf-8")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run, and a further seed of it, with something of both users in every personal file."""
    folder = tmp_path / "run"
    for home in (folder, folder / "seeds" / "1"):
        home.mkdir(parents=True)
        (home / "config.yaml").write_text("data: {path: x}\n")
        for kind in Personal:
            if home == folder or not kind.startswith(("data", "variants")):
                plant(home / kind.replace("*", "made"), str(kind))
        with closing(AdapterStore(home / "users")) as store:
            for user, value in ((ANN, 1.0), (OTHER, 2.0)):
                adapter = {"x.A": torch.full((2, 3), value)}
                store.put([UserRecord(user, "groups", torch.full((4,), value), None, {"loss": float("nan")})])
                store.put([UserRecord(user, "users", torch.full((4,), value), adapter, {"said": user})])
    with closing(InteractionLog(folder / "users")) as log:
        log.append("", ANN, [LogEntry(f"{MARK} logged", "x")])
        log.append("", OTHER, [LogEntry(f"{SECRET} logged", "x")])
        log.append("acme", ANN, [LogEntry(f"{SECRET} of a tenant", "x")])
    work = work_folder(folder / "users", "", ANN)
    work.mkdir(parents=True)
    (work / "state").write_text(f"{MARK} on the way")
    return folder


def read(run: Path, tenant: str = "") -> dict[str, bytes]:
    target = io.BytesIO()
    with closing(AdapterStore(run / "users", tenant)) as store, closing(InteractionLog(run / "users")) as log:
        write_archive(target, store, log, ANN)
    with zipfile.ZipFile(target) as content:
        return {name: content.read(name) for name in content.namelist()}


def test_what_every_file_of_the_registry_holds_is_in_the_archive(run: Path) -> None:
    found = read(run)
    for kind in PERSONAL_FILES:
        name = kind.pattern.replace("*", "made")
        told = json.loads(found[f"files/{name}.json"])
        assert MARK in json.dumps(told["found"]), name
        if not kind.pattern.startswith(("data", "variants")):
            assert MARK.encode() in found[f"files/seeds/1/{name}.json"]
    rows = [json.loads(line) for line in found["interactions.jsonl"].splitlines()]
    assert [(row["source"], row["prompt"]) for row in rows] == [("run", MARK), ("log", f"{MARK} logged")]
    for prefix in ("", "seeds/1/"):
        first, second = json.loads(found[f"{prefix}versions.json"])
        assert (first["version"], first["facts"], second["facts"]) == (2, {"said": ANN}, {"loss": None})
        assert [*first] == ["version", "parent", "tier", "bytes", "written", "checksum", "facts"]
        assert load(found[f"{prefix}version-2.safetensors"])["x.A"].tolist() == [[1.0] * 3] * 2
        assert load(found[f"{prefix}version-1.safetensors"])["embedding"].tolist() == [1.0] * 4
    assert found["fits/state"].startswith(MARK.encode())
    readme = found["README.txt"].decode()
    assert all(name in readme for name in found if name != "README.txt") and ANN in readme


def test_an_attempt_in_an_archive_keeps_its_keys() -> None:
    fields = {"ended": 1.0, "base": 1, "version": None, "seconds": 2.0, "reason": "r"}
    assert UpdateAttempt(**fields, metrics={"new": 3}).as_json() == {**fields, "facts": {"new": 3}}  # type: ignore[arg-type]


def test_an_archive_has_nothing_of_other_users_or_tenants(run: Path) -> None:
    assert not [name for name, content in read(run).items() if SECRET.encode() in content or OTHER.encode() in content]
    found = read(run, "acme")
    assert MARK.encode() not in b"".join(found.values())
    assert json.loads(found["interactions.jsonl"])["prompt"] == f"{SECRET} of a tenant"


def test_the_command_writes_a_private_file_outside_the_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "ann.zip"
    command = ["users", "archive", str(run), "--user", ANN, "--out"]
    assert main([*command, str(out)]) == 0 and capsys.readouterr().out == f"{out}\n"
    assert out.stat().st_mode & 0o777 == 0o600 and zipfile.ZipFile(out).testzip() is None
    assert main([*command, str(out)]) == 2 and "--force" in capsys.readouterr().err
    assert main([*command, str(run / "ann.zip")]) == 2 and "lies in the run folder" in capsys.readouterr().err


def test_a_user_who_is_deleted_meanwhile_gets_no_part_of_an_archive(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(AdapterStore(run / "users")) as store, closing(InteractionLog(run / "users")) as log:
        whole = archive._stored

        def deleted_first(*given: Any) -> Iterator[tuple[str, bytes]]:
            monkeypatch.undo()
            assert not remove(store, log, ANN, 0).waits
            return whole(*given)

        monkeypatch.setattr(archive, "_stored", deleted_first)
        with pytest.raises(InputError, match="there is no user"):
            write_archive(io.BytesIO(), store, log, ANN)


def test_files_that_go_while_an_archive_is_written_are_left_out(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fit ends, and reports are removed with another user, between the look at a folder and at its files."""
    work, files_of = work_folder(run / "users", "", ANN), archive.files_of
    (work / "stage").mkdir()
    (work / "stage" / "state").write_text(MARK)

    class Target(io.BytesIO):
        def write(self, data: Any) -> int:
            if b"fits/stage/state" in bytes(data):
                shutil.rmtree(work, ignore_errors=True)
            return super().write(data)

    def going(folder: Path) -> Iterator[tuple[Any, Path]]:
        for kind, path in files_of(folder):
            path.unlink()
            yield kind, path

    monkeypatch.setattr(archive, "files_of", going)
    target = Target()
    with closing(AdapterStore(run / "users")) as store, closing(InteractionLog(run / "users")) as log:
        write_archive(target, store, log, ANN)
    with zipfile.ZipFile(target) as content:
        names = content.namelist()
    assert "fits/stage/state" in names and "fits/state" not in names
    assert "version-2.safetensors" in names and not [name for name in names if name.startswith("files/")]


def test_a_user_who_is_unknown_or_leaving_has_no_archive(run: Path) -> None:
    with closing(AdapterStore(run / "users")) as store, closing(InteractionLog(run / "users")) as log:
        with pytest.raises(InputError, match="no user 'eve'"):
            write_archive(io.BytesIO(), store, log, "eve")
        with closing(sqlite3.connect(run / "users" / "interactions.sqlite", isolation_level=None)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM interactions").fetchone()
            assert remove(store, log, ANN, 0).waits
            with pytest.raises(InputError, match="being deleted"):
                write_archive(io.BytesIO(), store, log, ANN)
