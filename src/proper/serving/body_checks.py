"""Checks of JSON request bodies: refuses lone surrogates, and maps pydantic errors to the field they belong to.

A lone surrogate is half of a UTF-16 pair (JavaScript's `slice` cuts emoji in two). It is valid JSON but not valid text:
it cannot be encoded, written to a file or put into a reply.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import Request

from proper.serving.errors import APIError

Place = tuple[str | int, ...]


async def whole_text(request: Request) -> None:
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
    for place in lone_surrogates(value):
        name = ".".join(str(part) for part in place).encode("ascii", "backslashreplace").decode()
        raise APIError(
            400, f"{name or 'body'}: holds half of a character (a lone surrogate)", code="invalid", param=name
        )


def lone_surrogates(value: Any, place: Place = ()) -> Iterator[Place]:
    """Yield the paths of texts and keys that contain a lone surrogate, in order."""
    if isinstance(value, str) and not _is_text(value):
        yield place
    elif isinstance(value, dict):
        for key, inner in value.items():
            if not _is_text(key):
                yield (*place, key)
            yield from lone_surrogates(inner, (*place, key))
    elif isinstance(value, list):
        for at, inner in enumerate(value):
            yield from lone_surrogates(inner, (*place, at))


def place_of(error: dict[str, Any], body: Any) -> Place:
    """Return the path in the request body of a pydantic error, without the names of union branches."""
    if error["loc"][:1] != ("body",):
        return tuple(error["loc"])
    place: list[str | int] = []
    parts: Sequence[str | int] = error["loc"][1:]
    for part in parts:
        held: Any = body if isinstance(body, dict) else dict(enumerate(body)) if isinstance(body, list) else {}
        if part in held:
            place.append(part)
            body = held[part]
        elif error["type"] == "missing" and part == parts[-1]:
            place.append(part)
    return tuple(place)


def right_cause(errors: Sequence[dict[str, Any]], body: Any) -> tuple[Place, dict[str, Any]]:
    """Return the path of the first error and the error; of a union's branches, the error with the longest path.

    Of two with equally long paths, an error other than a type mismatch is preferred.
    """
    placed = [(place_of(error, body), error) for error in errors]
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
