"""The process that fits people while this one serves: started, started again when it dies, stopped in the end.

It is a command like any other and shares nothing with the server but the run's files. Knows nothing about fits.
"""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Sequence

LONGEST_PAUSE = 60.0
"""Seconds between two starts at most; also how long it has to live for the pauses to begin anew."""


class FitProcess:
    """A child process and the thread that looks after it.

    Args:
        command: what to start.
        log: takes a line.
        pause: seconds before the first restart; doubles with each that follows.
        grace: seconds that it has to end after SIGTERM.
    """

    def __init__(
        self, command: Sequence[str], log: Callable[[str], None], *, pause: float = 1.0, grace: float = 10.0
    ) -> None:
        self.command, self.log, self.pause, self.grace = list(command), log, pause, grace
        self.restarts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._look_after, name="proper-worker", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """Its process id; None before the start."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Begin."""
        self._process = self._begin()
        self._thread.start()

    def stop(self) -> None:
        """End it: what it was at is queued again."""
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

    def _look_after(self) -> None:
        pause = self.pause
        while True:
            assert self._process is not None
            begun = time.monotonic()
            code = self._process.wait()
            if self._stopping.is_set():
                return
            if time.monotonic() - begun > LONGEST_PAUSE:
                pause = self.pause
            self.log(f"proper: the worker that fits people ended with code {code}; it starts again in {pause:g} s")
            if self._stopping.wait(pause):
                return
            pause = min(2 * pause, LONGEST_PAUSE)
            self.restarts += 1
            self._process = self._begin()
            if self._stopping.is_set():  # between the look and the start
                self._process.terminate()
