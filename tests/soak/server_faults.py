"""Faults of a running server: killed processes, a full disk, a damaged adapter; in an order given by the seed.

A full disk is simulated in one of two ways: with `--disk`, a small disk is filled; otherwise the processes' limit on
the size of files forbids every write. Independent of the clients.
"""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, replace

from ledger import Damage
from scene import Scene

from proper.adapters.manifest import ManifestRow, key_of
from proper.adapters.store import AdapterStore

FULL_SECONDS = 1.5
"""At least; longer, within reason, if no process has tried to write meanwhile."""
DAMAGED_SECONDS = 6.0
"""At most; until a client was told of it, if that is sooner."""
LIFE = 6
"""Rounds that a server lives: long enough to see whether its memory grows."""
WORKER_SECONDS, FIRST_WORKER_SECONDS = 10.0, 120.0
"""To wait for one to kill; longer for the first, so that there is one in a short soak."""
WORKS_SECONDS = 4.0
"""That one is left alone at most, so that some are killed in the middle of a fit."""
TRIES = 5
"""Adapters that are damaged one after another until a client is told."""


@dataclass
class ServerFaults:
    """Does one thing after another to the processes, the disk and the adapters."""

    scene: Scene

    def run(self) -> None:
        """Go through all faults until the scene's end."""
        self.scene.go_through("the saboteur", self._faults)

    def _faults(self, number: int) -> list[Callable[[], None]]:
        faults = [self.kill_worker, self.fill_disk, self.damage]
        return faults if number % LIFE else [*faults, self.kill_server]

    def kill_worker(self) -> None:
        """SIGKILL for the fit worker process; it may be starting still."""
        # One that waits for the other server's to end may be absent for a while.
        before = any(what == "worker killed" for _, what in self.scene.ledger.done)
        seconds = WORKER_SECONDS if before else FIRST_WORKER_SECONDS
        deadline = time.monotonic() + seconds
        while self.scene.wait(lambda: self.scene.server.worker() is not None, deadline - time.monotonic()):
            time.sleep(self.scene.random.uniform(0, WORKS_SECONDS))
            worker = self.scene.server.worker()
            if worker is None:  # it ended by itself, as on a full disk, and another comes
                continue
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
            self.scene.ledger.fault("worker killed")
            return
        self.scene.ledger.fault("no worker to kill")

    def kill_server(self) -> None:
        """SIGKILL for the server, and another one in its place."""
        self.scene.server.kill()
        self.scene.ledger.fault("server killed")
        self.scene.server.start()
        self.scene.ledger.fault("server back")

    def fill_disk(self) -> None:
        """No more writes for a while."""
        heal = self._fill_own_disk() if os.path.ismount(self.scene.folder.parent) else self._forbid_writes()
        self.scene.ledger.fault("disk full")
        before, began = self._refused_writes(), self.scene.ledger.now
        while self.scene.ledger.now < began + FULL_SECONDS or (
            self._refused_writes() == before and self.scene.ledger.now < began + 10 * FULL_SECONDS
        ):
            time.sleep(0.05)
        heal()
        self.scene.ledger.fault("disk has room")

    def _refused_writes(self) -> int:
        return sum(self.scene.ledger.replies[f"teach: {status} store"] for status in (500, 503))

    def _fill_own_disk(self) -> Callable[[], None]:
        filler = self.scene.folder.parent / "filler"
        with filler.open("wb") as file:
            for size in (1 << 20, 4096, 1):
                with suppress(OSError):
                    while True:
                        os.write(file.fileno(), bytes(size))
        return filler.unlink

    def _forbid_writes(self) -> Callable[[], None]:
        def limit(size: int) -> None:
            # A worker that is started meanwhile inherits the server's.
            for pid in (self.scene.server.pid, self.scene.server.worker()):
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
        """Change a bit of an adapter where it lies, and change it back; and another, until a client is told."""
        with closing(AdapterStore(self.scene.folder / "users")) as store:
            for _ in range(TRIES):
                if self._damage_one(store, self.scene.random.choice([*self.scene.words])):
                    return

    def _damage_one(self, store: AdapterStore, user: str) -> bool:
        row = store.manifest.head(store.tenant, key_of(user))
        if row is None or row.place is None or (user, row.version) not in self.scene.archive.records:
            self.scene.ledger.fault("nothing to damage")
            return False
        at = row.place.offset + self.scene.random.randrange(row.place.length)
        file = os.open(store.paths.blobs / row.place.blob, os.O_RDWR)
        try:
            before = os.pread(file, 1, at)
            os.pwrite(file, bytes([before[0] ^ 1 << self.scene.random.randrange(8)]), at)
            told = self._damaged(user, row.version)
            if self._held(store, user, row):
                os.pwrite(file, before, at)
        finally:
            os.close(file)
        self.scene.ledger.damages[-1] = replace(self.scene.ledger.damages[-1], until=self.scene.ledger.now)
        self.scene.ledger.fault(f"adapter as it was: {user}, version {row.version}")
        return told

    def _damaged(self, user: str, version: int) -> bool:
        """Wait until a client is told that this adapter is damaged; return whether that came."""
        self.scene.ledger.damages.append(Damage(user, self.scene.ledger.now))
        self.scene.ledger.fault(f"adapter damaged: {user}, version {version}")
        first, until = len(self.scene.ledger.answers), self.scene.ledger.now + DAMAGED_SECONDS
        while self.scene.ledger.now < until:
            if any(one.user == user and one.fallback for one in self.scene.ledger.answers[first:]):
                return True
            time.sleep(0.05)
        return False

    @staticmethod
    def _held(store: AdapterStore, user: str, row: ManifestRow) -> bool:
        """Whether some version still lies there; bytes that were given up and wiped stay wiped."""
        return any(other.place == row.place for other in store.manifest.versions(store.tenant, key_of(user)))
