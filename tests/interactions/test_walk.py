"""One walk over every command that writes into a run folder, then a search of every byte of the folder for every user.

Each user has a mark in the id and in every text. A hit in a file that the registry does not list as personal is a
failure, and so is a hit for a user who was deleted.
"""

from __future__ import annotations

import base64
import functools
import gzip
import io
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
import yaml

from proper import run_folder
from proper.cli.app import app, main
from proper.data.demo import DemoSettings, demo_config, write_demo
from proper.files import hash_file
from proper.run_folder import kind_of
from tests.descriptors import sitecustomize

SCOPES = "generate,write,admin"
SHORT = "users,shuffled,rag"
LONG = f"{SHORT},user-majority,groups-shared-e,population-more,oppu,users+rag,static-export,users-int8,per-user-only"
"""Methods with derived data and runs; the long walk, with a trained second seed, is slow."""
TRAINED = [f"zyz{at:02d}vax" for at in range(4)]
"""The marks of the users in the run's data."""
OFFLINE, ONLINE, IMPORTED, TENANT, LEFT, MANY = (f"zyz{at:02d}vax" for at in range(4, 10))
"""The marks of users who are added; the server deletes LEFT during the walk."""
MARKS = [*TRAINED, OFFLINE, ONLINE, IMPORTED, TENANT, LEFT, MANY]

NOT_WALKED = {
    "demo": "is 'run' on data that it writes to data/, as the walk does",
    "keys open": "removes files that name no user",
    "move-state": "writes what it reads to where it is searched; tests/databases/test_moving.py",
    **dict.fromkeys(["groups refresh", "groups rollback"], "take no run with tenants; tests/enrolment/test_refresh.py"),
    **dict.fromkeys(["users list", "users show", "check"], "reads"),
}
ELSEWHERE = ("data", "bench", "backbones", "simulate")
"""Commands, and groups of them, that work in folders of their own."""
NOT_MADE = {
    "predictions/*.lamp.json": "in LaMP runs only",
    "variants/data/*.sqlite.between": "while derived data is made",
    "users/blobs/*": "adapters, which the search for their bytes finds",
    "compare-*.csv": "figures of two runs; users are on the page beside it",
    "users/users.lock": "empty",
    "users/fits.lock": "empty",
    "users/cache/*": "with object storage only",
    "users/fits/**": "during a fit",
    "users/quarantine/**": "from a repair to the next deletion",
}
"""Patterns of files with users' data in which the walk leaves nothing of a user, and why or when."""


@dataclass(frozen=True)
class Walk:
    """A run folder, the methods that are evaluated, and every command that was run, without its arguments."""

    run: Path
    methods: str = SHORT
    commands: set[str] = field(default_factory=set)

    def proper(self, command: str, *arguments: str | Path) -> str:
        """Run a command in this process, with the run folder as its first argument; return what it prints."""
        self.commands.add(command)
        with redirect_stdout(io.StringIO()) as printed:
            assert main([*command.split(), *map(str, arguments)]) == 0, command
        return printed.getvalue()


class Careless(sqlite3.Connection):
    """A connection of an SQLite that does not overwrite what it deletes unless it is asked to, as many builds."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.execute("PRAGMA secure_delete = OFF")


@pytest.fixture(scope="module", autouse=True)
def careless() -> Iterator[None]:
    """Every connection of this process is `Careless`."""
    with pytest.MonkeyPatch.context() as change:
        change.setattr(sqlite3, "connect", functools.partial(sqlite3.connect, factory=Careless))
        yield


@pytest.fixture(scope="module", autouse=True)
def misuse(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The file in which this process and all that it starts record what `sitecustomize` describes."""
    report = tmp_path_factory.mktemp("descriptors") / "report"
    with pytest.MonkeyPatch.context() as change:
        change.setenv(sitecustomize.NAME, str(report))
        change.setenv("PYTHONPATH", str(Path(sitecustomize.__file__).parent), prepend=os.pathsep)
        sitecustomize.watch()
        yield report


@pytest.fixture(scope="module", params=[SHORT, pytest.param(LONG, marks=pytest.mark.slow)], ids=["short", "long"])
def walk(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, backbone_folder: Path, misuse: Path
) -> Walk:
    """The whole walk; tests that change its folder copy it."""
    place = tmp_path_factory.mktemp("walk")
    walk = Walk(place / "run", request.param)
    seeds = [0] if walk.methods == SHORT else [0, 1]
    walk.proper("run", marked_data(place, walk.run, seeds, backbone_folder), "--out", walk.run)
    shutil.copytree(walk.run, place / "other")
    if len(seeds) == 1:  # A further seed is a run folder with the data of the first.
        shutil.copytree(place / "other", walk.run / "seeds" / "1", ignore=shutil.ignore_patterns("data", "data.sqlite"))
    tenants = ("", "acme")
    keys = {each: walk.proper("keys add", walk.run, "--tenant", each, "--scopes", SCOPES).strip() for each in tenants}
    with serving(walk) as url:
        evaluate(walk, place / "other")
        teach_offline(walk, place)
        teach_online(url, keys)
    walk.proper("report", walk.run)
    walk.proper("users check", walk.run, "--repair")
    walk.proper("keys revoke", walk.run, walk.proper("keys list", walk.run).split()[0])
    return walk


def name(mark: str) -> str:
    """The id of a user, one that has to be escaped in JSON, HTML, URLs and file names."""
    return f"{mark} <ü>&'/🦊"


def texts(mark: str, count: int = 4) -> list[dict[str, str]]:
    """Interactions of a user."""
    return [{"input": f"{mark} says {at} {mark}", "output": "money now"} for at in range(count)]


def marked_data(place: Path, run: Path, seeds: list[int], backbone: Path) -> Path:
    """Write the demo's data with marks to the run folder, as `proper demo` does, and beside it; return a config."""
    settings = DemoSettings(users=len(TRAINED), groups=2, items=(6, 7))
    data = write_demo(run / "data", settings)
    rows = [json.loads(line) for line in data.read_text("utf-8").splitlines()]
    marks = dict(zip(dict.fromkeys(row["user_id"] for row in rows), TRAINED, strict=True))
    truth = (run / "data" / "truth.json").read_text("utf-8")
    for user, mark in marks.items():
        truth = truth.replace(f'"{user}', json.dumps(name(mark))[:-1])
    (run / "data" / "truth.json").write_text(truth, "utf-8")
    for row in rows:
        mark = marks[row["user_id"]]
        item = row["item_id"].replace(row["user_id"], name(mark))
        row |= {"user_id": name(mark), "input": f"{mark} {row['input']} {mark}", "item_id": item}
    rows += [row | {"item_id": f"{row['item_id']} again"} for row in rows[::3]]  # duplicates, which are dropped
    for path in (data, place / data.name):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    raw = demo_config(place / data.name, settings)
    raw["split"] |= {"target_users": len(TRAINED), "min_history": 2}
    short = {"max_tokens": 300, "epochs": 1}
    raw |= {
        "population": short,
        "groups": short | {"experts": 2, "rank": 3, "layers": 1, "user_embedding": 16},
        "compute": {"max_length": 64},
        "backbone": str(backbone),
    }
    raw |= {"users": {"epochs": 1, "rank": 2, "layers": 1, "tiers": {"select": False}}}
    raw |= {"evaluation": {"methods": ["users"], "seeds": seeds, "resamples": 100}}
    (place / "config.yaml").write_text(yaml.safe_dump(raw), "utf-8")
    return place / "config.yaml"


@contextmanager
def serving(walk: Walk) -> Iterator[str]:
    """Run the server and its worker as processes while the block runs; yields the URL."""
    walk.commands.add("serve")
    command = [sys.executable, "-m", "proper", "serve", str(walk.run), "--port", "0", "--rows", "2"]
    log = walk.run.with_name("serve.log")
    with log.open("wb") as stderr, subprocess.Popen(command, stderr=stderr) as server:
        try:
            while not (found := re.search(r"on (http://\S+)", log.read_text("utf-8"))):
                assert server.poll() is None, log.read_text("utf-8")
                time.sleep(0.1)
            yield found[1]
            server.send_signal(signal.SIGTERM)
            assert server.wait(60) == 0
        finally:
            server.kill()


def evaluate(walk: Walk, other: Path) -> None:
    """Evaluate with derived runs and data, again without some predictions, and write all pages."""
    walk.proper("evaluate", walk.run, "--methods", walk.methods)
    (walk.run / "predictions" / "shuffled.json").unlink()
    walk.proper("evaluate", walk.run, "--methods", walk.methods)
    walk.proper("report", walk.run, *(word for mark in TRAINED for word in ("--user", name(mark))))
    walk.proper("report", walk.run, "--compare", other)


def teach_offline(walk: Walk, place: Path) -> None:
    """Enrol, update, ask, export and import by the command line, beside the server."""

    def rows(mark: str, **more: str) -> Path:
        file, dated = place / f"{mark}.jsonl", {"timestamp": "2024-01-01", **more}
        file.write_text("".join(json.dumps(row | dated) + "\n" for row in texts(mark)), "utf-8")
        return file

    walk.proper("users enrol", walk.run, "--user", name(OFFLINE), "--input", rows(OFFLINE))
    walk.proper("users enrol", walk.run, "--input", rows(MANY, user_id=name(MANY)))
    walk.proper("users update", walk.run)
    walk.proper("users update", walk.run, "--user", name(OFFLINE), "--input", rows(OFFLINE, output="sport now"))
    walk.proper("users drift", walk.run)
    walk.proper("generate", walk.run, "--user", name(OFFLINE), "--prompt", f"{OFFLINE}?")
    walk.proper("users export", walk.run, "--user", name(TRAINED[0]), "--out", place / "user")
    walk.proper("users export", walk.run, "--user", name(TRAINED[0]), "--out", place / "peft", "--format", "peft")
    for force in ((), ("--force",)):
        walk.proper("users import", walk.run, place / "user", "--user", name(IMPORTED), *force)
    # An import always makes a version, an update only one that is better.
    walk.proper("users rollback", walk.run, "--user", name(IMPORTED))
    walk.proper("users export", walk.run, "--all", "--out", place / "all", "--format", "peft")
    walk.proper("users archive", walk.run, "--user", name(OFFLINE), "--out", place / "archive.zip")
    walk.proper("groups show", walk.run)
    walk.proper("export-backbone", walk.run, "--out", place / "backbone")


def teach_online(url: str, keys: Mapping[str, str]) -> None:
    """Enrol users of two tenants, add feedback of a user of the run, wait for all fits, ask, delete one user."""
    with httpx.Client(base_url=url, timeout=120) as client:

        def ask(tenant: str, method: str, path: str, body: Any = None) -> Any:
            reply = client.request(method, path, json=body, headers={"Authorization": f"Bearer {keys[tenant]}"})
            assert reply.status_code == 200, reply.text
            return reply.json()

        def fitted(tenant: str, mark: str) -> None:
            while (state := ask(tenant, "GET", urls[mark])["fit"]["state"]) in ("queued", "fitting"):
                time.sleep(0.1)
            assert state == "done"

        taught = {ONLINE: "", TENANT: "acme", LEFT: "acme", TRAINED[1]: ""}
        urls = {mark: f"/v1/users/{quote(name(mark), safe='')}" for mark in taught}
        for mark in (ONLINE, TENANT, LEFT):
            ask(taught[mark], "POST", "/v1/users", {"user": name(mark), "interactions": texts(mark)})
        ask("", "POST", f"{urls[TRAINED[1]]}/interactions", {"interactions": texts(TRAINED[1])})
        for mark, tenant in taught.items():
            fitted(tenant, mark)
            asked = {"model": "run", "user": name(mark), "max_tokens": 2}
            ask(tenant, "POST", "/v1/completions", {**asked, "prompt": f"{mark} asks"})
            message = {"role": "user", "content": f"{mark} asks"}
            ask(tenant, "POST", "/v1/chat/completions", {**asked, "messages": [message]})
        ask("", "POST", f"{urls[ONLINE]}/interactions", {"interactions": [{"input": ONLINE, "output": "sport now"}]})
        fitted("", ONLINE)
        ask("acme", "DELETE", urls[LEFT])


def forms(mark: str) -> Iterator[bytes]:
    """Yield the bytes that a mark is inside a longer text: as it is, in UTF-16, hexadecimal, and base64."""
    plain = mark.encode()
    yield from (plain, mark.encode("utf-16-le"), plain.hex().encode())
    for before in range(3):
        whole = base64.b64encode(bytes(before) + plain)
        yield whole[(0, 2, 3)[before] : (before + len(plain)) * 8 // 6]


SEARCHED = {form.lower(): mark for mark in MARKS for form in forms(mark)}


def contents(path: Path) -> Iterator[bytes]:
    """Yield a file's bytes, and what they are where they are compressed or divided into pages."""
    raw = path.read_bytes()
    yield raw
    if raw.startswith(b"SQLite format 3\0"):
        with tempfile.TemporaryDirectory() as place:
            for each in (path, path.with_name(f"{path.name}-wal")):
                if each.exists():
                    shutil.copy(each, place)
            with closing(sqlite3.connect(Path(place) / path.name)) as data:
                for (table,) in data.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
                    for row in data.execute(f'SELECT * FROM "{table}"'):
                        yield b"\0".join(each if isinstance(each, bytes) else str(each).encode() for each in row)
    elif raw.startswith(b"\x1f\x8b"):
        yield gzip.decompress(raw)
    elif raw.startswith(b"\x28\xb5\x2f\xfd"):
        yield pa.input_stream(io.BytesIO(raw), compression="zstd").read()
    elif raw.startswith(b"PAR1"):
        yield repr(pq.read_table(io.BytesIO(raw)).to_pylist()).encode()
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            yield from (archive.read(each) for each in archive.namelist())


def search(folder: Path) -> dict[Path, set[str]]:
    """Return the marks in the name and the content of every file, by path relative to the folder."""
    hits = defaultdict[Path, set[str]](set)
    for path in (path for path in folder.rglob("*") if path.is_file()):
        relative = path.relative_to(folder)
        for piece in (str(relative).encode(), *contents(path)):
            lowered = piece.lower()
            if found := {mark for form, mark in SEARCHED.items() if form in lowered}:
                hits[relative] |= found
    return dict(hits)


def tensors(run: Path, marks: list[str]) -> set[bytes]:
    """Return pieces of every embedding and adapter that the stores of a run, its seeds and variants have of users."""
    pieces = list[bytes]()
    for path in run.rglob("users.sqlite"):
        with closing(sqlite3.connect(path)) as store:
            for mark in marks:
                sql = "SELECT embedding, blob, offset, length FROM records WHERE user = ?"
                for embedding, blob, offset, length in store.execute(sql, (name(mark).encode(),)):
                    adapter = (path.parent / "blobs" / blob).read_bytes()[offset:][:length] if blob else b""
                    pieces += (each[at : at + 32] for each in (embedding, adapter) for at in range(0, len(each), 64))
    shared = (run / "groups" / "groups.safetensors").read_bytes()  # some embeddings are still the mean
    return {piece for piece in pieces if len(set(piece)) > 8 and piece not in shared}


def unlisted(hits: Mapping[Path, set[str]]) -> set[Path]:
    """Return the files with hits that the registry does not list as files with users' data."""
    return {path for path in hits if kind_of(path) not in ("personal", "store")}


def test_every_command_is_walked_or_writes_nothing_of_users_into_a_run(walk: Walk) -> None:
    def names(group: Any) -> Iterator[str]:
        for title, command in group.commands.items():
            yield from (f"{title} {each}" for each in names(command)) if hasattr(command, "commands") else [title]

    known = {each for each in names(typer.main.get_command(app)) if each.split()[0] not in ELSEWHERE}
    assert known == {*walk.commands, *NOT_WALKED, "users delete", "users verify-deleted"}


def test_the_registry_lists_every_file_in_which_a_user_is_found(walk: Walk, monkeypatch: pytest.MonkeyPatch) -> None:
    hits = search(walk.run)
    assert not unlisted(hits)
    assert [path for path in files(walk.run) if kind_of(path.relative_to(walk.run)) is None] == []
    assert set.union(*hits.values()) == {*MARKS} - {LEFT}
    # Each entry of the registry counts: without it, the check above fails.
    for kinds in ("Personal", "STORES"):
        listed = tuple(getattr(run_folder, kinds))
        for pattern in set(listed) - set(NOT_MADE):
            with monkeypatch.context() as change:
                change.setattr(run_folder, kinds, tuple(each for each in listed if each != pattern))
                assert unlisted(hits), f"the walk finds no user in {pattern}"


def files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def any_of(pieces: set[bytes], folder: Path) -> list[Path]:
    """Return the files in which any of the pieces is."""
    return [
        path for path in files(folder) if any(piece in content for content in [path.read_bytes()] for piece in pieces)
    ]


def test_nothing_is_left_of_several_deleted_users(walk: Walk, tmp_path: Path) -> None:
    run, gone = shutil.copytree(walk.run, tmp_path / "run"), [*TRAINED[:2], OFFLINE, ONLINE, IMPORTED, MANY]
    here, pieces = Walk(run), tensors(run, gone)
    assert len(pieces) > 50 and any_of(pieces, run)
    names = [word for mark in gone for word in ("--user", name(mark))]
    prints = ("--fingerprints", tmp_path / "prints.json")
    assert main(["users", "verify-deleted", str(run), *names]) == 1
    here.proper("users delete", run, *names, *prints)
    here.proper("users verify-deleted", run, *names, *prints)
    assert set.union(*search(run).values()) == {*MARKS} - {LEFT, *gone}
    assert not any_of(pieces, run)
    (run / "predictions" / "shuffled.json").unlink()
    (run / "data.sqlite").unlink()
    here.proper("run", walk.run.with_name("config.yaml"), "--out", run)
    if walk.methods == LONG:
        here.proper("evaluate", run, "--methods", LONG)
    assert set.union(*search(run).values()) == {*MARKS} - {LEFT, *gone}, "data that is prepared again"


def test_no_process_opens_an_sqlite_file_that_it_has_a_connection_to(walk: Walk, misuse: Path) -> None:
    """Of all commands above, the server and its worker included; and the search for this would find one."""
    assert not misuse.exists(), misuse.read_text()
    with closing(sqlite3.connect(walk.run / "users" / "users.sqlite")) as connection:
        connection.execute("SELECT count(*) FROM records").fetchone()
        hash_file(walk.run / "users" / "users.sqlite")
    assert misuse.read_text().startswith(f"open {walk.run}/users/users.sqlite at ")
    misuse.unlink()


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
