"""HTTPS: what the configuration says of it, in uvicorn's words."""

from __future__ import annotations

import os
import ssl
from typing import Any

from trimtab_server.config.sections import Tls
from trimtab_server.config.types import SettingsError


def uvicorn_options(tls: Tls | None) -> dict[str, Any]:
    """Arguments of `uvicorn.Config`.

    Raises:
        SettingsError: a file can't be read, is none of its kind, or does not fit the others.
    """
    if tls is None:
        return {}
    check_files(tls)
    return {
        "ssl_certfile": tls.certfile,
        "ssl_keyfile": tls.keyfile,
        "ssl_keyfile_password": _password(tls) or None,
        "ssl_ca_certs": tls.ca_certs,
        "ssl_cert_reqs": ssl.CERT_REQUIRED if tls.require_client_certificate else ssl.CERT_NONE,
        "ssl_ciphers": tls.ciphers,
    }


def check_files(tls: Tls) -> None:
    """Read what uvicorn is going to read, so that a mistake is said in the words of the configuration.

    Raises:
        SettingsError: a file can't be read, is none of its kind, or does not fit the others.
    """
    for name, path in (("certfile", tls.certfile), ("keyfile", tls.keyfile), ("ca_certs", tls.ca_certs)):
        if path is not None and not os.access(path, os.R_OK):
            raise SettingsError(f"tls.{name}: {path} can't be read")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    place = "certfile, keyfile, keyfile_password"
    try:
        # A password in any case: without one, OpenSSL asks for it on the terminal.
        context.load_cert_chain(tls.certfile, tls.keyfile, lambda: _password(tls))
        place = "ca_certs"
        if tls.ca_certs is not None:
            context.load_verify_locations(tls.ca_certs)
        place = "ciphers"
        if tls.ciphers is not None:
            context.set_ciphers(tls.ciphers)
    except OSError as error:
        raise SettingsError(f"tls: {place}: {_reason(error)}") from error


def _reason(error: OSError) -> str:
    """OpenSSL's words without the place in its sources."""
    return str(error).partition(" (_ssl.c:")[0]


def _password(tls: Tls) -> str:
    return "" if tls.keyfile_password is None else tls.keyfile_password.get_secret_value()
