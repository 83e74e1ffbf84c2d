"""Error replies of the API: one exception, `APIError`, serialized in OpenAI's error format."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from proper.errors import ProperError


class ErrorBody(BaseModel):
    """An error in OpenAI's format."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(BaseModel):
    """The body of every error reply."""

    error: ErrorBody


class APIError(ProperError):
    """A refused or failed request; `status` is the HTTP status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, headers or {}

    def body(self) -> dict[str, Any]:
        """Return the reply's JSON."""
        kind = "server_error" if self.status >= 500 else _KINDS.get(self.status, "invalid_request_error")
        return ErrorReply(
            error=ErrorBody(message=self.message, type=kind, param=self.param, code=self.code)
        ).model_dump()


def without_folders(text: str, run: Path) -> str:
    """Return an error's text with paths relative to the run folder: clients do not learn where the folder is."""
    for folder in {str(run.absolute()), str(run.resolve())}:
        text = text.replace(f"{folder}/", "").replace(folder, run.name)
    return text


def without_places(text: str) -> str:
    """Return a failure's text without the places of the run's database and bucket, for clients.

    A driver's message may have the database's host in any place, so nothing of it is kept.
    """
    if "postgresql://" in text:
        return "the run's database cannot be used; the server's log has the details"
    return re.sub(r"s3://\S*/", "(bucket)/", text)


def hide_users(text: str) -> str:
    """Return a log message without user ids; messages name a user as `user 'ID'`, in Python's own quotes."""
    return _QUOTED_USER.sub("user (hidden)", text)


def one_line(text: str) -> str:
    """Return a log message with its control characters escaped, so that each event is one line."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_QUOTED_USER = re.compile(r"""\buser ('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")""")
