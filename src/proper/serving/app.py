"""FastAPI application factory: routes, middleware and error handlers around a running engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match

from proper.errors import ProperError, ReadOnlyError
from proper.interactions.log import InteractionLog
from proper.serving.answers import Answers
from proper.serving.auth import Authenticator
from proper.serving.deletion_watch import DeletionWatch
from proper.serving.engines import EngineRunner
from proper.serving.errors import APIError, ErrorReply, hide_users, one_line, without_folders, without_places
from proper.serving.fit_process import FitProcess
from proper.serving.json_bodies import check_surrogates, first_error
from proper.serving.keys import Keys
from proper.serving.limits import RateLimiter, ServeLimits
from proper.serving.metrics import Metrics
from proper.serving.middleware import AdmissionMiddleware, RequestChecksMiddleware, RequestMiddleware, reply
from proper.serving.routes.generation import generation_routes
from proper.serving.routes.health import health_routes
from proper.serving.routes.page import page_routes
from proper.serving.routes.users import deletion_routes, user_routes


@dataclass(frozen=True)
class ServeSettings:
    """Settings of a server.

    Attributes:
        model: the model name that clients send.
        version: the package version.
        open_without_keys: whether requests need no key as long as the run has never had one.
        limits: limits on body size, open requests and rate.
        log_users: whether logs may contain user ids.
    """

    model: str
    version: str = "0"
    open_without_keys: bool = True
    limits: ServeLimits = field(default_factory=ServeLimits)
    log_users: bool = False


def create_app(
    runner: EngineRunner,
    keys: Keys,
    settings: ServeSettings,
    log: Callable[[str], None],
    worker: FitProcess | None = None,
) -> FastAPI:
    """Return the application. It starts the engine thread and the fit worker, and stops them after its last reply."""
    store = runner.engine.model.store

    def log_line(line: str) -> None:
        log(one_line(line if settings.log_users else hide_users(line)))

    interactions = None if store is None else InteractionLog(store.folder)
    # A separate connection: reading metrics does not wait for writes.
    metrics_log = None if store is None else InteractionLog(store.folder)
    watched = store is not None and not store.manifest.read_only
    watch = DeletionWatch(runner.engine, store.folder, log_line) if store is not None and watched else None
    logs = [one for one in (interactions, metrics_log) if one is not None]
    app = _empty_app(settings.version, partial(_lifespan, runner, worker, watch, logs))
    metrics = Metrics(runner.engine, None if metrics_log is None else metrics_log.queue, worker)
    auth, limiter = Authenticator(keys, settings.open_without_keys), RateLimiter(settings.limits)
    app.include_router(generation_routes(settings.model, Answers(runner, metrics, log_line), auth, limiter))
    app.include_router(user_routes(runner.engine, interactions, auth))
    app.include_router(deletion_routes(runner.engine, interactions, auth))
    app.include_router(health_routes(runner, worker, metrics, auth))
    app.include_router(page_routes())
    _explain_errors(app, None if store is None else store.folder.parent, log_line)
    _add_middleware(app, settings, auth, limiter, metrics, log_line)
    return app


@asynccontextmanager
async def _lifespan(
    runner: EngineRunner,
    worker: FitProcess | None,
    watch: DeletionWatch | None,
    logs: Sequence[InteractionLog],
    _: FastAPI,
) -> AsyncIterator[None]:
    """Start the engine thread, the fit worker and the deletion watch; stop them and close the logs at the end."""
    runner.start()
    if worker is not None:
        worker.start()
    if watch is not None:
        watch.start()
    try:
        yield
    finally:
        if watch is not None:
            watch.stop()
        runner.stop()
        if worker is not None:
            worker.stop()
        for log in logs:
            log.close()


def _empty_app(version: str, lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]]) -> FastAPI:
    replies: dict[int | str, dict[str, Any]] = {
        "4XX": {"model": ErrorReply, "description": "Refused."},
        "5XX": {"model": ErrorReply, "description": "Failed."},
    }
    return FastAPI(
        title="proper",
        version=version,
        description="One model, personal for each `user`. OpenAI-compatible.",
        lifespan=lifespan,
        responses=replies,
        dependencies=[Depends(check_surrogates)],
        # A redirect's address has the scheme that the server sees: behind a TLS proxy it would lead to plain HTTP.
        redirect_slashes=False,
        # FastAPI's documentation pages load scripts from a CDN; the schema is at /openapi.json.
        docs_url=None,
        redoc_url=None,
    )


def _add_middleware(
    app: FastAPI,
    settings: ServeSettings,
    auth: Authenticator,
    limiter: RateLimiter,
    metrics: Metrics,
    log: Callable[[str], None],
) -> None:
    """Add the middleware, innermost first."""
    app.add_middleware(RequestChecksMiddleware)
    # Outside of the request checks: requests that they refuse count towards the rate.
    app.add_middleware(AdmissionMiddleware, auth=auth, limiter=limiter)
    app.add_middleware(
        RequestMiddleware,
        body_bytes=settings.limits.body_bytes,
        metrics=metrics,
        log=log,
        log_users=settings.log_users,
    )


def _explain_errors(app: FastAPI, run: Path | None, log: Callable[[str], None]) -> None:
    """Install handlers that turn every error into an `ErrorReply`; server-side paths go to the log only.

    The message of a refusal goes to the client only: it may quote the request's texts.
    """

    async def refused(request: Request, error: Exception) -> JSONResponse:
        refusal = _as_refusal(error)
        if refusal.status == 405:
            refusal.headers["Allow"] = ", ".join(sorted(_methods(request)))
        if isinstance(error, ProperError) and not (isinstance(error, APIError) and error.status < 500):
            log(f"{type(error).__name__}: {error}")
        if run is not None:
            refusal.message = without_folders(refusal.message, run)
        return reply(refusal)

    for kind in (APIError, RequestValidationError, HTTPException, ProperError, Exception):
        app.add_exception_handler(kind, refused)


def _methods(request: Request) -> set[str]:
    """Return the methods of a request's path: those of all its routes, of which the framework names the first one's."""
    found = {
        method
        for method in ("DELETE", "GET", "PATCH", "POST", "PUT")
        for route in request.app.routes
        if route.matches({**request.scope, "method": method})[0] is Match.FULL
    }
    return found | ({"HEAD"} if "GET" in found else set())


def _as_refusal(error: Exception) -> APIError:
    match error:
        case APIError():
            return error
        case RequestValidationError():
            # The message leaves out the value: it may be a user's prompt.
            location, first = first_error(error.errors(), error.body)
            where = ".".join(str(part) for part in location)
            return APIError(400, f"{where or 'body'}: {first['msg']}", param=where or None, code="invalid")
        case HTTPException():
            return APIError(error.status_code, str(error.detail), code="http", headers=dict(error.headers or {}))
        case ReadOnlyError():
            return APIError(403, "this server serves a read-only copy", code="read_only")
        case ProperError():
            return APIError(500, without_places(str(error)), code="store")
    return APIError(500, "internal error; the server's log has the details", code="internal")
