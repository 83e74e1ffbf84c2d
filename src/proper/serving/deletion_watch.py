"""Background thread of a server that polls the store for deletions, twice a second.

When another process has deleted a user, the engine drops the user's adapter and KV cache. An unfinished deletion is
continued as soon as the process that blocks it has ended. A deletion on another machine, which has a copy of the run
folder, does not reach the cache of object storage here: within a minute, what the bucket no longer has is wiped.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from proper.adapters.store import AdapterStore
from proper.errors import ProperError
from proper.interactions.deletion import delete_returned, finish_deletions
from proper.serving.engines import AnsweringEngine

PERIOD = 0.5
"""Seconds between two polls."""

SWEEP_SECONDS = 60.0
"""Seconds between two sweeps of the cache, if anything has changed."""


class DeletionWatch:
    """Thread that polls a running engine's store.

    Args:
        engine: the engine whose cached users are rechecked.
        users: the folder of the store and the interaction log.
        log: called with each log line.
    """

    def __init__(self, engine: AnsweringEngine, users: Path, log: Callable[[str], None]) -> None:
        self.engine, self.users, self.log = engine, users, log
        self._stopping = threading.Event()
        self._logged = ""
        self._thread = threading.Thread(target=self._look, name="proper-deletions", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread after the deletion that it is working on."""
        self._stopping.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stopping.is_set():
            try:
                # A separate store: its connection sees the commits of all others, those of this process included.
                with closing(AdapterStore(self.users)) as store:
                    self._poll(store)
            except (ProperError, OSError) as error:  # it cannot be opened yet
                self._log_once(str(error))
                self._stopping.wait(PERIOD)

    def _poll(self, store: AdapterStore) -> None:
        seen, looked, stale, sweep_at = "", False, True, 0.0
        while not self._stopping.is_set():
            try:
                changes = store.manifest.changes()
                if changes != seen:
                    self.engine.recheck()
                    stale = True
                seen = changes
                if stale and time.monotonic() >= sweep_at:
                    store.shards.sweep()
                    stale, sweep_at = False, time.monotonic() + SWEEP_SECONDS
                finish_deletions(self.users)
                if not looked:
                    delete_returned(self.users)
                looked = True
                self._log_once("")
            except (ProperError, OSError) as error:
                self._log_once(str(error))
            self._stopping.wait(PERIOD)

    def _log_once(self, what: str) -> None:
        """Log an error once, until it changes or is gone."""
        if what and what != self._logged:
            self.log(f"proper: an unfinished deletion cannot continue: {what}")
        self._logged = what
