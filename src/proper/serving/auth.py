"""Authentication and authorization: API key of a request, scopes of a route, tenant of a user."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable

from fastapi import Request

from proper.serving.errors import APIError
from proper.serving.keys import ANONYMOUS, DamagedKeysError, Keys, Principal, Scope

_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s\[\]:/?#@\\]+)(:[0-9]{1,5})?")
"""A valid Host header: a name or an address, and optionally a port; no scheme, user or path."""


class Authenticator:
    """Authenticates requests by API key.

    Args:
        keys: the keys.
        open_without: whether requests need no key as long as there has never been one; only for a server on loopback.
    """

    def __init__(self, keys: Keys, open_without: bool) -> None:
        self.keys, self.open_without = keys, open_without

    def needs(self, *scopes: Scope) -> Callable[[Request], Principal]:
        """Return a FastAPI dependency that requires a key with one of these scopes."""

        async def check(request: Request) -> Principal:
            known = getattr(request.state, "principal", None)
            principal = self.principal(request) if known is None else known
            if not set(scopes) & set(principal.scopes):
                raise APIError(403, f"this key lacks the scope {' or '.join(scopes)}", code="scope")
            return principal

        return check  # type: ignore[return-value]

    def principal(self, request: Request) -> Principal:
        """Return the principal of a request. It may read the key file.

        Raises:
            APIError: 401: the key is missing or unknown. 403: the server has no keys and the request does not name a
                loopback host. 503: the key file cannot be read.
        """
        if self.open_without and not self.keys.required:
            # DNS rebinding: a foreign page may have a browser on this machine ask under the page's own host name.
            if not is_loopback(request_host(request)):
                raise APIError(
                    403,
                    "a server without keys answers only under a loopback host name",
                    code="host",
                )
            return ANONYMOUS
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        try:
            principal = self.keys.principal(key.strip()) if scheme.lower() == "bearer" else None
        except DamagedKeysError as error:
            raise APIError(503, "the server's keys cannot be read", code="keys") from error
        if principal is None:
            why = "the API key is unknown" if key else "an API key is required: Authorization: Bearer KEY"
            raise APIError(401, why, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return principal


def request_host(request: Request) -> str:
    """Return the host of a request's Host header, without the port; empty if there is not exactly one valid header."""
    hosts = request.headers.getlist("host")
    found = _AUTHORITY.fullmatch(hosts[0]) if len(hosts) == 1 else None
    return "" if found is None else found[1].strip("[]").lower()


def is_loopback(host: str) -> bool:
    """Return whether a host name or address is a loopback one."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def own_tenant(principal: Principal, tenant: str | None) -> str:
    """Return the tenant of a request.

    Raises:
        APIError: 403 for another tenant, before any look-up: the reply does not tell whether that tenant exists.
    """
    if tenant is not None and tenant != principal.tenant:
        raise APIError(403, "this key belongs to another tenant", code="tenant")
    return principal.tenant
