"""Serving on a Ray cluster: the HTTP server of one machine, in front of replicas with an engine each.

    client -> HTTP server (this process: routes, keys, limits, metrics, tokenizer) -> router -> replicas (engines)

One process has the HTTP server, so keys and limits hold over all replicas and one scrape has all metrics. A request
whose replica dies is computed again by another one, which continues the answer where it broke off: sampling draws from
the request's own seed.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import fields
from pathlib import Path
from typing import Any

from proper.adapters.slot_cache import CacheCounts
from proper.adapters.store import AdapterStore
from proper.cluster.replica import ReplicaModel
from proper.config import Config, load_run_config
from proper.data.encoder import Encoder
from proper.data.rows import Template
from proper.errors import ProperError
from proper.inference.requests import EngineStats, Event, Finished, Request, Sink, Token
from proper.run_folder import RunFolder, Tier

logger = logging.getLogger(__name__)

ATTEMPTS = 3
"""Replicas that may die with the same request, before it is given up."""

PATIENCE = 10.0
"""Seconds that a call of all replicas may take."""


class ClusterModel:
    """The model that the replicas answer with, without its weights, and the store of its users.

    Args:
        folder: the run folder.
        loaded: what a replica says of the model.
    """

    def __init__(self, folder: Path, loaded: ReplicaModel) -> None:
        run = RunFolder(folder)
        self.config: Config = load_run_config(run.config)
        self.encoder: Encoder = loaded.encoder
        self.stage: Tier = loaded.stage
        self.template: Template = loaded.template
        has_users = loaded.stage in (Tier.GROUPS, Tier.USERS)
        self.store: AdapterStore | None = AdapterStore(run.users.path) if has_users else None


class ClusterEngine:
    """The engine of the HTTP server: sends each request to a replica and its events to the request's sink.

    Args:
        handle: the deployment handle of the replicas.
        model: the model that answers.
        loaded: what a replica says of the model.
    """

    def __init__(self, handle: Any, model: ClusterModel, loaded: ReplicaModel) -> None:
        self.model, self.limit = model, loaded.limit
        self._handle, self._embeddings = handle, loaded.embeddings
        self._loop = asyncio.new_event_loop()
        self._open: set[Future[None]] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._stores: dict[str, AdapterStore] = {}
        self._figures: dict[str, EngineStats] = {}

    def submit(self, request: Request, sink: Sink) -> Future[None]:
        """Send a request to a replica; a thread of its own calls `sink` with the events. Thread-safe.

        Raises:
            InputError: see `check`.
            ProperError: the engine is closed.
        """
        self.check(request)
        with self._lock:
            if self._closed:
                raise ProperError("the engine is closed")
            call = asyncio.run_coroutine_threadsafe(self._answer(request, sink), self._loop)
            self._open.add(call)
        call.add_done_callback(self._open.discard)
        return call

    def check(self, request: Request) -> None:
        """Check that a request can be computed; thread-safe. Raises InputError, see `Request.require_possible`."""
        request.require_possible(self.limit, self._embeddings)

    def forget(self, tenant: str, user: str) -> None:
        """Drop what the replicas keep in memory of a user, once no request uses it; thread-safe."""
        self._on_all("forget", tenant, user)

    def recheck(self) -> None:
        """Let the replicas forget all users who are no longer in their store; thread-safe."""
        self._on_all("recheck")

    def store(self, tenant: str) -> AdapterStore:
        """Return a tenant's store, which the first call opens; thread-safe.

        Raises:
            ProperError: the run has no users.
        """
        first = self.model.store
        if first is None:
            raise ProperError("this run has no users: its stage 'groups' is not trained")
        with self._lock:
            if tenant not in self._stores:
                self._stores[tenant] = first if tenant == first.tenant else AdapterStore(first.folder, tenant)
            return self._stores[tenant]

    def stats(self) -> EngineStats:
        """Return the sum of the replicas' figures; counters keep those of replicas that are gone. Thread-safe."""
        now = dict(self._on_all("figures"))
        with self._lock:
            self._figures |= now
            return total(list(now.values()), [stats for name, stats in self._figures.items() if name not in now])

    def close_stores(self) -> None:
        """Close the stores of all tenants, after `close`."""
        first = self.model.store
        for store in {id(each): each for each in (first, *self._stores.values()) if each is not None}.values():
            store.close()

    def run(self) -> None:
        """Send requests until `close`; for a thread of its own."""
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    def close(self) -> None:
        """Finish every request as cancelled, and let `run` return."""
        with self._lock:
            self._closed = True
            left = list(self._open)
        for call in left:
            call.cancel()
        asyncio.run_coroutine_threadsafe(self._settled(), self._loop).result(PATIENCE)
        self._loop.call_soon_threadsafe(self._loop.stop)

    async def _settled(self) -> None:
        """Return when no request is running."""
        running = asyncio.all_tasks(self._loop) - {asyncio.current_task()}
        await asyncio.wait([asyncio.shield(task) for task in running], timeout=1.0) if running else None

    def _on_all(self, method: str, *arguments: object) -> list[Any]:
        """Return what a method of all replicas returns; those that do not answer are logged and left out."""
        from ray.serve.exceptions import DeploymentUnavailableError

        try:
            called = self._handle.broadcast(method, *arguments)
            results = called.results(timeout_s=PATIENCE, return_exceptions=True)
        except (DeploymentUnavailableError, TimeoutError) as error:
            results = [error]
        for each in results:
            if isinstance(each, Exception):
                logger.warning(f"proper: a replica does not answer '{method}': {type(each).__name__}")
        return [each for each in results if not isinstance(each, Exception)]

    async def _answer(self, request: Request, sink: Sink) -> None:
        """Send the events of a request to its sink."""
        sent: list[Event] = []
        try:
            error = ""
            for _ in range(ATTEMPTS):
                error = await self._attempt(request, sink, sent)
                if not error:
                    return
                logger.info(f"proper: a replica was lost with a request: {error}")
            sink(Finished("lost", error))
        except asyncio.CancelledError:
            sink(Finished("cancelled"))
            raise

    async def _attempt(self, request: Request, sink: Sink, sent: list[Event]) -> str:
        """Pass on the events of one replica, those in `sent` only compared; return why it failed, or nothing."""
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        at = 0
        response = self._handle.options(stream=True, method_name="answer").remote(request)
        try:
            async for events in response:
                for event in events:
                    if at < len(sent) and not same(sent[at], event):
                        return "another replica answers differently, because the user was updated meanwhile"
                    if at >= len(sent):
                        sent.append(event)
                        sink(event)
                    at += 1
        except asyncio.CancelledError:
            response.cancel()
            raise
        except (RayError, RayServeException) as error:
            return f"{type(error).__name__}"
        return "" if sent and isinstance(sent[-1], Finished) else "the stream ended early"


def same(first: Event, second: Event) -> bool:
    """Return whether two events are equal; of tokens, only the ids: log-probabilities may be rounded differently."""
    if isinstance(first, Token) and isinstance(second, Token):
        return first.id == second.id
    return first == second


def total(live: Sequence[EngineStats], gone: Sequence[EngineStats]) -> EngineStats:
    """Return the sum of the figures of several engines; of those that are gone, only the counters."""
    gauges = ("waiting", "running", "slots", "resident", "pinned", "loading", "prefix_bytes")
    everyone = [*live, *gone]
    summed: dict[str, Any] = {name: sum(getattr(stats, name) for stats in live) for name in gauges}
    for name in ("steps", "prompt_tokens", "reused_tokens", "fallbacks", "errors"):
        summed[name] = sum(getattr(stats, name) for stats in everyone)
    tiers = {tier for stats in everyone for tier in stats.tokens}
    summed["tokens"] = {tier: sum(stats.tokens.get(tier, 0) for stats in everyone) for tier in tiers}
    counts = [each.adapters for each in everyone]
    summed["adapters"] = CacheCounts(*(sum(getattr(each, one.name) for each in counts) for one in fields(CacheCounts)))
    return EngineStats(**summed, replicas=len(live))
