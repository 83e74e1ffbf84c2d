"""Background thread that runs an engine's steps, with drain and stop."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from proper.inference.engine import Engine


class EngineThread:
    """Thread that steps an engine from `start` to `stop`.

    Attributes:
        error: the exception that ended the thread; None after `stop`. The engine can then not be restarted.
        on_error: called from the thread after such an exception, once every request is finished.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.error: BaseException | None = None
        self.on_error: Callable[[], None] = lambda: None
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="proper-engine", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether the thread runs, so that requests are answered."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def drain(self, seconds: float) -> bool:
        """Wait until every request is finished; return False if that takes longer than `seconds`."""
        deadline = time.monotonic() + seconds
        while self.alive and not self.engine.idle:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    def stop(self) -> None:
        """End the thread and finish all remaining requests as cancelled."""
        self._stopping = True
        self.engine.wake()
        self._thread.join()

    def _run(self) -> None:
        engine = self.engine
        try:
            while not self._stopping:
                with engine.changed:
                    engine.changed.wait_for(lambda: self._stopping or not engine.blocked)
                engine.step()
        except BaseException as error:  # kept for the code that ends the process, which raises it
            self.error = error
        try:
            engine.close(None if self.error is None else "the engine has stopped")
        finally:
            if self.error is not None:
                self.on_error()
