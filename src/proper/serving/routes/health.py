"""Routes /healthz, /readyz and /metrics for monitoring."""

# No `from __future__ import annotations`: FastAPI could not resolve the types that are defined inside a function.

import asyncio
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Response
from prometheus_client import CONTENT_TYPE_LATEST

from proper.serving.auth import Authenticator
from proper.serving.engines import EngineRunner
from proper.serving.errors import APIError
from proper.serving.fit_process import FitProcess
from proper.serving.keys import Principal
from proper.serving.metrics import Metrics
from proper.serving.schemas.resources import Health


def health_routes(runner: EngineRunner, worker: FitProcess | None, metrics: Metrics, auth: Authenticator) -> APIRouter:
    """Return the monitoring routes of an engine thread and its fit worker."""
    router = APIRouter(tags=["health"])

    def health(status: Literal["ok", "ready"]) -> Health:
        fits: Literal["off", "alive", "down"] = "off" if worker is None else "alive" if worker.alive else "down"
        return Health(status=status, worker=fits)

    def groups() -> str | None:
        """Return the hash of the groups that the store's users belong to; it changes when they are refreshed."""
        store = runner.engine.model.store
        return None if store is None else store.manifest.metadata().get("groups")

    loaded = groups()
    AdminCaller = Annotated[Principal, Depends(auth.needs("admin"))]

    @router.get("/healthz")
    async def healthz() -> Health:
        """Liveness: 500 if the engine has stopped, after which the process ends. A dead fit worker is restarted."""
        if runner.error is not None:
            raise APIError(500, "the engine has stopped", code="engine")
        return health("ok")

    @router.get("/readyz")
    def readyz() -> Health:  # on a thread: a database that does not answer must not stop all other requests
        """Readiness: 503 if the server accepts no requests, or must be started again to load refreshed groups."""
        if not runner.alive:
            raise APIError(503, "the server accepts no requests", code="not_ready")
        if groups() != loaded:
            why = "the run's groups were refreshed; restart the server, or send it SIGHUP"
            raise APIError(503, why, code="groups_refreshed")
        return health("ready")

    @router.get("/metrics", response_class=Response)
    async def figures(caller: AdminCaller) -> Response:
        """Return the metrics in Prometheus's text format."""
        return Response(await asyncio.to_thread(metrics.text), media_type=CONTENT_TYPE_LATEST)

    return router
