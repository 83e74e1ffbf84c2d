"""A PostgreSQL server of Debian's package for the tests, with its data in a temporary folder."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path


def missing() -> str | None:
    """Return why no server can be started on this machine, or None."""
    if find_spec("psycopg") is None:
        return "the extra 'postgresql' is not installed"
    if not _servers():
        return "PostgreSQL is not installed (Debian's package postgresql)"
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        return "this process runs as root, which PostgreSQL refuses, and there is no setpriv"
    return None


def _servers() -> list[Path]:
    return sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))


@contextmanager
def running() -> Iterator[str]:
    """Start a server on a free port of 127.0.0.1, yield the URL of its database, and stop it."""
    place, folder = _servers()[-1].parent, Path(tempfile.mkdtemp(prefix="proper-postgresql-"))
    other: list[str] = []
    if os.geteuid() == 0:
        shutil.chown(folder, 65534, 65534)
        other = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    data = folder / "data"
    setup = ["-U", "proper", "--auth=trust", "--no-sync", "--no-locale", "-E", "UTF8"]
    log = folder.joinpath("log").open("w+", encoding="utf-8")
    subprocess.run([*other, place / "initdb", "-D", data, *setup], check=True, cwd=folder, stdout=log, stderr=log)
    # fsync=off: the tests kill processes, not machines.
    settings = [f"port={port}", f"unix_socket_directories={folder}", "fsync=off", "max_connections=200"]
    command = [*other, place / "postgres", "-D", data, *(word for each in settings for word in ("-c", each))]
    server = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    try:
        url = f"postgresql://proper@127.0.0.1:{port}/postgres"
        _wait(url, server, Path(log.name))
        yield url
    finally:
        server.send_signal(2)  # fast shutdown: connections are closed
        server.wait(30)
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


def _wait(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    import psycopg

    deadline = time.monotonic() + 60
    while True:
        try:
            psycopg.connect(url, connect_timeout=5).close()
            return
        except psycopg.OperationalError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(log.read_text(encoding="utf-8")) from None
        time.sleep(0.05)
