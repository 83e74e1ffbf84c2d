"""The application: routes, errors and what surrounds them, put together around a running engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from proper.errors import ProperError
from proper.inference.runner import Runner
from proper.people.log import InteractionLog
from proper.serving.answers import Answers
from proper.serving.gate import Gate
from proper.serving.generation import generation_routes
from proper.serving.guard import Guard, refuse
from proper.serving.health import health_routes
from proper.serving.keys import Keys
from proper.serving.limits import ServeLimits, Turnstile
from proper.serving.metrics import Metrics
from proper.serving.page import page_routes
from proper.serving.people import deletion_routes, people_routes
from proper.serving.refusals import ErrorReply, Refusal
from proper.serving.watch import DeletionWatch
from proper.serving.worker import Worker


@dataclass(frozen=True)
class ServeSettings:
    """How a server behaves.

    Attributes:
        model: the name it answers to.
        version: the package's.
        open_without_keys: whether it answers everybody while there is no key.
        limits: what is refused.
        log_users: whether logs may hold user ids.
    """

    model: str
    version: str = "0"
    open_without_keys: bool = True
    limits: ServeLimits = field(default_factory=ServeLimits)
    log_users: bool = False


def create_app(
    runner: Runner, keys: Keys, settings: ServeSettings, log: Callable[[str], None], worker: Worker | None = None
) -> FastAPI:
    """Return the application. Runner and worker are started with it and stopped after its last reply."""
    store = runner.engine.model.store
    people = None if store is None else InteractionLog(store.folder)
    watch = None if store is None else DeletionWatch(runner.engine, store.folder, log)

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
            if people is not None:
                people.close()

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
        # Their pages load scripts from elsewhere; the document is at /openapi.json.
        docs_url=None,
        redoc_url=None,
    )
    metrics = Metrics(runner.engine, None if people is None else people.queue, worker)
    gate = Gate(keys, settings.open_without_keys)
    answers = Answers(runner, metrics, log)
    app.include_router(generation_routes(settings.model, answers, gate, Turnstile(settings.limits)))
    app.include_router(people_routes(runner.engine, people, gate))
    app.include_router(deletion_routes(runner.engine, people, gate))
    app.include_router(health_routes(runner, worker, metrics, gate))
    app.include_router(page_routes())
    app.add_exception_handler(Refusal, refuse)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(ProperError, _failed)
    app.add_middleware(
        Guard, body_bytes=settings.limits.body_bytes, metrics=metrics, log=log, log_users=settings.log_users
    )
    return app


async def _invalid(_: Any, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    # The value itself stays out of it: it may be somebody's prompt.
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    return await refuse(None, Refusal(400, f"{place or 'body'}: {first['msg']}", param=place or None, code="invalid"))


async def _http(_: Any, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    return await refuse(None, Refusal(error.status_code, str(error.detail), code="http", headers=headers))


async def _failed(_: Any, error: Exception) -> JSONResponse:
    return await refuse(None, Refusal(500, str(error), code="store"))
