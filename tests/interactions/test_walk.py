"""One walk over every command that writes into a run folder, then a search of every byte of the folder for every user.

Each user has a mark in the id and in every text. A hit in a file that the registry does not list as personal is a
failure, and so is a hit for a user who was deleted.
"""

from __future__ import annotations

import functools
import os
import shutil
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import typer

from proper import run_folder
from proper.cli.app import app, main
from proper.files import hash_file
from proper.run_folder import kind_of
from tests.descriptors import sitecustomize
from tests.interactions.mark_search import any_of, files, search, tensors
from tests.interactions.walk import (
    IMPORTED,
    LEFT,
    LONG,
    MANY,
    MARKS,
    OFFLINE,
    ONLINE,
    SHORT,
    TRAINED,
    Walk,
    name,
    walk_through,
)

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
    return walk_through(tmp_path_factory.mktemp("walk"), request.param, backbone_folder)


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
