"""/v1/users over the store: paging, versions, going back, deleting; and what running requests see of it."""

from __future__ import annotations

import io
import json
import random
import shutil
import sqlite3
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest

from proper.adapters.store import AdapterStore
from proper.data.values import MAX_ID_LENGTH
from proper.inference import PersonalizedModel
from proper.inference.generate import generate
from proper.interactions.deletion import remove
from proper.interactions.log import InteractionLog
from proper.models.checkpoints import save_tensors
from proper.run_folder import UsersFolder
from proper.serving.routes import users
from proper.state_move import move_state

if TYPE_CHECKING:
    from tests.serving.conftest import Running, Serve


def test_users_are_listed_read_taken_back_and_deleted(own: Running, alone: PersonalizedModel) -> None:
    store = AdapterStore(own.folder / "users")
    other = store.get("u1")
    assert other is not None
    store.put([replace(other, user="u0"), replace(other, user="a/b c")])
    store.close()

    with own.client() as client:

        def answer() -> tuple[str, Any]:
            reply = client.post("/v1/completions", json={"model": "tiny", "prompt": "Well?", "user": "u0"}).json()
            return reply["choices"][0]["text"], reply["proper"].get("version")

        pages: list[str] = []
        cards: dict[str, Any] = {}
        after: dict[str, Any] = {}
        while True:
            page = client.get("/v1/users", params={"limit": 4, **after}).json()
            pages += [card["id"] for card in page["data"]]
            cards |= {card["id"]: card for card in page["data"]}
            if page["next"] is None:
                break
            after = {"after": page["next"]}
        assert pages == ["a/b c", "group", *(f"u{at}" for at in range(8))]
        assert client.get("/v1/users/a%2Fb%20c").json()["tier"] == "users"
        idle = {"state": "idle", "progress": 0, "phase": None, "message": None, "version": None}
        card = {"id": "u0", "object": "user", "tier": "users", "version": 2}
        assert cards["u0"] == card
        assert client.get("/v1/users/u0").json() == {**card, "interactions": 0, "fit": idle}
        assert [one["version"] for one in client.get("/v1/users/u0/versions").json()["data"]] == [2, 1]
        assert answer() == (generate(alone, ["Well?"], ["u1"])[0], 2)
        archive = client.get("/v1/users/u0/archive")
        assert archive.headers["content-type"] == "application/zip"
        with zipfile.ZipFile(io.BytesIO(archive.content)) as content:
            assert [one["version"] for one in json.loads(content.read("versions.json"))] == [2, 1]
        assert client.post("/v1/users/u0/rollback", json={}).json()["version"] == 3
        assert answer() == (generate(alone, ["Well?"], ["u0"])[0], 3)
        assert client.post("/v1/users/u0/rollback", json={"to": 99}).status_code == 409
        assert (
            client.post("/v1/users/u0/rollback", json={"to": True}).json()["error"]["message"]
            == "to: should be a number"
        )
        assert client.delete("/v1/users/u0").json() == {"id": "u0", "object": "user.deleted", "deleted": True}
        for method, path in (
            ("GET", ""),
            ("GET", "/versions"),
            ("GET", "/archive"),
            ("POST", "/rollback"),
            ("DELETE", ""),
        ):
            reply = client.request(method, f"/v1/users/u0{path}", json={} if method == "POST" else None)
            assert (reply.status_code, reply.json()["error"]["code"]) == (404, "user_not_found")
        assert answer() == (generate(alone, ["Well?"], [None])[0], None)


@pytest.mark.parametrize(
    "user", ["x/versions", "x/rollback", "x/interactions", "a b/ü?#%2F🎈", "versions", "%2E", "a+b"]
)
def test_any_id_is_one_segment(own: Running, user: str) -> None:
    store = AdapterStore(own.folder / "users")
    plain = store.get("group")
    assert plain is not None
    store.put([replace(plain, user=user), replace(plain, user="x"), replace(plain, user="x")])
    store.close()
    url = f"/v1/users/{quote(user, safe='')}"
    with own.client() as client:
        assert client.get(url).json()["id"] == user
        assert len(client.get(f"{url}/versions").json()["data"]) == 1
        assert client.post(f"{url}/rollback", json={}).json()["error"]["code"] == "no_version"
        assert client.post(f"{url}/interactions", json={"interactions": []}).json()["id"] == user
        assert client.delete(url).json()["id"] == user
        assert client.get(url).status_code == 404
        assert client.get("/v1/users/x").json()["version"] == 2, "and nobody else's"


def test_an_archive_of_a_user_who_is_deleted_meanwhile_is_not_found(
    own: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = users.write_archive

    def late(content: io.BytesIO, store: AdapterStore, log: InteractionLog, user: str) -> None:
        assert not remove(store, log, user).waits
        whole(content, store, log, user)

    monkeypatch.setattr(users, "write_archive", late)
    with own.client() as client:
        reply = client.get("/v1/users/u0/archive")
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "user_not_found")


def test_what_was_said_is_kept_until_its_person_is_deleted(own: Running) -> None:
    prompt = "A rather longer text: what does it say, and to whom does it say it?"
    with own.client() as client:
        for text in (prompt, f"{prompt} And why?"):
            for user in ("u0", "u1"):
                client.post("/v1/completions", json={"model": "tiny", "prompt": text, "user": user})
        both = own.figures()
        assert both["proper_prompt_tokens_reused_total"] > 0 and both["proper_prefix_bytes"] > 0
        client.delete("/v1/users/u0")
        deadline = time.monotonic() + 60
        while own.figures()["proper_prefix_bytes"] != both["proper_prefix_bytes"] / 2:
            assert time.monotonic() < deadline, "still there"


def test_a_deletion_that_has_to_wait_is_202_and_says_when_it_is_done(own: Running) -> None:
    secret = "zyzzyva of u0"
    with own.client() as client:
        lesson = {"input": secret, "output": "y"}
        assert client.post("/v1/users/u0/interactions", json={"interactions": [lesson]}).status_code == 200
        with closing(sqlite3.connect(own.folder / "users" / "interactions.sqlite", isolation_level=None)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM interactions").fetchone()
            reply = client.delete("/v1/users/u0")
            assert (reply.status_code, reply.json()["state"]) == (202, "running")
            place = reply.headers["location"]
            assert client.get(place).json() == reply.json()
            assert client.delete("/v1/users/u0").json() == reply.json(), "the same deletion"
            again = client.post("/v1/users", json={"user": "u0", "interactions": [lesson]})
            assert (again.status_code, again.json()["error"]["code"]) == (409, "deletion_running")
        wait_for(lambda: client.get(place).json()["state"] == "done")
        assert not [path for path in own.folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
        assert client.get("/v1/deletions/none").json()["error"]["code"] == "deletion_not_found"
        assert client.post("/v1/users", json={"user": "u0", "interactions": [lesson]}).status_code == 200


def test_a_server_forgets_whom_another_process_deletes(own: Running) -> None:
    prompt = "A rather longer text: what does it say, and to whom does it say it?"
    with own.client() as client:
        client.post("/v1/completions", json={"model": "tiny", "prompt": prompt, "user": "u0"})
        figures = own.figures()
        assert figures["proper_slots_resident"] == 1 and figures["proper_prefix_bytes"] > 0
        command = [sys.executable, "-m", "proper", "users", "delete", str(own.folder), "--user", "u0"]
        assert subprocess.run(command, check=False, capture_output=True).returncode == 0
        wait_for(lambda: own.figures()["proper_slots_resident"] == 0 and own.figures()["proper_prefix_bytes"] == 0)


def wait_for(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_id_that_is_no_text(own: Running) -> None:
    with own.client() as client:
        assert client.get("/v1/users/%ff").json()["error"]["message"] == "user: not UTF-8"
        assert client.get("/v1/users/a/b").status_code == 404


def test_a_damaged_adapter_is_said_in_reply_and_figures(own: Running) -> None:
    for blob in (own.folder / "users" / "blobs").iterdir():
        blob.write_bytes(bytes(blob.stat().st_size))
    with own.client() as client:
        reply = client.post("/v1/completions", json={"model": "tiny", "prompt": "Well?", "user": "u0"})
    assert reply.json()["proper"] == {"tier": "groups", "version": 1, "fallback": "damaged adapter"}
    figures = own.figures()
    assert figures["proper_damaged_adapters_total"] == 1 and figures["proper_fallbacks_total"] == 1


def test_a_run_without_users_says_so(serve: Serve, tiny_run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_run, tmp_path / "tiny")
    for stage in ("users", "groups"):
        (folder / stage / "stage.json").unlink()
    running = serve(folder)
    with running.client() as client:
        reply = client.post("/v1/completions", json={"model": "tiny", "prompt": "Well?", "user": "u0"}).json()
        assert reply["proper"] == {"tier": "population"}
        assert client.get("/v1/users").json()["error"]["code"] == "no_users"


def test_a_user_whom_a_refresh_trains_on_is_deleted_later(own: Running) -> None:
    paths = UsersFolder(own.folder / "users")
    save_tensors(paths.refresh, {}, {})  # as a refresh of the groups has it until its commit
    with own.client() as client:
        reply = client.delete("/v1/users/u0")
        assert (reply.status_code, reply.json()["error"]["code"]) == (409, "training_running")
        assert str(own.folder) not in reply.text and client.get("/v1/users/u0").status_code == 200
        shutil.rmtree(paths.work)
        assert client.delete("/v1/users/u0").status_code == 200


def test_text_that_the_database_cannot_hold_is_refused(
    serve: Serve, tiny_run: Path, tmp_path: Path, postgresql: str
) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "tiny"))
    move_state(run, postgresql)
    nul = [{"input": "a\0b", "output": "y"}]
    with serve(run).client() as client:
        replies = [
            client.post("/v1/users/u0/interactions", json={"interactions": nul}),
            client.post("/v1/users", json={"user": "new", "interactions": nul}),
        ]
        assert [reply.status_code for reply in replies] == [400, 400], [reply.text for reply in replies]
        assert all("NUL" in reply.text and "postgresql://" not in reply.text for reply in replies)
        assert client.get("/v1/deletions/%00").status_code == 404
        draw = random.Random(0)  # an id of random characters, so that it cannot be compressed
        user, name = ("".join(chr(draw.randint(0x20000, 0x2A000)) for _ in range(MAX_ID_LENGTH)) for _ in range(2))
        long = {"user": user, "interactions": [{"id": name, "input": "x", "output": "y"}]}
        reply = client.post("/v1/users", json=long)
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid"), reply.text
        assert client.get("/v1/users/new").status_code == 404 and client.get("/v1/users/u0").status_code == 200
