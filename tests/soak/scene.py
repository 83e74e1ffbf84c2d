"""Context and order of the faults of one thread, independent of the kinds of faults."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import httpx
from ledger import Ledger
from server import Server
from soak_users import Archive

CLI_SECONDS = 120.0
UP_SECONDS = 300.0
"""In which a server that was killed is back."""


@dataclass
class Scene:
    """A running server and its surroundings, for the faults of one thread.

    Attributes:
        folder: the run.
        exports: a folder with the exported users that `damaged_exports.export` wrote.
        words: code words by user, of the users who exist from the beginning.
        stop: set when no new round of faults shall begin.
    """

    server: Server
    folder: Path
    exports: Path
    words: dict[str, str]
    archive: Archive
    ledger: Ledger
    stop: threading.Event
    random: Random

    def go_through(self, name: str, faults: Callable[[int], Sequence[Callable[[], None]]]) -> None:
        """Do all faults of a round in random order, round after round until `stop`, at least one round."""
        number = 0
        try:
            while not (self.stop.is_set() and number):
                for fault in self.random.sample(these := faults(number), len(these)):
                    time.sleep(self.random.uniform(0.5, 2.5))
                    fault()
                    if self.stop.is_set() and number:
                        return
                number += 1
        except Exception as error:
            self.ledger.amiss(f"{name} broke: {type(error).__name__}: {error}")
            raise

    def proper(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run the command line beside the server; a traceback is noted as wrong."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "proper", *words]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=CLI_SECONDS, env=environment)
        if "Traceback" in ended.stderr:
            self.ledger.amiss(f"proper {' '.join(words)} ended with a traceback: {ended.stderr[-600:]}")
        return ended

    def wait(self, until: Callable[[], bool], seconds: float) -> bool:
        """Wait until something holds; return whether it came to hold."""
        deadline = time.monotonic() + seconds
        while not until():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def server_is_up(self) -> bool:
        """Whether the server takes requests just now."""
        try:
            return httpx.get(f"{self.server.url}/readyz", timeout=10).is_success
        except httpx.TransportError:
            return False

    def await_server(self) -> None:
        """Wait for a server that was killed, so that what comes next meets one; go on without one if it stays away."""
        self.wait(self.server_is_up, UP_SECONDS)

    def marker(self) -> str:
        """Return a text that occurs nowhere else: part of a user's id and texts, to look for after the deletion."""
        return f"{self.random.getrandbits(64):016x}"
