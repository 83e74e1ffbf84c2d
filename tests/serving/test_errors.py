"""Error replies say what is wrong in the API's own form, and never where the server's files lie."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from proper.interactions.log import InteractionLog
from proper.serving.errors import one_line, without_folders, without_places

if TYPE_CHECKING:
    import httpx

    from tests.serving.conftest import Running


def drop(database: Path) -> None:
    """Take a database's tables away under the server's feet."""
    with closing(sqlite3.connect(database)) as connection, connection:
        for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'").fetchall():
            if not name.startswith("sqlite_"):
                connection.execute(f'DROP TABLE "{name}"')


LESSON = {"interactions": [{"input": "x", "output": "y"}]}
Ask = Callable[["httpx.Client"], "httpx.Response"]


@pytest.mark.parametrize(
    ("broken", "ask", "status"),
    [
        (None, lambda client: client.post("/v1/users/u0/rollback", json={"to": 99}), 409),
        ("users.sqlite", lambda client: client.get("/v1/users/u0/versions"), 500),
        ("users.sqlite", lambda client: client.delete("/v1/users/u0"), 500),
        ("interactions.sqlite", lambda client: client.post("/v1/users/u0/interactions", json=LESSON), 500),
    ],
)
def test_no_reply_names_a_folder_of_the_server(own: Running, broken: str | None, ask: Ask, status: int) -> None:
    with own.client() as client:
        client.get("/v1/users/u0")
        if broken is not None:
            drop(own.folder / "users" / broken)
        reply = ask(client)
    assert reply.status_code == status, reply.text
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    assert str(own.folder) not in reply.text and "/" not in reply.text.replace("users/", "")
    if status == 500:
        assert any(str(own.folder) in line for line in own.log), "the log does"


def test_a_failed_fit_names_no_folder_of_the_server(own: Running) -> None:
    with own.client() as client:
        client.post("/v1/users/u0/interactions", json=LESSON)
        log = InteractionLog(own.folder / "users")
        claim = log.queue.take()
        assert claim is not None
        log.queue.fail(claim, f"{own.folder}/users/blobs/x: damaged")
        log.close()
        fit = client.get("/v1/users/u0").json()["fit"]
    assert (fit["state"], fit["message"]) == ("failed", "users/blobs/x: damaged")


def test_paths_within_the_run_stay(tmp_path: Path) -> None:
    run = tmp_path / "a run"
    run.mkdir()
    assert (
        without_folders(f"{run}/users/users.sqlite: damaged; see {run}", run)
        == "users/users.sqlite: damaged; see a run"
    )
    assert without_folders("there is no user '/etc'", run) == "there is no user '/etc'"


def test_a_database_and_a_bucket_are_not_named() -> None:
    lost = 'postgresql://me@db.corp/x (schema y): connection to server at "10.0.0.9", port 5432 failed'
    assert without_places(lost) == "the run's database cannot be used; the server's log has the details"
    torn = "s3://corp-secret/runs/a/users/3.shard: the adapter of user 'u' is missing"
    assert without_places(torn) == "(bucket)/3.shard: the adapter of user 'u' is missing"


def test_a_line_of_the_log_is_one_line() -> None:
    assert one_line("a\nb\r\x1b[2K\u202e\u2028é 😀") == "a\\nb\\r\\x1b[2K\\u202e\\u2028é 😀"
