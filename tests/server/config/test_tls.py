"""HTTPS on a real socket, with certificates of the test's own."""

from __future__ import annotations

import datetime as dt
import http.client
import ipaddress
import ssl
from pathlib import Path

import pytest

from serving import free_port
from trimtab_server.config.sections import Tls
from trimtab_server.config.tls import check_files, uvicorn_options
from trimtab_server.config.types import SettingsError

PASSWORD = "hunter2"


@pytest.fixture(scope="session")
def pem(tmp_path_factory) -> Path:
    """A self-signed certificate `c.pem` for 127.0.0.1, its key, plain and encrypted, and another key."""
    x509 = pytest.importorskip("cryptography.x509", reason="cryptography makes the certificates")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    directory = tmp_path_factory.mktemp("pem")

    def write(file: str, key, encryption) -> None:
        formats = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8)
        (directory / file).write_bytes(key.private_bytes(*formats, encryption))

    key = ec.generate_private_key(ec.SECP256R1())
    write("plain.key", key, serialization.NoEncryption())
    write("secret.key", key, serialization.BestAvailableEncryption(PASSWORD.encode()))
    write("other.key", ec.generate_private_key(ec.SECP256R1()), serialization.NoEncryption())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "trimtab")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (directory / "c.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return directory


def health(port: int, context: ssl.SSLContext) -> int:
    connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=5, context=context)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status
    finally:
        connection.close()


def test_the_gateway_speaks_https_and_its_log_keeps_the_password(serve, pem, monkeypatch):
    monkeypatch.setenv("TRIMTAB_TLS__KEYFILE_PASSWORD", PASSWORD)
    tls = {"certfile": str(pem / "c.pem"), "keyfile": str(pem / "secret.key")}
    gateway = serve(tls=tls, log_level="debug", port=free_port())
    trusting = ssl.create_default_context(cafile=pem / "c.pem")
    assert gateway.wait_for(lambda: health(gateway.port, trusting), seconds=60) == 200
    with pytest.raises(ssl.SSLCertVerificationError):
        health(gateway.port, ssl.create_default_context())
    with pytest.raises((http.client.HTTPException, OSError)):
        gateway.get("/health")
    assert gateway.stop() == 0
    assert PASSWORD not in gateway.log


def test_a_client_needs_a_certificate_where_one_is_asked_for(serve, pem):
    tls = {
        "certfile": str(pem / "c.pem"),
        "keyfile": str(pem / "plain.key"),
        "require_client_certificate": True,
        "ca_certs": str(pem / "c.pem"),
    }
    gateway = serve(tls=tls, port=free_port())
    known = ssl.create_default_context(cafile=pem / "c.pem")
    known.load_cert_chain(pem / "c.pem", pem / "plain.key")
    assert gateway.wait_for(lambda: health(gateway.port, known), seconds=60) == 200
    with pytest.raises((ssl.SSLError, ConnectionError, http.client.RemoteDisconnected)):
        health(gateway.port, ssl.create_default_context(cafile=pem / "c.pem"))


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"certfile": "missing.pem"}, r"tls\.certfile: .*missing\.pem can't be read"),
        ({"keyfile": "missing.key"}, r"tls\.keyfile: .*missing\.key can't be read"),
        ({"keyfile": "other.key"}, "tls: certfile, keyfile, keyfile_password: .*mismatch"),
        ({"keyfile": "secret.key"}, "tls: certfile, keyfile, keyfile_password: "),
        (
            {"keyfile": "secret.key", "keyfile_password": "wrong"},
            "tls: certfile, keyfile, keyfile_password: ",
        ),
        ({"keyfile": "c.pem"}, "tls: certfile, keyfile, keyfile_password: "),
        ({"ca_certs": "plain.key", "require_client_certificate": True}, "tls: ca_certs: "),
        ({"ciphers": "none-such"}, "tls: ciphers: "),
    ],
)
def test_files_that_do_not_fit_are_said_before_the_start(pem, files, said):
    given = {"certfile": "c.pem", "keyfile": "plain.key", **files}
    with pytest.raises(SettingsError, match=said):
        check_files(Tls.model_validate(given, context={"base": pem}))


def test_files_that_fit_are_uvicorns(pem):
    tls = Tls.model_validate({"certfile": "c.pem", "keyfile": "plain.key"}, context={"base": pem})
    options = uvicorn_options(tls)
    assert (options["ssl_keyfile"], options["ssl_cert_reqs"]) == (pem / "plain.key", ssl.CERT_NONE)
    assert uvicorn_options(None) == {}
