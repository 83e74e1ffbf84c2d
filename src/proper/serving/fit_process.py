"""Supervisor of the fit worker process beside a server: start, restart with backoff, stop.

The worker is an ordinary command (`proper users update --watch`) and shares only the run's files with the server.
"""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Sequence

MAX_PAUSE_SECONDS = 60.0
"""Longest pause in seconds between two starts; a worker that lived longer than this resets the pause."""


class FitProcess:
    """A child process and the thread that restarts it.

    Args:
        command: the command to start.
        log: called with each log line.
        pause: seconds before the first restart; doubles with each further restart.
        grace: seconds from SIGTERM to SIGKILL.
    """

    def __init__(
        self, command: Sequence[str], log: Callable[[str], None], *, pause: float = 1.0, grace: float = 10.0
    ) -> None:
        self.command, self.log, self.pause, self.grace = list(command), log, pause, grace
        self.restarts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._supervise, name="proper-worker", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """The process id; None before the start."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the process and its supervising thread."""
        self._process = self._begin()
        self._thread.start()

    def stop(self) -> None:
        """Stop the process; the worker queues an interrupted fit again."""
        self._stopping.set()
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
        if self._thread.is_alive():
            self._thread.join(self.grace)
        if self.alive:
            assert self._process is not None
            self._process.kill()
            self._process.wait()

    def _begin(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    def _supervise(self) -> None:
        pause = self.pause
        while True:
            assert self._process is not None
            begun = time.monotonic()
            code = self._process.wait()
            if self._stopping.is_set():
                return
            if time.monotonic() - begun > MAX_PAUSE_SECONDS:
                pause = self.pause
            self.log(f"proper: the fit worker ended with code {code}; restart in {pause:g} s")
            if self._stopping.wait(pause):
                return
            pause = min(2 * pause, MAX_PAUSE_SECONDS)
            self.restarts += 1
            self._process = self._begin()
            if self._stopping.is_set():  # `stop` was called between the check and the start
                self._process.terminate()
