"""API keys and admin keys of requests."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Collection

from fastapi import Request

from trimtab_server.config.schema import Settings
from trimtab_server.errors import ForbiddenError, UnauthorizedError


def require_key(request: Request, settings: Settings) -> None:
    """Reject a request without an API key or admin key, if API keys are configured.

    Raises:
        UnauthorizedError: the key is missing or wrong.
    """
    if settings.api_keys and not _carries_one_of(request, settings.api_keys | settings.admin_keys):
        raise UnauthorizedError("A valid API key is needed. Send the header Authorization: Bearer KEY")


def require_admin(request: Request, settings: Settings) -> None:
    """Reject a request without an admin key.

    Raises:
        ForbiddenError: no admin keys are configured, or the request has an API key only.
        UnauthorizedError: the key is missing or wrong.
    """
    if not settings.admin_keys:
        raise ForbiddenError("Admin endpoints are disabled. Set `admin_keys_file` or TRIMTAB_ADMIN_KEYS")
    if _carries_one_of(request, settings.admin_keys):
        return
    if _carries_one_of(request, settings.api_keys):
        raise ForbiddenError("This endpoint needs an admin key, got an API key")
    raise UnauthorizedError("This endpoint needs an admin key. Send the header Authorization: Bearer KEY")


def _carries_one_of(request: Request, keys: Collection[str]) -> bool:
    """Compare with every key in constant time. Digests all have the same length."""
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    digest = hashlib.sha256(given.strip().encode()).digest()
    matches = [hmac.compare_digest(digest, hashlib.sha256(key.encode()).digest()) for key in keys]
    return scheme.lower() == "bearer" and any(matches)
