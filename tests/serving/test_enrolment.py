"""New people over HTTP: taken in once, on the disk before the reply, refused in one line; tenants apart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from proper.config import make_config
from proper.data.dataset import prepare
from proper.interactions.log import InteractionLog

if TYPE_CHECKING:
    from tests.serving.conftest import Running, Serve

QUEUED = {"state": "queued", "progress": 0, "phase": None, "message": None, "version": None}
HISTORY = [
    {"id": "1", "input": "The bus was late.", "output": "bus", "timestamp": "2024-05-01T10:00:00Z"},
    {"input": "A fine soup.", "output": "food"},
]


@pytest.fixture(scope="module")
def own(serve: Serve, tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Running:
    running: Running = serve(shutil.copytree(tiny_run, tmp_path_factory.mktemp("enrol") / "tiny"))
    return running


def enrol(running: Running, user: str, interactions: list[dict[str, Any]], **more: Any) -> Any:
    with running.client() as client:
        return client.post("/v1/users", json={"user": user, "interactions": interactions, **more})


def test_enrol_append_read_list_and_delete(own: Running) -> None:
    assert enrol(own, "ann/a", HISTORY).json() == {
        **{"id": "ann/a", "tier": "none", "version": None, "accepted": 2, "duplicates": 0, "fit": QUEUED}
    }
    log = InteractionLog(own.folder / "users")
    first, second = log.interactions("", "ann/a")
    assert (first.id, first.prompt, first.target, first.time) == ("1", "The bus was late.", "bus", 1714557600.0)
    assert second.id.startswith("content-") and second.time is None
    with own.client() as client:
        again = client.post(
            "/v1/users/ann%2Fa/interactions", json={"interactions": [*HISTORY, {**HISTORY[1], "id": "2"}]}
        )
        assert (again.json()["accepted"], again.json()["duplicates"]) == (1, 2)
        said = client.get("/v1/users/ann%2Fa").json()
        assert said == {
            **{"id": "ann/a", "object": "user", "tier": "none", "version": None, "interactions": 3, "fit": QUEUED}
        }
        page = client.get("/v1/users", params={"limit": 2}).json()
        assert [card["id"] for card in page["data"]] == ["ann/a", "group"] and page["next"] == "group"
        assert client.delete("/v1/users/ann%2Fa").status_code == 200
        assert client.get("/v1/users/ann%2Fa").status_code == 404
    assert log.count("", "ann/a") == 0
    log.close()


def test_one_who_is_there_is_not_new(own: Running) -> None:
    for user in ("u0", "group"):
        reply = enrol(own, user, HISTORY)
        assert (reply.status_code, reply.json()["error"]["code"]) == (409, "user_exists")
    nobody = enrol(own, "empty", []).json()
    assert nobody["fit"] == {**QUEUED, "state": "idle"} and nobody["tier"] == "none"
    assert enrol(own, "empty", []).json()["error"]["code"] == "user_exists"


def test_another_content_under_an_id_is_a_conflict(own: Running) -> None:
    assert enrol(own, "bo", HISTORY).status_code == 200
    with own.client() as client:
        changed = [HISTORY[1], {**HISTORY[0], "output": "train"}]
        reply = client.post("/v1/users/bo/interactions", json={"interactions": changed})
        error = reply.json()["error"]
        assert (reply.status_code, error["code"], error["param"]) == (409, "interaction_conflict", "interactions.1.id")
        assert "'1'" in error["message"]
        assert client.get("/v1/users/bo").json()["interactions"] == 2
        unknown = client.post("/v1/users/nobody/interactions", json={"interactions": HISTORY})
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "user_not_found")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"user": "cy", "interactions": [HISTORY[0], {"input": " ", "output": "x"}]}, "interactions.1.input: empty"),
        ({"user": "cy", "interactions": [{"input": "x", "output": ""}]}, "interactions.0.output: empty"),
        ({"user": "cy", "interactions": [{"input": "x"}]}, "interactions.0.output: "),
        ({"user": "cy", "interactions": [{**HISTORY[0], "timestamp": "soon"}]}, "'soon' is not a time"),
        ({"user": "cy", "interactions": [{**HISTORY[0], "id": " "}]}, "interactions.0.id: "),
        ({"user": "cy", "interactions": [{**HISTORY[0], "outptu": "x"}]}, "interactions.0.outptu: "),
        ({"user": "", "interactions": []}, "user: "),
        ({"user": "..", "interactions": []}, "user: this id cannot be part of a URL"),
        ({"user": "undefined", "interactions": []}, "user 'undefined': this stands for a missing id"),
        ({"user": "cy"}, "interactions: "),
    ],
)
def test_a_bad_body_is_one_clear_line_and_leaves_nothing(own: Running, body: dict[str, Any], said: str) -> None:
    with own.client() as client:
        reply = client.post("/v1/users", json=body)
        assert reply.status_code == 400, reply.text
        message = reply.json()["error"]["message"]
        assert said in message and "\n" not in message
        assert client.get("/v1/users/cy").status_code == 404


def test_a_time_is_a_number_or_text(own: Running) -> None:
    with own.client() as client:
        for at, time in enumerate(("2025-03-01", 1740787200, 1740787200.0, "1740787200", 1740787200000)):
            rows = [{"input": "x", "output": "y", "timestamp": time}]
            path, body = ("/v1/users/di/interactions", {}) if at else ("/v1/users", {"user": "di"})
            reply = client.post(path, json={**body, "interactions": rows})
            assert (reply.status_code, reply.json().get("duplicates")) == (200, min(at, 1)), (time, reply.text)
        for wrong in (True, [1], {}, 1e300, "9" * 65):
            rows = [{"input": "x", "output": "y", "timestamp": wrong}]
            reply = client.post("/v1/users/di/interactions", json={"interactions": rows})
            assert reply.status_code == 400 and "interactions.0.timestamp: " in reply.json()["error"]["message"], wrong


def test_an_output_is_one_of_the_labels_of_the_runs_data(serve: Serve, tiny_run: Path, tmp_path: Path) -> None:
    run, config = Path(shutil.copytree(tiny_run, tmp_path / "tiny")), tmp_path / "tiny" / "config.yaml"
    raw = {**yaml.safe_load(config.read_text("utf-8")), "task": {"kind": "classification"}}
    config.write_text(yaml.safe_dump(raw), "utf-8")
    rows = [{"user_id": f"u{at % 4}", "input": f"a{at}", "output": ("plane", "train")[at % 2]} for at in range(80)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    settings = make_config({**raw, "data": {"path": str(tmp_path / "rows.jsonl"), "time": None}})
    prepare(settings, run / "data.sqlite", lambda prompts, targets: [1] * len(prompts)).close()
    with serve(run).client() as client:
        rows = [{"input": "x", "output": each} for each in ("train", "trian")]
        for path, body in (("/v1/users", {"user": "bo"}), ("/v1/users/u1/interactions", {})):
            reply = client.post(path, json={**body, "interactions": rows})
            why = "interactions.1.output: 'trian' is none of the task's labels; did you mean 'train'?"
            assert (reply.status_code, reply.json()["error"]["message"]) == (400, why)
            assert client.post(path, json={**body, "interactions": rows[:1]}).json()["accepted"] == 1


def test_tenants_and_scopes(serve: Serve, tiny_run: Path, tmp_path: Path) -> None:
    running = serve(shutil.copytree(tiny_run, tmp_path / "tiny"))
    acme, other = (running.keys.add(tenant, ["write"]) for tenant in ("acme", "other"))
    reader = running.keys.add("acme", ["generate"])
    body = {"user": "ann", "interactions": HISTORY}
    with running.client(acme) as client:
        assert client.post("/v1/users", json=body).json()["accepted"] == 2
        assert client.post("/v1/users", json={**body, "tenant": "other"}).json()["error"]["code"] == "tenant"
    with running.client(other) as client:
        assert client.get("/v1/users/ann").status_code == 404
        assert client.post("/v1/users/ann/interactions", json={"interactions": HISTORY}).status_code == 404
        assert client.get("/v1/users/ann", params={"tenant": "acme"}).status_code == 403
        assert client.post("/v1/users", json={**body, "tenant": "other"}).json()["accepted"] == 2
    with running.client(reader) as client:
        for path in ("/v1/users", "/v1/users/ann/interactions"):
            assert client.post(path, json=body).json()["error"]["code"] == "scope"
