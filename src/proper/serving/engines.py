"""Interface of the HTTP server to its engine: an engine of this process, or replicas on a cluster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from proper.adapters.store import AdapterStore
from proper.config import Config
from proper.data.encoder import Encoder
from proper.data.rows import Template
from proper.inference.requests import EngineStats, Request, Sink
from proper.run_folder import Tier


class AnsweringModel(Protocol):
    """The model that answers, without its weights; see `PersonalizedModel`."""

    @property
    def config(self) -> Config: ...  # noqa: D102
    @property
    def encoder(self) -> Encoder: ...  # noqa: D102
    @property
    def stage(self) -> Tier: ...  # noqa: D102
    @property
    def template(self) -> Template: ...  # noqa: D102
    @property
    def store(self) -> AdapterStore | None: ...  # noqa: D102


class Cancellable(Protocol):
    """A submitted request."""

    def cancel(self) -> object:
        """End it; its sink still gets `Finished`, unless it already has."""
        ...


class AnsweringEngine(Protocol):
    """An engine as the HTTP server uses it; all methods are thread-safe. See `inference.engine.Engine`."""

    @property
    def model(self) -> AnsweringModel: ...  # noqa: D102
    @property
    def limit(self) -> int: ...  # noqa: D102

    def submit(self, request: Request, sink: Sink) -> Cancellable:
        """Queue a request; `sink` is called with its events on another thread.

        Raises:
            InputError: the request cannot be computed.
            ProperError: the engine is closed.
        """
        ...

    def check(self, request: Request) -> None:
        """Check that a request can be computed; raises InputError."""
        ...

    def forget(self, tenant: str, user: str) -> None:
        """Drop what is kept in memory of a user, once no request uses it."""
        ...

    def recheck(self) -> None:
        """Forget all users who are no longer in their store."""
        ...

    def store(self, tenant: str) -> AdapterStore:
        """Return a tenant's store. Raises ProperError if the run has no users."""
        ...

    def stats(self) -> EngineStats:
        """Return a snapshot of the figures; over all replicas if there are several."""
        ...


class EngineRunner(Protocol):
    """An engine with what keeps it running; see `inference.engine_thread.EngineThread`.

    Attributes:
        on_error: called from another thread when the engine has failed.
    """

    on_error: Callable[[], None]

    @property
    def engine(self) -> AnsweringEngine: ...  # noqa: D102
    @property
    def error(self) -> BaseException | None: ...  # noqa: D102
    @property
    def alive(self) -> bool: ...  # noqa: D102

    def start(self) -> None:
        """Begin to answer."""
        ...

    def stop(self) -> None:
        """Finish all remaining requests as cancelled."""
        ...
