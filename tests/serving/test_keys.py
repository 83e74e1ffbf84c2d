"""Keys: who gets in where. Tenants x scopes x endpoints as one table."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from proper.adapters.store import AdapterStore
from proper.cli.app import main
from proper.errors import InputError
from proper.serving.keys import FILE, DamagedKeysError, Keys, Principal

if TYPE_CHECKING:
    from tests.serving.conftest import Running, Serve

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
    ("GET", "/v1/users/{user}/archive", None, {"admin"}, True),
    ("POST", "/v1/users/{user}/rollback", {}, {"write", "admin"}, True),
    ("DELETE", "/v1/users/{user}", None, {"admin"}, True),
    ("GET", "/v1/deletions/{deletion}", None, {"admin"}, False),
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
            assert status == (404 if "{" in endpoint[1] else 200), body
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


STATES: dict[str, str | None] = {
    "all revoked": '{"schema": 1, "keys": []}',
    "lost": None,
    "empty": "",
    "cut off": '{"schema": 1, "keys": [{"id": "',
    "not a file of keys": "{}",
    "a list": "[1]",
    "keys of another form": '{"keys": [{"id": 1}]}',
    "not text": "\udcff",
}


def test_a_run_that_has_had_keys_stays_closed(serve: Serve, tiny_run: Path, tmp_path: Path) -> None:
    server = serve(shutil.copytree(tiny_run, tmp_path / "tiny"))
    with server.client() as client:
        assert client.get("/v1/users").status_code == 200, "there has never been a key"
        key, path = server.keys.add("", ["admin"]), server.keys.path
        for name, content in STATES.items():
            path.unlink(missing_ok=True)
            if content is not None:
                path.write_bytes(content.encode("utf-8", "surrogateescape"))
            for headers in ({}, {"Authorization": f"Bearer {key}"}, {"Host": "127.0.0.1:8000"}):
                reply = client.get("/v1/users", headers=headers)
                assert reply.status_code in (401, 503) and str(path) not in reply.text, (name, headers)
            assert Keys(path).required, "also for a server that starts now"
        path.unlink()
        Keys(path).open()
        assert client.get("/v1/users").status_code == 200


def test_damaged_keys_are_named_and_never_written_over(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text("[1")
    for change in (lambda: Keys(path).add("", ["admin"]), lambda: Keys(path).revoke("x"), lambda: Keys(path).open()):
        with pytest.raises(DamagedKeysError, match=r"keys\.json: .*; restore a copy of it, or remove it"):
            change()
    assert path.read_text() == "[1"


@pytest.mark.parametrize("changed", [{"tenant": None}, {"tenant": 7}, {"scopes": "admin"}, {"scopes": ["root"]}])
def test_an_entry_with_a_value_of_another_kind_is_named(tmp_path: Path, changed: dict[str, object]) -> None:
    keys = Keys(tmp_path / "keys.json")
    keys.add("", ["admin"])
    entries = json.loads(keys.path.read_text())["keys"]
    keys.path.write_text(json.dumps({"schema": 1, "keys": [entries[0] | changed]}))
    (key,) = changed
    with pytest.raises(DamagedKeysError, match=rf"keys\.json: keys\.0\.{key}.*: Input should be .*; restore"):
        keys.principals()


def test_keys_of_an_earlier_version_are_remembered(tmp_path: Path) -> None:
    keys = Keys(tmp_path / "serving" / "keys.json")
    keys.add("", ["admin"])
    (tmp_path / "serving" / "keys.required").unlink()
    Keys(keys.path).remember()
    keys.path.unlink()
    assert Keys(keys.path).required
    Keys(tmp_path / "never" / "keys.json").remember()
    assert not Keys(tmp_path / "never" / "keys.json").required


def test_a_run_is_opened_again_on_purpose_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("data: {path: x}\n")
    assert main(["keys", "add", str(tmp_path)]) == 0
    assert main(["keys", "open", str(tmp_path)]) == 2
    assert "there are keys; revoke them first" in capsys.readouterr().err
    keys = Keys(tmp_path / FILE)
    assert main(["keys", "revoke", str(tmp_path), keys.principals()[0].id]) == 0
    assert "no key is left, so every request is refused" in capsys.readouterr().err and keys.required
    assert main(["keys", "open", str(tmp_path)]) == 0 and not keys.required
    modes = {path.stat().st_mode & 0o077 for path in (tmp_path / "serving", *(tmp_path / "serving").iterdir())}
    assert modes == {0}


CHANGE = """
import sys
from pathlib import Path
from proper.serving.keys import Keys
keys, tenant = Keys(Path(sys.argv[1])), sys.argv[2]
sys.stdin.readline()
for number in range(6):
    principal = keys.principal(keys.add(tenant, ["admin"]))
    if number % 2:
        keys.revoke(principal.id)
        assert principal.id not in {each.id for each in keys.principals()}
"""


def test_many_processes_lose_no_key_and_bring_none_back(tmp_path: Path) -> None:
    path, tenants = tmp_path / "keys.json", [f"t{number}" for number in range(6)]
    command = [sys.executable, "-c", CHANGE, str(path)]
    started = [subprocess.Popen([*command, tenant], stdin=subprocess.PIPE, text=True) for tenant in tenants]
    for process in started:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in started:
        process.communicate(timeout=60)
    assert [process.returncode for process in started] == [0] * len(started)
    left = [principal.tenant for principal in Keys(path).principals()]
    assert sorted(left) == sorted(tenants * 3)


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
