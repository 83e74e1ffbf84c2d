"""FastAPI application factory: routes, middleware and error handlers around a running engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from proper.errors import ProperError, ReadOnlyError
from proper.inference.engine_thread import EngineThread
from proper.interactions.log import InteractionLog
from proper.serving.admission import Admission
from proper.serving.answers import Answers
from proper.serving.auth import Authenticator
from proper.serving.body_checks import right_cause, whole_text
from proper.serving.deletion_watch import DeletionWatch
from proper.serving.errors import APIError, ErrorReply, one_line, without_folders
from proper.serving.fit_process import FitProcess
from proper.serving.generation import generation_routes
from proper.serving.health import health_routes
from proper.serving.keys import Keys
from proper.serving.metrics import Metrics
from proper.serving.middleware import RequestMiddleware, reply
from proper.serving.page import page_routes
from proper.serving.rate_limits import RateLimiter, ServeLimits
from proper.serving.request_checks import RequestChecks
from proper.serving.users import deletion_routes, people_routes


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
    runner: EngineThread,
    keys: Keys,
    settings: ServeSettings,
    log: Callable[[str], None],
    worker: FitProcess | None = None,
) -> FastAPI:
    """Return the application. It starts the engine thread and the fit worker, and stops them after its last reply."""
    store = runner.engine.model.store

    def note(line: str) -> None:
        log(one_line(line))

    people = None if store is None else InteractionLog(store.folder)
    # A separate connection: reading metrics does not wait for writes.
    watched = None if store is None else InteractionLog(store.folder)
    watch = None if store is None or store.manifest.read_only else DeletionWatch(runner.engine, store.folder, note)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
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
            for one in (people, watched):
                if one is not None:
                    one.close()

    replies: dict[int | str, dict[str, Any]] = {
        "4XX": {"model": ErrorReply, "description": "Refused."},
        "5XX": {"model": ErrorReply, "description": "Failed."},
    }
    app = FastAPI(
        title="proper",
        version=settings.version,
        description="One model, personal for each `user`. OpenAI-compatible.",
        lifespan=lifespan,
        responses=replies,
        dependencies=[Depends(whole_text)],
        # FastAPI's documentation pages load scripts from a CDN; the schema is at /openapi.json.
        docs_url=None,
        redoc_url=None,
    )
    metrics = Metrics(runner.engine, None if watched is None else watched.queue, worker)
    gate = Authenticator(keys, settings.open_without_keys)
    answers, turnstile = Answers(runner, metrics, note), RateLimiter(settings.limits)
    app.include_router(generation_routes(settings.model, answers, gate, turnstile))
    app.include_router(people_routes(runner.engine, people, gate))
    app.include_router(deletion_routes(runner.engine, people, gate))
    app.include_router(health_routes(runner, worker, metrics, gate))
    app.include_router(page_routes())
    _explain_errors(app, None if store is None else store.folder.parent, note)
    app.add_middleware(RequestChecks)
    # Outside of the request checks: requests that they refuse count towards the rate.
    app.add_middleware(Admission, gate=gate, turnstile=turnstile)
    app.add_middleware(
        RequestMiddleware,
        body_bytes=settings.limits.body_bytes,
        metrics=metrics,
        log=note,
        log_users=settings.log_users,
    )
    return app


def _explain_errors(app: FastAPI, run: Path | None, log: Callable[[str], None]) -> None:
    """Install handlers that turn every error into an `ErrorReply`; server-side paths go to the log only."""

    async def refused(_: Any, error: Exception) -> JSONResponse:
        refusal = _as_refusal(error)
        if isinstance(error, ProperError):
            log(f"{type(error).__name__}: {error}")
        if run is not None:
            refusal.message = without_folders(refusal.message, run)
        return reply(refusal)

    for kind in (APIError, RequestValidationError, HTTPException, ProperError, Exception):
        app.add_exception_handler(kind, refused)


def _as_refusal(error: Exception) -> APIError:
    match error:
        case APIError():
            return error
        case RequestValidationError():
            # The message leaves out the value: it may be a user's prompt.
            place, first = right_cause(error.errors(), error.body)
            where = ".".join(str(part) for part in place)
            return APIError(400, f"{where or 'body'}: {first['msg']}", param=where or None, code="invalid")
        case HTTPException():
            return APIError(error.status_code, str(error.detail), code="http", headers=dict(error.headers or {}))
        case ReadOnlyError():
            return APIError(403, "this server serves a read-only copy", code="read_only")
        case ProperError():
            return APIError(500, str(error), code="store")
    return APIError(500, "the server failed; its log says where", code="internal")
