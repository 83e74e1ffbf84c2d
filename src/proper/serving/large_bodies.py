"""Route class that parses and validates large JSON bodies on a thread, and limits their number of values and errors."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any, cast

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError
from starlette.requests import ClientDisconnect

from proper.serving.body_checks import may_hold_surrogates, refuse_lone_surrogates
from proper.serving.errors import APIError
from proper.serving.thread_limits import LimitedThreads

LARGE = 1 << 16
"""Size in bytes above which a body is not parsed on the event loop."""
VALUES = 100_000
"""Most values and keys of one body: the time to validate it, and to refuse it, grows with their number."""
ERRORS = 100
"""Most validation errors of a body that are reported one by one."""
_THREADS = LimitedThreads(2)

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class CheckedRoute(APIRoute):
    """A route whose large bodies are validated off the event loop."""

    def get_route_handler(self) -> Handler:
        """Return the request handler."""
        handle, field = super().get_route_handler(), self.body_field
        if field is None:
            return handle
        model: TypeAdapter[Any] = TypeAdapter(cast(Any, field.field_info.annotation))

        async def checked(request: Request) -> Response:
            try:
                body = await request.body()
            except ClientDisconnect as error:
                raise APIError(499, "the client has gone") from error
            if len(body) > LARGE and "json" in request.headers.get("content-type", ""):
                principal = getattr(request.state, "principal", None)
                key = "" if principal is None else principal.id
                value = await _THREADS.run(key, lambda: _validated(body, model))
                if value is not None:
                    request._json = value  # the cache of `request.json()`
            return await handle(request)

        return checked


def _validated(body: bytes, model: TypeAdapter[Any]) -> Any:
    """Return a body as its model; as plain values if it has few errors; None if it is not JSON.

    Raises:
        APIError: 400; it has too many values or errors, or a lone surrogate.
    """
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None  # a route that needs the body refuses it
    if _more_values_than(value, VALUES):
        raise APIError(400, f"body: holds more than {VALUES} values", code="invalid")
    # Checked here, because a validated model can no longer be searched.
    if may_hold_surrogates(body):
        refuse_lone_surrogates(value)
    try:
        return model.validate_python(value)
    except ValidationError as error:
        if error.error_count() > ERRORS:
            raise APIError(400, f"body: {error.error_count()} values are invalid", code="invalid") from error
        return value


def _more_values_than(value: Any, most: int) -> bool:
    left, count = [value], 0
    while left:
        one = left.pop()
        if isinstance(one, dict | list):
            count += len(one)
            if count > most:
                return True
            left.extend(one.values() if isinstance(one, dict) else one)
    return False
