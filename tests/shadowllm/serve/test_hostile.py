"""Hostile and broken clients: one clear error each, and no slot is lost."""

from __future__ import annotations

import json
import socket
import time

import pytest

from tests.shadowllm.serve.conftest import record_of, running

pytestmark = pytest.mark.usefixtures("one_thread")


def connect(server):
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


def request(body: bytes, kind="application/json", path="/v1/completions", length=None) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: {length or len(body)}\r\n\r\n"
    return head.encode() + body


def answer(connection) -> tuple[int, dict]:
    """Status and JSON of the answer."""
    data = b""
    while b"\r\n\r\n" not in data:
        part = connection.recv(65536)
        assert part, data
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    while len(body) < length:
        body += connection.recv(65536)
    return int(head.split()[1]), json.loads(body)


def completion(**options) -> bytes:
    return request(json.dumps({"prompt": "Hello", "max_tokens": 4} | options).encode())


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (request(b"{"), 400),
        (request(b""), 400),
        (request(b"[]"), 400),
        (request(b"null"), 400),
        (request(b'{"prompt": "\xff"}'), 400),
        (request(b'{"prompt": "a\\ud800"}'), 400),
        (request(b'{"prompt": "x", "stop": "\\udfff"}'), 400),
        (request(b'{"prompt": "x", "temperature": NaN}'), 400),
        (request(b'{"prompt": "x", "temperature": 1e999}'), 400),
        (request(b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}"), 400),
        (request(b'{"prompt": ' + b"[" * 100000 + b"]" * 100000 + b"}"), 400),
        (request(b'{"prompt": "x", "n": "1"}'), 400),
        (request(b'{"prompt": ["x", 1]}'), 400),
        (request(b'{"prompt": true}'), 400),
        (request(b'{"prompt": "' + b"x" * 1_000_000 + b'"}'), 400),
        (request(b'{"prompt": [' + b"5," * 300_000 + b"5]}"), 400),
        (request(b'{"prompt": [5, 97]}'), 400),
        (request(b'{"prompt": [-1]}'), 400),
        (request(b'{"prompt": "x"}', kind="text/plain"), 415),
        (request(b"", length=1 << 30), 413),
        (request(b"{}", path="/v1/nothing"), 404),
        (b"DELETE /v1/completions HTTP/1.1\r\nHost: x\r\n\r\n", 405),
    ],
)
def test_one_clear_error(server, sent, status):
    with connect(server) as connection:
        connection.sendall(sent)
        found, content = answer(connection)
    assert found == status
    assert content["error"]["message"]
    assert "Traceback" not in content["error"]["message"]
    assert server.is_idle()


def test_a_body_without_a_length_is_limited_too(server):
    with connect(server) as connection:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        part = b"x" * 65536
        for _ in range(17):
            connection.sendall(b"10000\r\n" + part + b"\r\n")
        assert answer(connection)[0] == 413


def test_what_is_not_http(server):
    with connect(server) as connection:
        connection.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("half", [True, False])
def test_a_client_that_goes_away_frees_its_slot(server, stream, half):
    cancelled = server.engine.counters.outcomes["cancelled"]
    # Several long texts, so that they are not complete before the connection is closed.
    sent = completion(prompt=["a", "b", "c", "d"], n=2, max_tokens=60, stream=stream, temperature=5.0)
    with connect(server) as connection:
        connection.sendall(sent)
        while not server.engine.running:
            time.sleep(0.001)
        if half:
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):  # until the server closes too
                pass
    assert server.is_idle()
    assert server.engine.counters.outcomes["cancelled"] > cancelled
    assert record_of(server, "/v1/completions")["outcome"] == "cancelled"


def test_a_client_that_does_not_read_holds_no_slot(server):
    """Its texts are computed and wait for it, while others are served."""
    with connect(server) as deaf:
        deaf.sendall(completion(n=8, max_tokens=60, stream=True, temperature=5.0, logprobs=20))
        with connect(server) as good:
            good.sendall(completion())
            assert answer(good)[0] == 200
        assert server.is_idle()
        data = b""
        while b"[DONE]" not in data:
            part = deaf.recv(1 << 20)
            assert part, data[-1000:]
            data += part
    assert data.count(b'"finish_reason":"') == 8


def test_a_wrong_key_takes_no_slot(bundle):
    with running(bundle(), keys=["right-key"]) as server:
        for value in ("Bearer wrong-key", "Bearer", "Basic right-key", "right-key", "Bearer " + "x" * 5000, "\xff"):
            with connect(server) as connection:
                head, body = completion(n=8, max_tokens=60).split(b"\r\n\r\n")
                head += b"\r\nAuthorization: " + value.encode("latin-1")
                connection.sendall(head + b"\r\n\r\n" + body)
                found, content = answer(connection)
            assert (found, content["error"]["code"]) == (401, "invalid_api_key")
            assert not server.engine.counters.prompt_tokens
        assert server.is_idle()


def read_until_closed(connection) -> int:
    """Number of bytes until the server closes the connection. It must do so within the time limit of the socket."""
    count = 0
    try:
        while part := connection.recv(1 << 20):
            count += len(part)
    except ConnectionError:  # it was reset
        pass
    return count


def test_slow_clients_are_closed(bundle):
    """One sends nothing, one a part of a request, one a part behind another request, one does not read.

    The others are served meanwhile.
    """
    with running(bundle(), transfer_timeout=0.5) as server:
        silent, partial, behind, deaf = (connect(server) for _ in range(4))
        with silent, partial, behind, deaf:
            partial.sendall(completion()[:-5])
            behind.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" + completion()[:-5])
            size = len(server.get("/page.js")[2])
            wanted = 20_000_000 // size  # more than the buffers of both sides hold
            deaf.sendall(b"GET /page.js HTTP/1.1\r\nHost: x\r\n\r\n" * wanted + b"G")
            with connect(server) as good:
                good.sendall(completion())
                assert answer(good)[0] == 200
            assert read_until_closed(silent) == 0
            read_until_closed(partial)
            read_until_closed(behind)
            time.sleep(1.5)
            assert read_until_closed(deaf) < wanted * size
        assert server.is_idle()
