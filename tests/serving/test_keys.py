"""Keys: who gets in where. Tenants x scopes x endpoints as one table."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from proper.adapters.store import AdapterStore
from proper.errors import InputError
from proper.serving.keys import FILE, Keys, Principal

if TYPE_CHECKING:
    Running = Serve = Any  # tests/serving/conftest.py

ASK = {"model": "tiny", "prompt": "Well?", "max_tokens": 1}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Well?"}], "max_tokens": 1}
# method, path, body, scopes that open it, whether a user is named
ENDPOINTS: list[tuple[str, str, dict[str, Any] | None, set[str], bool]] = [
    ("POST", "/v1/completions", ASK, {"generate"}, True),
    ("POST", "/v1/chat/completions", CHAT, {"generate"}, True),
    ("GET", "/v1/models", None, {"generate"}, False),
    ("GET", "/v1/models/tiny", None, {"generate"}, False),
    ("GET", "/v1/users", None, {"admin"}, True),
    ("POST", "/v1/users", {"interactions": []}, {"write", "admin"}, True),
    ("POST", "/v1/users/{user}/interactions", {"interactions": []}, {"write", "admin"}, True),
    ("GET", "/v1/users/{user}", None, {"write", "admin"}, True),
    ("GET", "/v1/users/{user}/versions", None, {"write", "admin"}, True),
    ("POST", "/v1/users/{user}/rollback", {}, {"write", "admin"}, True),
    ("DELETE", "/v1/users/{user}", None, {"admin"}, True),
    ("GET", "/metrics", None, {"admin"}, False),
]
OPEN = ["/healthz", "/readyz", "/openapi.json", "/", "/page/main.js"]
ENROL = ("POST", "/v1/users")


@pytest.fixture(scope="module")
def kept(serve: Serve, tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Running, dict[str, str]]:
    """A server with a key of each scope for two tenants; both have a user `u0`, `theirs` has `only` too."""
    folder = shutil.copytree(tiny_run, tmp_path_factory.mktemp("keys") / "tiny")
    store = AdapterStore(folder / "users")
    record = store.get("u0")
    assert record is not None
    theirs = AdapterStore(folder / "users", "theirs")
    for user in ("u0", "only"):
        theirs.put([type(record)(user, "users", record.embedding, record.adapter)])
    store.close()
    theirs.close()
    keys = Keys(folder / FILE)
    made = {f"{tenant}:{scope}": keys.add(tenant, [scope]) for tenant in ("", "theirs") for scope in _scopes()}
    return serve(folder), made


def _scopes() -> tuple[Any, ...]:
    return ("generate", "write", "admin")


def send(server: Running, key: str | None, endpoint: Any, user: str, tenant: str | None) -> tuple[int, Any]:
    method, path, body, _, _ = endpoint
    parameters = {}
    if (method, path) == ENROL:
        body = {**body, "user": user, **({"tenant": tenant} if tenant is not None else {})}
    elif tenant is not None and "users" in path:
        parameters = {"tenant": tenant}
    if body is not None and "completions" in path:
        body = {**body, "user": user, **({"proper": {"tenant": tenant}} if tenant is not None else {})}
    with server.client(key) as client:
        reply = client.request(method, path.replace("{user}", user), json=body, params=parameters)
    kind = reply.headers["content-type"]
    return reply.status_code, reply.json() if kind.startswith("application/json") else reply.text


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda e: f"{e[0]} {e[1]}")
def test_the_matrix(kept: tuple[Running, dict[str, str]], endpoint: Any) -> None:
    server, keys = kept
    scopes, names_user = endpoint[3:]
    # Whoever is enrolled is somebody afterwards.
    nobody = "newcomer" if endpoint[:2] == ENROL else "nobody"
    status, body = send(server, None, endpoint, nobody, None)
    assert (status, body["error"]["type"]) == (401, "authentication_error")
    assert send(server, "proper-wrong", endpoint, nobody, None)[0] == 401
    for name, key in keys.items():
        tenant, _, scope = name.partition(":")
        status, body = send(server, key, endpoint, nobody, None)
        if scope not in scopes:
            assert (status, body["error"]["code"]) == (403, "scope")
            continue
        if endpoint[:2] == ENROL:
            assert status == (200 if scope == "write" else 409), "once in each tenant"
        else:
            assert status == (404 if "{user}" in endpoint[1] else 200), body
        if names_user:
            other = "" if tenant else "theirs"
            replies = [send(server, key, endpoint, user, other) for user in ("only", "u0", "nobody")]
            assert {status for status, _ in replies} == {403}
            assert replies[0] == replies[1] == replies[2], "nothing tells whether the user exists"
            assert send(server, key, endpoint, nobody, tenant)[0] != 403
    if endpoint[:2] == ENROL:
        for tenant in ("", "theirs"):
            leave = ("DELETE", "/v1/users/{user}", None, ..., ...)
            assert send(server, keys[f"{tenant}:admin"], leave, nobody, None)[0] == 200


def test_the_matrix_is_of_all_routes(kept: tuple[Running, dict[str, str]]) -> None:
    server, _ = kept
    with server.client() as client:
        paths = client.get("/openapi.json").json()["paths"]
        assert {client.get(path).status_code for path in OPEN} == {200}
    known = {(method, path.replace("tiny", "{name}")) for method, path, *_ in ENDPOINTS}
    assert {(method.upper(), path) for path, methods in paths.items() for method in methods} - known == {
        ("GET", "/healthz"),
        ("GET", "/readyz"),
    }


def test_a_user_belongs_to_the_keys_tenant(kept: tuple[Running, dict[str, str]]) -> None:
    server, keys = kept
    tiers = {}
    for tenant in ("", "theirs"):
        with server.client(keys[f"{tenant}:generate"]) as client:
            reply = client.post("/v1/completions", json={**ASK, "user": "only"}).json()
        tiers[tenant] = reply["proper"]["tier"]
        with server.client(keys[f"{tenant}:admin"]) as client:
            tiers[f"{tenant} list"] = [card["id"] for card in client.get("/v1/users").json()["data"]]
    assert tiers["theirs"] == "users" and tiers[""] == "none"
    assert tiers["theirs list"] == ["only", "u0"] and len(tiers[" list"]) == 9


def test_a_revoked_key_stops_at_once(kept: tuple[Running, dict[str, str]]) -> None:
    server, _ = kept
    key = server.keys.add("", ["generate"])
    with server.client(key) as client:
        assert client.get("/v1/models").status_code == 200
        Keys(server.folder / FILE).revoke(server.keys.principals()[-1].id)
        assert client.get("/v1/models").status_code == 401


def test_only_hashes_are_kept(tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys.json")
    assert len(keys) == 0 and keys.principal("x") is None
    key = keys.add("acme", ["write", "generate"])
    text = keys.path.read_text(encoding="utf-8")
    assert key not in text and key.removeprefix("proper-") not in text
    assert keys.path.stat().st_mode & 0o077 == 0
    (held,) = Keys(keys.path).principals()
    assert keys.principal(key) == held == Principal(held.id, "acme", ("generate", "write"))
    with pytest.raises(InputError, match="there is no key 'x'"):
        keys.revoke("x")
    keys.revoke(held.id)
    assert keys.principal(key) is None
    with pytest.raises(InputError, match="scopes: choose from generate, write, admin"):
        keys.add("", [])
