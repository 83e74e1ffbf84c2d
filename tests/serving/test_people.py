"""/v1/users over the store: paging, versions, going back, deleting; and what running requests see of it."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest

from proper.adapters.store import AdapterStore
from proper.inference import PersonalizedModel

if TYPE_CHECKING:
    Running = Serve = Any  # tests/serving/conftest.py


@pytest.fixture
def own(serve: Serve, tiny_run: Path, tmp_path: Path) -> Running:
    """A server whose store may be changed."""
    running: Running = serve(shutil.copytree(tiny_run, tmp_path / "tiny"))
    return running


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
        after: dict[str, Any] = {}
        while True:
            page = client.get("/v1/users", params={"limit": 4, **after}).json()
            pages += [card["id"] for card in page["data"]]
            if page["next"] is None:
                break
            after = {"after": page["next"]}
        assert pages == ["a/b c", "group", *(f"u{at}" for at in range(8))]
        assert client.get("/v1/users/a%2Fb%20c").json()["tier"] == "users"
        idle = {"state": "idle", "progress": 0, "phase": None, "message": None, "version": None}
        card = {"id": "u0", "object": "user", "tier": "users", "version": 2}
        assert client.get("/v1/users/u0").json() == {**card, "interactions": 0, "fit": idle}
        assert [one["version"] for one in client.get("/v1/users/u0/versions").json()["data"]] == [2, 1]
        assert answer() == (alone.generate(["Well?"], ["u1"])[0], 2)
        assert client.post("/v1/users/u0/rollback", json={}).json()["version"] == 3
        assert answer() == (alone.generate(["Well?"], ["u0"])[0], 3)
        assert client.post("/v1/users/u0/rollback", json={"to": 99}).status_code == 409
        assert client.delete("/v1/users/u0").json() == {"id": "u0", "object": "user.deleted", "deleted": True}
        for method, path in (("GET", ""), ("GET", "/versions"), ("POST", "/rollback"), ("DELETE", "")):
            reply = client.request(method, f"/v1/users/u0{path}", json={} if method == "POST" else None)
            assert (reply.status_code, reply.json()["error"]["code"]) == (404, "user_not_found")
        assert answer() == (alone.generate(["Well?"], [None])[0], None)


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


def test_what_was_said_is_kept_until_its_person_is_deleted(own: Running) -> None:
    prompt = "A rather longer text: what does it say, and to whom does it say it?"
    with own.client() as client:
        for _ in range(2):
            for user in ("u0", "u1"):
                client.post("/v1/completions", json={"model": "tiny", "prompt": prompt, "user": user})
        both = own.figures()
        assert both["proper_prompt_tokens_reused_total"] > 0 and both["proper_prefix_bytes"] > 0
        client.delete("/v1/users/u0")
        deadline = time.monotonic() + 60
        while own.figures()["proper_prefix_bytes"] != both["proper_prefix_bytes"] / 2:
            assert time.monotonic() < deadline, "still there"


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
