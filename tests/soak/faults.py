"""What is done to a server that works: processes killed, a disk full, an adapter damaged. All from one seed.

A disk is full in one of two ways: where the run lies on a small disk of its own (`--disk`), that is filled; elsewhere
the processes' limit on the size of files forbids every write. Knows nothing about clients.
"""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from folk import Archive
from ledger import Damage, Ledger
from server import Server

from proper.adapters.manifest import Row, key_of
from proper.adapters.store import AdapterStore

FULL_SECONDS = 1.5
"""At least; longer, within reason, if nobody has tried to write meanwhile."""
DAMAGED_SECONDS = 6.0
"""At most; until somebody was told of it, if that is sooner."""
LIFE = 6
"""Rounds that a server lives: long enough to see whether its memory grows."""
TRIES = 5
"""Adapters that are damaged one after another until somebody is told."""


@dataclass
class Saboteur:
    """Does one thing after another, on a thread of its own until `stop`.

    Attributes:
        folder: the run.
        people: whose adapters are damaged.
    """

    server: Server
    folder: Path
    people: list[str]
    archive: Archive
    ledger: Ledger
    stop: threading.Event
    random: Random
    rounds: int = 0

    def run(self) -> None:
        """Go through all faults in random order, again and again, at least once."""
        try:
            while True:
                faults = [self.kill_worker, self.fill_disk, self.damage]
                if self.rounds % LIFE == 0:
                    faults.append(self.kill_server)
                self.random.shuffle(faults)
                for fault in faults:
                    time.sleep(self.random.uniform(0.5, 2.5))
                    fault()
                    if self.stop.is_set() and self.rounds:
                        return
                self.rounds += 1
                if self.stop.is_set():
                    return
        except Exception as error:
            self.ledger.amiss(f"the saboteur broke: {type(error).__name__}: {error}")
            raise

    def kill_worker(self) -> None:
        """SIGKILL for the process that fits people; it may be starting still."""
        worker = self.server.worker()
        if worker is None:
            self.ledger.fault("no worker to kill")
            return
        with suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
        self.ledger.fault("worker killed")

    def kill_server(self) -> None:
        """SIGKILL for the server, and another one in its place."""
        self.server.kill()
        self.ledger.fault("server killed")
        self.server.start()
        self.ledger.fault("server back")

    def fill_disk(self) -> None:
        """No more writes for a while."""
        heal = self._fill_own_disk() if os.path.ismount(self.folder.parent) else self._forbid_writes()
        self.ledger.fault("disk full")
        before, began = self.ledger.replies["teach: 500 store"], self.ledger.now
        while self.ledger.now < began + FULL_SECONDS or (
            self.ledger.replies["teach: 500 store"] == before and self.ledger.now < began + 10 * FULL_SECONDS
        ):
            time.sleep(0.05)
        heal()
        self.ledger.fault("disk has room")

    def _fill_own_disk(self) -> Callable[[], None]:
        filler = self.folder.parent / "filler"
        with filler.open("wb") as file:
            for size in (1 << 20, 4096, 1):
                with suppress(OSError):
                    while True:
                        os.write(file.fileno(), bytes(size))
        return filler.unlink

    def _forbid_writes(self) -> Callable[[], None]:
        def limit(size: int) -> None:
            # A worker that is started meanwhile inherits the server's.
            for pid in (self.server.pid, self.server.worker()):
                if pid is not None:
                    with suppress(ProcessLookupError):
                        hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]
                        resource.prlimit(pid, resource.RLIMIT_FSIZE, (size if size >= 0 else hard, hard))

        def heal() -> None:
            limit(-1)
            limit(-1)  # one that was started between the two looks

        limit(0)
        return heal

    def damage(self) -> None:
        """Change a bit of an adapter where it lies, and change it back; and another, until somebody is told."""
        with closing(AdapterStore(self.folder / "users")) as store:
            for _ in range(TRIES):
                if self._damage_one(store, self.random.choice(self.people)):
                    return

    def _damage_one(self, store: AdapterStore, user: str) -> bool:
        row = store.manifest.head(store.tenant, key_of(user))
        if row is None or row.place is None or (user, row.version) not in self.archive.records:
            self.ledger.fault("nothing to damage")
            return False
        at = row.place.offset + self.random.randrange(row.place.length)
        file = os.open(store.blobs / row.place.blob, os.O_RDWR)
        try:
            before = os.pread(file, 1, at)
            os.pwrite(file, bytes([before[0] ^ 1 << self.random.randrange(8)]), at)
            told = self._damaged(user, row.version)
            if self._held(store, user, row):
                os.pwrite(file, before, at)
        finally:
            os.close(file)
        self.ledger.damages[-1] = replace(self.ledger.damages[-1], until=self.ledger.now)
        self.ledger.fault(f"adapter as it was: {user}, version {row.version}")
        return told

    def _damaged(self, user: str, version: int) -> bool:
        """Wait until somebody is told that this adapter is damaged; return whether that came."""
        self.ledger.damages.append(Damage(user, self.ledger.now))
        self.ledger.fault(f"adapter damaged: {user}, version {version}")
        first, until = len(self.ledger.answers), self.ledger.now + DAMAGED_SECONDS
        while self.ledger.now < until:
            if any(one.user == user and one.fallback for one in self.ledger.answers[first:]):
                return True
            time.sleep(0.05)
        return False

    @staticmethod
    def _held(store: AdapterStore, user: str, row: Row) -> bool:
        """Whether some version still lies there; bytes that were given up and wiped stay wiped."""
        return any(other.place == row.place for other in store.manifest.versions(store.tenant, key_of(user)))
