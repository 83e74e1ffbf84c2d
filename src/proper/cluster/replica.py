"""A replica of Ray Serve: a process with the run's model and an engine, which answers requests by streams of events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path

import torch

from proper.console import quiet_libraries
from proper.data.encoder import Encoder
from proper.data.rows import Template
from proper.errors import ProperError
from proper.inference.engine import Engine
from proper.inference.engine_thread import EngineThread
from proper.inference.loading import load
from proper.inference.requests import EngineLimits, EngineStats, Event, Finished, Request
from proper.run_folder import Tier


@dataclass(frozen=True)
class ReplicaModel:
    """Description of the replicas' model for the process with the HTTP server.

    Attributes:
        stage: the last stage that is applied.
        limit: maximum tokens of a prompt and its answer together.
        embeddings: number of token embeddings.
        encoder: the encoder from texts to the model's tokens.
        template: the prompt template of the run's data.
    """

    stage: Tier
    limit: int
    embeddings: int
    encoder: Encoder
    template: Template


class EngineReplica:
    """The deployment's class: Ray Serve starts, checks, drains and replaces its instances.

    Args:
        folder: the run folder.
        limits: limits of the engine.
        threads: torch threads.
        number: number of the deployment; another one makes Ray Serve replace the replicas.
    """

    def __init__(self, folder: str, limits: EngineLimits, threads: int, number: int) -> None:
        from ray import serve

        quiet_libraries()
        torch.set_num_threads(threads)
        self._name = serve.get_replica_context().replica_id.unique_id
        self._runner = EngineThread(Engine(load(Path(folder)), limits))
        self._runner.start()

    def model(self) -> ReplicaModel:
        """Return the description of the model for the HTTP server."""
        engine = self._runner.engine
        model = engine.model
        return ReplicaModel(model.stage, engine.limit, model.model.backbone.embeddings, model.encoder, model.template)

    async def answer(self, request: Request) -> AsyncGenerator[list[Event], None]:
        """Yield the events of a request, those that are there at once together; leaving the loop cancels the request.

        Raises:
            ProperError: the engine has failed; another replica can answer.
        """
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[Event] = asyncio.Queue()

        def sink(event: Event) -> None:
            loop.call_soon_threadsafe(arrived.put_nowait, event)

        handle = self._runner.engine.submit(request, sink)
        try:
            ended = False
            while not ended:
                events = [await arrived.get()]
                while not arrived.empty():
                    events.append(arrived.get_nowait())
                ended = isinstance(events[-1], Finished)
                if ended:
                    self.check_health()
                yield events
        finally:
            handle.cancel()

    def figures(self) -> tuple[str, EngineStats]:
        """Return this replica's id and its engine's figures."""
        return self._name, self._runner.engine.stats()

    def forget(self, tenant: str, user: str) -> None:
        """Drop what is kept in memory of a user, once no request uses it."""
        self._runner.engine.forget(tenant, user)

    def recheck(self) -> None:
        """Forget all users who are no longer in their store."""
        self._runner.engine.recheck()

    def check_health(self) -> None:
        """Check that the engine runs; Ray Serve replaces a replica that is not healthy.

        Raises:
            ProperError: the engine has failed.
        """
        error = self._runner.error
        if error is not None:
            raise ProperError(f"the engine has stopped: {error}") from error
