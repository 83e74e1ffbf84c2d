"""What a server does about deletions that it was not asked for, or could not end: a look at the store twice a second.

    another process deleted a user      the engine forgets adapter, keys and values
    a deletion is not over              it goes on, as soon as whoever read or wrote has ended

Knows nothing about routes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from proper.adapters.store import AdapterStore
from proper.errors import ProperError
from proper.inference.engine import Engine
from proper.interactions.deletion import finish_deletions

PERIOD = 0.5
"""Seconds between two looks."""


class DeletionWatch:
    """A thread that looks after a running engine's store.

    Args:
        engine: what forgets users.
        users: the folder of store and log.
        log: takes a line.
    """

    def __init__(self, engine: Engine, users: Path, log: Callable[[str], None]) -> None:
        self.engine, self.users, self.log = engine, users, log
        self._stopping = threading.Event()
        self._said = ""
        self._thread = threading.Thread(target=self._look, name="proper-deletions", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End, after the deletion in hand."""
        self._stopping.set()
        self._thread.join()

    def _look(self) -> None:
        # A store of its own: a connection hears of what all others commit, those of this process included.
        with closing(AdapterStore(self.users)) as store:
            seen = -1
            while not self._stopping.is_set():
                try:
                    changes = store.manifest.changes()
                    if changes != seen:
                        self.engine.recheck()
                    seen = changes
                    finish_deletions(self.users)
                    self._say("")
                except (ProperError, OSError) as error:
                    self._say(str(error))
                self._stopping.wait(PERIOD)

    def _say(self, what: str) -> None:
        """Log what is wrong, once for as long as it lasts."""
        if what and what != self._said:
            self.log(f"proper: deletions cannot be gone on with: {what}")
        self._said = what
