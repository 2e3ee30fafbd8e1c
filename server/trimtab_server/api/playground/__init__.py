"""The playground: one page, from which a browser asks the gateway's own API.

All of it is in `index.html`; its policy lets it run and style itself by exactly the blocks in it, and talk
to where it came from.
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response

from trimtab_server.errors import NotFoundError

playground_routes = APIRouter()


@playground_routes.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
async def playground(request: Request) -> Response:
    """The page, for whoever asks: the key is for what it asks then."""
    if not request.app.state.gateway.settings.playground:
        raise NotFoundError("There is no playground here: it is switched off (`playground: false`)")
    return HTMLResponse(page(), headers=_headers())


@cache
def page() -> str:
    """The page as it stands."""
    return (files(__name__) / "index.html").read_text(encoding="utf-8")


@cache
def _headers() -> dict[str, str]:
    return {
        "Content-Security-Policy": _policy(page()),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        # A browser asks whether it is still the same, so that page and gateway are of one version.
        "Cache-Control": "no-cache",
    }


def _policy(html: str) -> str:
    directives = {
        "default-src": "'none'",
        "script-src": _hashes(html, "script"),
        "style-src": _hashes(html, "style"),
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return "; ".join(f"{name} {sources}" for name, sources in directives.items())


def _hashes(html: str, tag: str) -> str:
    """Each inline block of this tag, as the policy names it: by its SHA-256."""
    blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(block.encode()).digest()).decode() for block in blocks]
    return " ".join(f"'sha256-{digest}'" for digest in digests)
