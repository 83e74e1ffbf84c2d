"""Who may do what: the key of a request, the scopes of a route, the tenant of a user. Knows nothing about models."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable

from fastapi import Request

from proper.serving.errors import APIError
from proper.serving.keys import ANYBODY, DamagedKeysError, Keys, Principal, Scope

_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s\[\]:/?#@\\]+)(:[0-9]{1,5})?")
"""What a Host header may be: a name or an address, and a port; nothing that a URL has before or after them."""


class Authenticator:
    """Checks requests against keys.

    Args:
        keys: the keys.
        open_without: whether a server answers everybody that has never had a key; only one on loopback may.
    """

    def __init__(self, keys: Keys, open_without: bool) -> None:
        self.keys, self.open_without = keys, open_without

    def needs(self, *scopes: Scope) -> Callable[[Request], Principal]:
        """Return a dependency that lets in keys with one of these scopes."""

        async def check(request: Request) -> Principal:
            known = getattr(request.state, "principal", None)
            principal = self.principal(request) if known is None else known
            if not set(scopes) & set(principal.scopes):
                raise APIError(403, f"this key lacks the scope {' or '.join(scopes)}", code="scope")
            return principal

        return check  # type: ignore[return-value]

    def principal(self, request: Request) -> Principal:
        """Return who asks. It may read the file of keys.

        Raises:
            Refusal: 401 or 403; nobody known, or a server without keys is not asked from this machine.
        """
        if self.open_without and not self.keys.required:
            # A page from elsewhere may have a browser on this machine ask under a name of its own.
            if not is_loopback(asked_host(request)):
                raise APIError(403, "without keys only this machine may ask, and by its own name", code="host")
            return ANYBODY
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        try:
            principal = self.keys.principal(key.strip()) if scheme.lower() == "bearer" else None
        except DamagedKeysError as error:
            raise APIError(503, "the server's keys cannot be read", code="keys") from error
        if principal is None:
            why = "this key is not known" if key else "an API key is needed: Authorization: Bearer KEY"
            raise APIError(401, why, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return principal


def asked_host(request: Request) -> str:
    """Return the name or address by which a server was asked; empty where the request has not one plain Host header."""
    hosts = request.headers.getlist("host")
    found = _AUTHORITY.fullmatch(hosts[0]) if len(hosts) == 1 else None
    return "" if found is None else found[1].strip("[]").lower()


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def own_tenant(principal: Principal, asked: str | None) -> str:
    """Return the tenant a request is about.

    Raises:
        Refusal: 403 for another's, before anything is looked up: existing or not, the reply is the same.
    """
    if asked is not None and asked != principal.tenant:
        raise APIError(403, "this key may not name another tenant's users", code="tenant")
    return principal.tenant
