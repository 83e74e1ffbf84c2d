"""The whole life of a run with its state in PostgreSQL: trained, evaluated, served, updated, rolled back, deleted."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from proper.cli.app import main
from proper.data.demo import DemoSettings, demo_config, write_demo
from tests.s3_server import S3Server

PEOPLE = DemoSettings(users=20, items=(10, 12))
SHORT = {"max_tokens": 600, "epochs": 1}
SETTINGS: dict[str, Any] = {
    "population": SHORT,
    "groups": {**SHORT, "experts": 3},
    "users": {"steps": 4, "slots": 3, "tiers": {"select": False}},
    "evaluation": {"methods": ["groups", "users"], "resamples": 100, "seeds": [0]},
}


def proper(*arguments: str | Path, code: int = 0) -> str:
    """Run a command in this process and return what it prints."""
    with redirect_stdout(io.StringIO()) as printed:
        assert main([str(each) for each in arguments]) == code, arguments
    return printed.getvalue()


@contextmanager
def serving(run: Path) -> Iterator[httpx.Client]:
    """Serve a run, with the worker that fits users, in processes of their own."""
    command = [sys.executable, "-m", "proper", "serve", str(run), "--port", "0", "--rows", "2"]
    log = run.with_name("serve.log")
    with log.open("wb") as stderr, subprocess.Popen(command, stderr=stderr) as server:
        try:
            while not (found := re.search(r"on (http://\S+)", log.read_text("utf-8"))):
                assert server.poll() is None, log.read_text("utf-8")
                time.sleep(0.1)
            with httpx.Client(base_url=found[1], timeout=120) as client:
                yield client
            server.send_signal(signal.SIGTERM)
            assert server.wait(60) == 0
        finally:
            server.kill()


def asked(client: httpx.Client, method: str, path: str, body: Any = None, code: int = 200) -> Any:
    reply = client.request(method, path, json=body)
    assert reply.status_code == code, reply.text
    return reply.json()


def fitted(client: httpx.Client, user: str) -> None:
    while (state := asked(client, "GET", f"/v1/users/{user}")["fit"]["state"]) in ("queued", "fitting"):
        time.sleep(0.1)
    assert state == "done"


def told(user: str, label: str, count: int = 6) -> list[dict[str, str]]:
    return [{"id": f"{user}-{at}", "input": f"{user} noted marmalade {at}", "output": label} for at in range(count)]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("adapters", ["folder", "bucket"])
def test_life(adapters: str, postgresql: str, tmp_path: Path, s3: S3Server) -> None:
    run, rows = tmp_path / "run", write_demo(tmp_path / "rows", PEOPLE)
    raw = {**demo_config(rows, PEOPLE), **SETTINGS}
    raw["split"] |= {"target_users": 4, "min_history": 5}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw), "utf-8")
    stores = ["--store", postgresql]
    if adapters == "bucket":
        stores += ["--store", f"s3://{s3.new_bucket(versioned=True)}/run"]
    proper("run", tmp_path / "config.yaml", "--out", run, *stores)
    listed = [line.split("\t")[0] for line in proper("users", "list", run).splitlines()]
    leaves, stays, gone = listed[0], listed[1], "new-noter"
    label = json.loads(rows.read_text("utf-8").partition("\n")[0])["output"]
    key = proper("keys", "add", run, "--scopes", "generate,write,admin").strip()
    with serving(run) as client:
        client.headers["Authorization"] = f"Bearer {key}"
        prompt = {"model": "run", "prompt": "A note\nTag:", "max_tokens": 4}
        before = asked(client, "POST", "/v1/completions", {**prompt, "user": stays})
        asked(client, "POST", "/v1/users", {"user": gone, "interactions": told(gone, label)})
        asked(client, "POST", f"/v1/users/{leaves}/interactions", {"interactions": told(leaves, label)})
        for user in (gone, leaves):
            fitted(client, user)
            asked(client, "POST", "/v1/completions", {**prompt, "user": user})
        fresh = {"user": "brief", "interactions": told("brief", label, 2)}
        asked(client, "POST", "/v1/users", fresh)
        fitted(client, "brief")
        asked(client, "DELETE", "/v1/users/brief")
        asked(client, "GET", "/v1/users/brief", code=404)
        assert asked(client, "POST", "/v1/completions", {**prompt, "user": stays})["choices"] == before["choices"]
    again = tmp_path / "again.jsonl"
    again.write_text("".join(json.dumps(row | {"id": f"{row['id']}b"}) + "\n" for row in told(leaves, label)), "utf-8")
    proper("users", "update", run, "--user", leaves, "--input", again)
    proper("users", "update", run)
    proper("users", "drift", run)
    shown = json.loads(proper("users", "show", run, "--user", leaves, "--json"))
    assert shown["interactions"]
    proper("users", "export", run, "--user", stays, "--out", tmp_path / "user")
    for force in ((), ("--force",)):
        proper("users", "import", run, tmp_path / "user", "--user", "imported", *force)
    versions = json.loads(proper("users", "show", run, "--user", "imported", "--json"))["versions"]
    proper("users", "rollback", run, "--user", "imported")
    assert len(versions) == 2
    proper("users", "archive", run, "--user", leaves, "--out", tmp_path / "archive.zip")
    with zipfile.ZipFile(tmp_path / "archive.zip") as archive:
        assert b"marmalade" in b"".join(archive.read(each) for each in archive.namelist())
    proper("report", run, "--user", leaves)
    proper("evaluate", run, "--methods", "users")
    prints = tmp_path / "prints.json"
    names = ("--user", leaves, "--user", gone)
    proper("users", "verify-deleted", run, *names, code=1)
    proper("users", "delete", run, *names, "--fingerprints", prints)
    proper("users", "verify-deleted", run, *names, "--fingerprints", prints)
    proper("users", "check", run)
    left = {line.split("\t")[0] for line in proper("users", "list", run).splitlines()}
    assert left == {*listed[1:], "imported"}
    proper("run", tmp_path / "config.yaml", "--out", run, *stores)
    assert leaves not in proper("users", "list", run)
    proper("generate", run, "--user", stays, "--prompt", "A note\nTag:")
    files = {path.name for path in run.rglob("*") if path.is_file()}
    assert not {"interactions.sqlite", "keys.json"} & files and not (run / "users" / "users.sqlite").exists()
    assert not (run / "tombstones").exists()
