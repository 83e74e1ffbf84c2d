"""What a request's body may not hold, wherever it stands, and where an error in it is.

Half of a UTF-16 pair (JavaScript's `slice` cuts emoji in two) is valid JSON and no text: it cannot be encoded, written
to a file or put into a reply. Knows nothing about what bodies mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import Request

from proper.serving.errors import APIError

Place = tuple[str | int, ...]


async def whole_text(request: Request) -> None:
    """See that a body's texts are whole.

    Raises:
        Refusal: 400; names the place of a lone surrogate.
    """
    # Only these have bodies that anything reads, and FastAPI has read them by now.
    if request.method != "POST" or not may_hold_surrogates(await request.body()):
        return
    try:
        value = await request.json()
    except (ValueError, RecursionError):
        return  # no JSON: whoever needs a body refuses it
    refuse_lone_surrogates(value)


def refuse_lone_surrogates(value: Any) -> None:
    """See that all texts and keys of a parsed body are whole.

    Raises:
        Refusal: 400; names the place of a lone surrogate.
    """
    for place in lone_surrogates(value):
        name = ".".join(str(part) for part in place).encode("ascii", "backslashreplace").decode()
        raise APIError(
            400, f"{name or 'body'}: holds half of a character (a lone surrogate)", code="invalid", param=name
        )


def lone_surrogates(value: Any, place: Place = ()) -> Iterator[Place]:
    """Yield the places of texts and keys that are no text, in order."""
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
    """Return where in a request an error of pydantic's is; the names of a union's branches are no part of that."""
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
    """Return the first error and its place; of a union's branches, the one that got furthest.

    Of two that got as far, one that says more than that another type is expected.
    """
    placed = [(place_of(error, body), error) for error in errors]
    first = placed[0][0]
    same = [pair for pair in placed if pair[0][: len(first)] == first]
    return max(same, key=lambda pair: (len(pair[0]), not pair[1]["type"].endswith("_type")))


def may_hold_surrogates(body: bytes) -> bool:
    """Whether a body may hold a surrogate: most cannot, and need not be looked through."""
    try:
        return "\\ud" in body.decode().lower()
    except UnicodeDecodeError:
        return True  # bytes of one, or UTF-16


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
