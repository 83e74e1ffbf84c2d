"""`proper serve` as a process: where it listens, SIGTERM while an answer streams, one line for what is wrong."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx
import pytest
import yaml

from proper.cli.app import main
from proper.serving.auth import is_loopback
from proper.serving.server import free_port

Process = tuple[subprocess.Popen[str], str]


@pytest.fixture
def process(long_run: Path) -> Iterator[Process]:
    """The command on a free port, and its URL."""
    with serving(long_run) as started:
        yield started


@contextmanager
def serving(folder: Path, *more: str, start: Sequence[str] = ("-m", "proper")) -> Iterator[Process]:
    command = [sys.executable, *start, "serve", str(folder), "--port", "0", "--rows", "2", *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert started.stderr is not None
    said = ""
    while not (found := re.search(r"on (http://\S+)", said)):
        line = started.stderr.readline()
        assert line, said
        said += line
    until_ready(found[1])
    try:
        yield started, found[1]
    finally:
        started.kill()
        started.communicate()


BREAKS = """
from proper.cli.app import entry
from proper.inference.kv_cache import RowCache
whole = RowCache.make_room
def make_room(self):
    if max(self.window.lengths) > 40:
        raise RuntimeError("moved by half")
    whole(self)
RowCache.make_room = make_room
entry()
"""
"""The command, with an engine that breaks where no single request is at fault: when a row is 41 tokens long."""


def test_an_engine_that_cannot_go_on_answers_all_and_ends_the_process(long_run: Path) -> None:
    body = {"model": "tiny", "prompt": "Well?", "user": "u0", "max_tokens": 60}
    with serving(long_run, "--no-worker", start=("-c", BREAKS)) as (started, url), ThreadPoolExecutor() as threads:
        asked = [threads.submit(httpx.post, f"{url}/v1/completions", json=body, timeout=60) for _ in range(5)]
        with httpx.stream("POST", f"{url}/v1/completions", json=body | {"stream": True}, timeout=60) as reply:
            text = "".join(reply.iter_lines())
        replies = [one.result() for one in asked]
        _, rest = started.communicate(timeout=60)
    assert {reply.status_code for reply in replies} == {500} and '"error"' in text and "[DONE]" not in text
    assert started.returncode == 1
    assert "proper: the engine has stopped: RuntimeError: moved by half" in rest and "Traceback" not in rest


def until_ready(url: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with suppress(httpx.ConnectError):
            if httpx.get(f"{url}/readyz").status_code == 200:
                return
        time.sleep(0.01)
    raise AssertionError("the server does not get ready")


def test_sigterm_lets_an_answer_finish(process: Process) -> None:
    started, url = process
    body = {"model": "tiny", "prompt": "Well?", "user": "u0", "max_tokens": 200, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as reply:
        lines = reply.iter_lines()
        assert next(lines).startswith("data: ")
        os.kill(started.pid, signal.SIGTERM)
        text = "\n".join(lines)
    assert '"finish_reason": "' in text and "[DONE]" in text and "error" not in text
    _, rest = started.communicate(timeout=60)
    assert started.returncode == 0 and "proper: stopped" in rest
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/healthz")


def test_sigterm_waits_no_longer_than_it_was_told(long_run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(long_run, tmp_path / "tiny"))
    raw = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    raw["compute"]["max_length"] = 100_000
    (folder / "config.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    # A sampled answer: the likeliest one may end within the second.
    sampled = {"temperature": 1.0, "seed": 1}
    body = {"model": "tiny", "prompt": "Well?", "user": "u0", "max_tokens": 90_000, "stream": True, **sampled}
    with serving(folder, "--no-worker", "--drain", "1") as (started, url):
        text = ""
        with (
            suppress(httpx.RemoteProtocolError),
            httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as reply,
        ):
            for line in reply.iter_lines():
                if not text:
                    os.kill(started.pid, signal.SIGTERM)
                text += line
        _, rest = started.communicate(timeout=60)
    assert started.returncode == 0 and "proper: stopped" in rest
    assert text.startswith("data: ") and "[DONE]" not in text and '"finish_reason": "' not in text


def test_other_machines_need_keys(long_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(long_run), "--host", "0.0.0.0"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"make one with: proper keys add {long_run}" in said
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "example.org")] == [
        *(True, True, True, False, False)
    ]


def test_an_address_in_use_is_named_before_anything_is_loaded(
    long_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with free_port("127.0.0.1", 0) as taken:
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["serve", str(long_run), "--port", port]) == 2
    assert capsys.readouterr().err.startswith(f"proper: --host 127.0.0.1 --port {port}: ")


def test_keys_from_the_command_line(long_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text((long_run / "config.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    assert main(["keys", "add", str(tmp_path), "--scopes", "write,generate", "--tenant", "acme"]) == 0
    key = capsys.readouterr().out.strip()
    assert key.startswith("proper-")
    assert main(["keys", "list", str(tmp_path)]) == 0
    name, scopes, tenant = capsys.readouterr().out.strip().split("\t")
    assert (scopes, tenant) == ("generate,write", "acme")
    assert main(["keys", "revoke", str(tmp_path), name]) == 0
    assert main(["keys", "revoke", str(tmp_path), name]) == 2
    assert main(["keys", "add", str(tmp_path), "--scopes", "wirte"]) == 2
    assert "did you mean 'write'?" in capsys.readouterr().err


def test_a_burst_of_connections_leaves_descriptors_for_the_store(long_run: Path, tmp_path: Path) -> None:
    """Connections that are refused hold a descriptor until they are closed, three turns of the event loop later."""
    limited = "import resource as r; r.setrlimit(r.RLIMIT_NOFILE, (200, 200)); from proper.cli.app import main; main()"
    with serving(shutil.copytree(long_run, tmp_path / "tiny"), "--no-worker", start=("-c", limited)) as (started, url):
        host, port = url.removeprefix("http://").split(":")
        with ExitStack() as held:
            started.send_signal(signal.SIGSTOP)  # so that all of them wait when it looks
            for _ in range(400):
                one = held.enter_context(socket.socket())
                one.setblocking(False)
                one.connect_ex((host, int(port)))
            started.send_signal(signal.SIGCONT)
            until_refused(host, int(port))
        until_ready(url)
        started.terminate()
        _, said = started.communicate(timeout=30)
    assert started.returncode == 0 and "out of system resource" not in said, said[-600:]


def until_refused(host: str, port: int) -> None:
    """Wait until the connections before this one have been taken in or refused."""
    with socket.create_connection((host, port), timeout=20) as last:
        assert b"too many connections" in last.recv(4096)
