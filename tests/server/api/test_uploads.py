"""Large uploads pass through the gateway by way of a temporary file, not of its memory."""

from __future__ import annotations

import re
import socket
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import httpx
import pytest

from served import served
from trimtab_server.engines.messages import UpstreamRequest

MIB = 2**20
UPLOAD = 30 * MIB
HEAD = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
HEADERS = {"content-type": "multipart/form-data; boundary=x"}
PATH = "/v1/audio/transcriptions?digest"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory, pack):
    directory = tmp_path_factory.mktemp("uploads")
    with served(directory, controls={"one": str(pack)}, log_prompts=True) as started:
        yield started.wait_until_ready()


def tail(model: str) -> bytes:
    return f'\r\n--x\r\nContent-Disposition: form-data; name="model"\r\n\r\n{model}\r\n--x--\r\n'.encode()


def form(model: str, size: int = UPLOAD) -> bytes:
    """A form whose model stands behind the file."""
    return HEAD + b"\r\n-" * (size // 3) + tail(model)


def paced(body: bytes, seconds: float):
    """The body in pieces, as a slow client sends it."""
    pieces = [body[start : start + MIB] for start in range(0, len(body), MIB)]
    for piece in pieces:
        yield piece
        time.sleep(seconds / len(pieces))


def memory(pid: int, key: str) -> int:
    """What the kernel says of a process, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(rf"{key}:\s+(\d+)", status)[1]) * 1024


def upload(gateway, content, **headers):
    return httpx.post(gateway.url + PATH, content=content, headers=HEADERS | headers, timeout=120)


def test_four_uploads_at_once_take_no_memory(gateway):
    assert upload(gateway, form("m", MIB)).status_code == 200
    body, pid = form("m"), gateway.process.pid
    Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak so far is forgotten
    before = memory(pid, "VmRSS")
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: upload(gateway, paced(body, 2)), range(4)))
    expected = {"sha256": sha256(body).hexdigest(), "bytes": len(body)}
    assert [answer.json() for answer in answers] == [expected] * 4
    assert memory(pid, "VmHWM") - before < 16 * MIB
    assert gateway.leftovers == [path for path in gateway.leftovers if path.is_dir()]


def test_a_file_can_be_sent_again_after_a_worker_that_took_no_connection():
    with tempfile.TemporaryFile() as file:
        file.write(b"a form")
        file.flush()
        call = UpstreamRequest("POST", PATH, [], file)
        for _ in range(2):
            with call.open_body() as body:
                assert body.read() == b"a form"


def test_an_alias_behind_a_large_file_is_resolved_and_nothing_else_changes(gateway):
    for content in (form("m:one"), paced(form("m:one"), 0)):
        answer = upload(gateway, content).json()
        assert answer == {"sha256": sha256(form("m")).hexdigest(), "bytes": len(form("m"))}


def test_an_upload_that_is_too_large_is_refused_whether_its_length_is_announced_or_not(gateway):
    for content in (form("m", 33 * MIB), paced(form("m", 33 * MIB), 0)):
        try:
            answer = upload(gateway, content)
        except httpx.WriteError:
            continue  # the gateway has answered and hung up before all was sent
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


def test_the_log_shows_the_beginning_of_an_upload_and_its_size(gateway):
    body = form("m", MIB)
    assert upload(gateway, body).status_code == 200
    gateway.wait_for(lambda: f'bytes={len(body)} body="--x' in gateway.log)


def test_a_client_that_leaves_midway_leaves_nothing_behind(gateway):
    body = form("m")
    with socket.create_connection(("127.0.0.1", gateway.port)) as client:
        head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: {HEADERS['content-type']}\r\n"
        client.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body[: 2 * MIB])
    descriptors = Path(f"/proc/{gateway.process.pid}/fd")
    gateway.wait_for(lambda: not any("(deleted)" in str(fd.readlink()) for fd in descriptors.iterdir()))
