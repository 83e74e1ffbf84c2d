"""JSON request bodies: parsing, validation of large ones on a thread, lone surrogates, the field of a pydantic error.

A lone surrogate is half of a UTF-16 pair (JavaScript's `slice` cuts emoji in two). It is valid JSON but not valid text:
it cannot be encoded, written to a file or put into a reply.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any, cast

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError
from starlette.requests import ClientDisconnect

from proper.serving.errors import APIError
from proper.serving.limits import LimitedThreads

Location = tuple[str | int, ...]


async def check_surrogates(request: Request) -> None:
    """Check that a request body contains no lone surrogates; a FastAPI dependency.

    Raises:
        APIError: 400; names the field with the lone surrogate.
    """
    # Only POST routes read a body, and FastAPI has read it by now.
    if request.method != "POST" or not may_hold_surrogates(await request.body()):
        return
    try:
        value = await request.json()
    except (ValueError, RecursionError):
        return  # not JSON: a route that needs a body refuses it
    refuse_lone_surrogates(value)


def refuse_lone_surrogates(value: Any) -> None:
    """Check that no text and no key of a parsed body contains a lone surrogate.

    Raises:
        APIError: 400; names the field with the lone surrogate.
    """
    for location in lone_surrogates(value):
        name = ".".join(str(part) for part in location).encode("ascii", "backslashreplace").decode()
        raise APIError(
            400, f"{name or 'body'}: contains a lone surrogate (half of a UTF-16 pair)", code="invalid", param=name
        )


def lone_surrogates(value: Any, location: Location = ()) -> Iterator[Location]:
    """Yield the paths of texts and keys that contain a lone surrogate, in order."""
    if isinstance(value, str) and not _is_text(value):
        yield location
    elif isinstance(value, dict):
        for key, inner in value.items():
            if not _is_text(key):
                yield (*location, key)
            yield from lone_surrogates(inner, (*location, key))
    elif isinstance(value, list):
        for at, inner in enumerate(value):
            yield from lone_surrogates(inner, (*location, at))


def error_location(error: dict[str, Any], body: Any) -> Location:
    """Return the path in the request body of a pydantic error, without the names of union branches."""
    if error["loc"][:1] != ("body",):
        return tuple(error["loc"])
    location: list[str | int] = []
    parts: Sequence[str | int] = error["loc"][1:]
    for part in parts:
        inner: Any = body if isinstance(body, dict) else dict(enumerate(body)) if isinstance(body, list) else {}
        if part in inner:
            location.append(part)
            body = inner[part]
        elif error["type"] == "missing" and part == parts[-1]:
            location.append(part)
    return tuple(location)


def first_error(errors: Sequence[dict[str, Any]], body: Any) -> tuple[Location, dict[str, Any]]:
    """Return the path of the first error and the error; of a union's branches, the error with the longest path.

    Of two with equally long paths, an error other than a type mismatch is preferred.
    """
    placed = [(error_location(error, body), error) for error in errors]
    first = placed[0][0]
    same = [pair for pair in placed if pair[0][: len(first)] == first]
    return max(same, key=lambda pair: (len(pair[0]), not pair[1]["type"].endswith("_type")))


def may_hold_surrogates(body: bytes) -> bool:
    """Return whether a body may contain a surrogate; a cheap check that spares most bodies the full search."""
    try:
        return "\\ud" in body.decode().lower()
    except UnicodeDecodeError:
        return True  # an encoded surrogate, or UTF-16


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


LARGE = 1 << 16
"""Size in bytes above which a body is not parsed on the event loop."""
MAX_VALUES = 100_000
"""Most values and keys of one body: the time to validate it, and to refuse it, grows with their number."""
MAX_ERRORS = 100
"""Most validation errors of a body that are reported one by one."""
_THREADS = LimitedThreads(2)

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class CheckedRoute(APIRoute):
    """A route that refuses a body that is not plain JSON, and validates a large one off the event loop."""

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
                raise APIError(499, "the client disconnected") from error
            if body:
                _require_plain_json(request.headers)
                principal = getattr(request.state, "principal", None)
                key = "" if principal is None else principal.id
                large = len(body) > LARGE
                # `_json` is the cache of `request.json()`.
                request._json = await _THREADS.run(key, lambda: _validated(body, model)) if large else _parsed(body)
            return await handle(request)

        return checked


def is_json(kind: str) -> bool:
    """Return whether a Content-Type is JSON."""
    kind = kind.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def _require_plain_json(headers: Mapping[str, str]) -> None:
    """Check the headers of a request with a body.

    Raises:
        APIError: 415; the body is not JSON, or is compressed.
    """
    if not is_json(headers.get("content-type", "")):
        raise APIError(415, "the body needs the header Content-Type: application/json", code="content_type")
    coding = headers.get("content-encoding", "identity")
    if coding.strip().lower() != "identity":
        raise APIError(415, "a body with the header Content-Encoding is not supported", code="content_encoding")


def _parsed(body: bytes) -> Any:
    """Return the value of a JSON body.

    Raises:
        APIError: 400; it is not JSON, its encoding is not Unicode, or it is nested too deeply.
    """
    try:
        return json.loads(body)
    except RecursionError as error:
        raise APIError(400, "body: nested too deeply", code="invalid") from error
    except UnicodeDecodeError as error:
        raise APIError(400, f"body: not UTF-8 at byte {error.start}", code="invalid") from error
    except json.JSONDecodeError as error:
        why = f"{error.msg} at line {error.lineno}, column {error.colno}"
        raise APIError(400, f"body: not JSON: {why}", code="invalid") from error
    except ValueError as error:  # more digits than Python reads
        raise APIError(400, "body: a number is too long", code="invalid") from error


def _validated(body: bytes, model: TypeAdapter[Any]) -> Any:
    """Return a body as its model; as plain values if it has few errors.

    Raises:
        APIError: 400; it is not JSON, has too many values or errors, or a lone surrogate.
    """
    value = _parsed(body)
    if _more_values_than(value, MAX_VALUES):
        raise APIError(400, f"body: more than {MAX_VALUES} values", code="invalid")
    # Checked here, because a validated model can no longer be searched.
    if may_hold_surrogates(body):
        refuse_lone_surrogates(value)
    try:
        return model.validate_python(value)
    except ValidationError as error:
        if error.error_count() > MAX_ERRORS:
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
