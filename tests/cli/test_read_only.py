"""A copy of a run that cannot be written: what reads works, what writes says so in one line and changes nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

COMMANDS = """
import contextlib, io, json, sys
from proper.cli.app import main
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""
READING = (
    ["users", "list", "{run}"],
    ["users", "show", "{run}", "--user", "u0"],
    ["users", "check", "{run}"],
    ["users", "verify-deleted", "{run}", "--user", "nobody"],
    ["keys", "list", "{run}"],
    ["generate", "{run}", "--user", "u0", "--prompt", "Well?", "--max-new-tokens", "2"],
)
WRITING = (
    ["users", "check", "{run}", "--repair"],
    ["users", "delete", "{run}", "--user", "u0"],
    ["users", "rollback", "{run}", "--user", "u1"],
    ["users", "update", "{run}", "--user", "u1"],
    ["keys", "add", "{run}"],
    ["report", "{run}"],
    ["serve", "{run}", "--port", "0"],
)


@pytest.fixture
def copy(tiny_run: Path, tmp_path: Path, read_only: Callable[[Path, Path], Path]) -> Path:
    from proper.adapters.store import AdapterStore

    source = shutil.copytree(tiny_run, tmp_path / "tiny")
    store = AdapterStore(source / "users")
    record = store.get("u1")
    assert record is not None
    store.put([record])  # there is a version to go back to
    store.close()
    return read_only(source, tmp_path / "copy")


def state(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_commands(copy: Path, unprivileged: list[str]) -> None:
    before = state(copy)
    told = [[word.format(run=copy) for word in words] for words in (*READING, *WRITING)]
    command = [*unprivileged, sys.executable, "-c", COMMANDS, json.dumps(told)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    for words, (code, _, err) in zip(READING, results, strict=False):
        assert code == 0, (words, err)
    assert results[0][1].count("\n") == 9
    for words, (code, out, err) in zip(WRITING, results[len(READING) :], strict=True):
        assert code == 2 and out == "" and err.count("\n") == 1, (words, code, out, err)
        assert re.search("is read-only|cannot be written|cannot be changed", err), (words, err)
    assert state(copy) == before


def test_a_server(copy: Path, unprivileged: list[str]) -> None:
    before = state(copy)
    command = [*unprivileged, sys.executable, "-m", "proper", "serve", str(copy), "--port", "0", "--no-worker"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ}) as started:
        try:
            assert started.stderr is not None
            line = started.stderr.readline()
            found = re.search(r"on (http://\S+)", line)
            assert found is not None, line
            with httpx.Client(base_url=found[1], timeout=60) as client:
                ask = {"model": "copy", "user": "u0", "prompt": "Well?", "max_tokens": 2}
                for _ in range(600):
                    try:
                        reply = client.post("/v1/completions", json=ask)
                        break
                    except httpx.ConnectError:
                        assert started.poll() is None
                assert reply.status_code == 200 and reply.json()["proper"]["tier"] == "users"
                assert len(client.get("/v1/users").json()["data"]) == 9
                taught = {"user": "new", "interactions": [{"input": "x", "output": "y"}]}
                for reply in (
                    client.post("/v1/users", json=taught),
                    client.post("/v1/users/u1/rollback", json={}),
                    client.delete("/v1/users/u0"),
                ):
                    assert (reply.status_code, reply.json()["error"]["code"]) == (403, "read_only")
        finally:
            started.terminate()
            started.communicate(timeout=60)
    assert started.returncode == 0 and state(copy) == before
