"""The thread on which an engine's steps run. Knows nothing about what a step does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from proper.inference.engine import Engine


class EngineThread:
    """An engine at work from `start` to `stop`.

    Attributes:
        error: what ended the thread, if it was not `stop`. The engine cannot go on, nor be started again.
        on_error: called from the thread after that, when every request has had its end.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.error: BaseException | None = None
        self.on_error: Callable[[], None] = lambda: None
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="proper-engine", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether requests are being answered."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def drain(self, seconds: float) -> bool:
        """Wait until nothing runs or waits; return False if that takes longer."""
        deadline = time.monotonic() + seconds
        while self.alive and not self.engine.idle:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    def stop(self) -> None:
        """End every request that is left as cancelled, and the thread."""
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
        except BaseException as error:  # kept, and raised by whoever ends the process because of it
            self.error = error
        try:
            engine.close(None if self.error is None else "the engine has stopped")
        finally:
            if self.error is not None:
                self.on_error()
