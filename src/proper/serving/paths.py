"""User ids in URL paths: one percent-encoded segment each, whatever characters the id has.

Frameworks decode a path before they match it, so that the user "a/versions" could not be distinguished from the
versions of the user "a". Here the undecoded path is matched.
"""

from __future__ import annotations

from typing import Annotated
from urllib.parse import unquote_to_bytes

from fastapi import Path
from starlette.routing import Match
from starlette.types import Scope

from proper.serving.errors import APIError
from proper.serving.large_bodies import CheckedRoute


class RawRoute(CheckedRoute):
    """A route that is matched against the undecoded path."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Return whether a request matches this route, and its scope."""
        raw = scope.get("raw_path")
        return super().matches(scope if raw is None else {**scope, "path": raw.decode("ascii")})


def user_in_path(user: Annotated[str, Path(description="The user's id, percent-encoded as one segment.")]) -> str:
    """Return the user id that a path names.

    Raises:
        APIError: 400; its bytes are not UTF-8.
    """
    try:
        return unquote_to_bytes(user).decode()
    except UnicodeDecodeError as error:
        raise APIError(400, "user: not UTF-8", code="invalid", param="user") from error
