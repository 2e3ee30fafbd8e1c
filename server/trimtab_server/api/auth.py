"""Who may do what: the keys that requests carry."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Collection

from fastapi import Request

from trimtab_server.config.schema import Settings
from trimtab_server.errors import ForbiddenError, UnauthorizedError


def require_key(request: Request, settings: Settings) -> None:
    """Refuse a request without one of the API or admin keys, where there are API keys.

    Raises:
        UnauthorizedError: it has none, or a wrong one.
    """
    if settings.api_keys and not _carries_one_of(request, settings.api_keys | settings.admin_keys):
        raise UnauthorizedError("A valid API key is needed: Authorization: Bearer KEY")


def require_admin(request: Request, settings: Settings) -> None:
    """Refuse a request without one of the admin keys.

    Raises:
        ForbiddenError: there are none, or it has an API key, which does not do.
        UnauthorizedError: it has no key, or a wrong one.
    """
    if not settings.admin_keys:
        raise ForbiddenError("Nobody may do this: the gateway has no admin keys")
    if _carries_one_of(request, settings.admin_keys):
        return
    if _carries_one_of(request, settings.api_keys):
        raise ForbiddenError("An admin key is needed, an API key does not do")
    raise UnauthorizedError("An admin key is needed: Authorization: Bearer KEY")


def _carries_one_of(request: Request, keys: Collection[str]) -> bool:
    """Compare with every key, in a time that says nothing of any: digests are of one length."""
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    digest = hashlib.sha256(given.strip().encode()).digest()
    matches = [hmac.compare_digest(digest, hashlib.sha256(key.encode()).digest()) for key in keys]
    return scheme.lower() == "bearer" and any(matches)
