"""The thread on which an engine's steps run. Knows nothing about what a step does."""

from __future__ import annotations

import threading
import time

from proper.inference.engine import Engine


class Runner:
    """An engine at work from `start` to `stop`.

    Attributes:
        error: what ended the thread, if it was not `stop`.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.error: BaseException | None = None
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
        except BaseException as error:
            self.error = error
            raise
        finally:
            engine.close()
