"""`proper serve` as a process that can be killed and started again at the same address."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import closing, suppress
from pathlib import Path

import httpx

START_SECONDS = 600.0


class Server:
    """The command on one port, with the fit worker below it.

    Attributes:
        said: the newest lines of its log.
        starts: how often it was started.
        ready: whether it has taken requests since it was started last.
        ended: exit codes of those that were stopped.
    """

    def __init__(self, folder: Path, rows: int, slots: int, *extra: str) -> None:
        with closing(socket.create_server(("127.0.0.1", 0))) as free:
            self.port = int(free.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        options = ("--port", str(self.port), "--rows", str(rows), "--slots", str(slots))
        self._command = [sys.executable, "-m", "proper", "serve", str(folder), *options, *extra]
        self._process: subprocess.Popen[str] | None = None
        self.said: deque[str] = deque(maxlen=400)
        self.starts = 0
        self.ready = False
        self.ended: list[int] = []

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it and wait until it takes requests.

        Raises:
            RuntimeError: it ended, or took too long.
        """
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            self._command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment
        )
        self.ready = False
        threading.Thread(target=self._listen, args=(self._process,), daemon=True).start()
        self.starts += 1
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            with suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200:
                    self.ready = True
                    return
            time.sleep(0.05)
        raise RuntimeError("the server does not get ready:\n" + "\n".join(self.said))

    def kill(self) -> None:
        """SIGKILL; the process below it sees to its own end."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """SIGTERM, and wait for the end."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        try:
            self.ended.append(self._process.wait(60))
        finally:
            self._process.kill()

    def worker(self) -> int | None:
        """The process id of the fit worker; None while there is none."""
        # A child belongs to the thread that made it.
        for tasks in Path(f"/proc/{self.pid}/task").glob("*/children"):
            with suppress(OSError):
                for child in tasks.read_text().split():
                    if b"--watch" in Path(f"/proc/{child}/cmdline").read_bytes():
                        return int(child)
        return None

    def figures(self) -> dict[str, float]:
        """The metrics by name with labels."""
        lines = httpx.get(f"{self.url}/metrics", timeout=60).text.splitlines()
        pairs = (line.rpartition(" ") for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, _, value in pairs}

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        with suppress(ValueError):  # closed under it
            self.said.extend(line.rstrip() for line in process.stderr)


def memory(pid: int | None) -> int:
    """Bytes of a process that are in memory; 0 for one that is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
