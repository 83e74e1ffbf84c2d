"""/healthz, /readyz and /metrics: for whoever watches over the server."""

# No postponed annotations here: FastAPI could not look up those that are made inside a function.

import asyncio
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Response
from prometheus_client import CONTENT_TYPE_LATEST

from proper.inference.engine_thread import EngineThread
from proper.serving.auth import Authenticator
from proper.serving.errors import APIError
from proper.serving.fit_process import FitProcess
from proper.serving.keys import Principal
from proper.serving.metrics import Metrics
from proper.serving.schemas import Health


def health_routes(runner: EngineThread, worker: FitProcess | None, metrics: Metrics, gate: Authenticator) -> APIRouter:
    """Return the routes over a runner, the worker that fits people, and their figures."""
    router = APIRouter(tags=["health"])

    def health(status: Literal["ok", "ready"]) -> Health:
        fits: Literal["off", "alive", "down"] = "off" if worker is None else "alive" if worker.alive else "down"
        return Health(status=status, worker=fits)

    Watching = Annotated[Principal, Depends(gate.needs("admin"))]

    @router.get("/healthz")
    async def healthz() -> Health:
        """Say whether the server works; with 500 the process ends. A worker that is down is started again from here."""
        if runner.error is not None:
            raise APIError(500, "the engine has stopped", code="engine")
        return health("ok")

    @router.get("/readyz")
    async def readyz() -> Health:
        """Say whether requests are taken."""
        if not runner.alive:
            raise APIError(503, "no requests are taken", code="not_ready")
        return health("ready")

    @router.get("/metrics", response_class=Response)
    async def figures(who: Watching) -> Response:
        """Show the figures in Prometheus's text format."""
        return Response(await asyncio.to_thread(metrics.text), media_type=CONTENT_TYPE_LATEST)

    return router
