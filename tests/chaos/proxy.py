"""Storage weather: an HTTP proxy between S3 clients and a real S3 server that throttles, stalls, cuts and resets.

What befalls a request is decided by the seed, its method, its path and how often that was asked before, not by the
clock or by what runs beside it; and no request suffers more than `PATIENCE` times in a row, so that a client that
tries again gets there.
"""

from __future__ import annotations

import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal, cast
from urllib.parse import urlsplit

Weather = Literal["throttle", "reset", "cut", "stall", "lost_reply"]
WEATHER: tuple[Weather, ...] = ("throttle", "reset", "cut", "stall", "lost_reply")
"""503 SlowDown; the connection reset before anything happens; half an answer; the first byte late; and the worst:
the server did what was asked, but the client never hears of it."""

PATIENCE = 2
STALL_SECONDS = 1.0
_SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
_UNKNOWN = (
    b"<Error><Code>NotImplemented</Code><Message>A header you provided is unknown here.</Message></Error>"
)
_HOP = {"connection", "transfer-encoding", "keep-alive", "content-length"}


@dataclass
class Proxy:
    """`endpoint` takes the S3 server's place; `met` counts what befell requests."""

    target: str
    seed: int
    share: float  # of requests that something befalls
    endpoint: str = ""
    met: Counter[str] = field(default_factory=Counter)
    requests: int = 0
    ignores: frozenset[str] = frozenset()  # headers that the store does not see, in lower case
    refuses: frozenset[str] = frozenset()  # headers and parts of a URL that it answers 501 NotImplemented to
    _asked: Counter[str] = field(default_factory=Counter)
    _suffered: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def weather(self, request: str) -> Weather | None:
        """What befalls this request, e.g. "GET key", now."""
        with self._lock:
            self.requests += 1
            self._asked[request] += 1
            dice = random.Random(f"{self.seed} {request} {self._asked[request]}")
            if dice.random() >= self.share or self._suffered[request] >= PATIENCE:
                self._suffered[request] = 0
                return None
            chosen = dice.choice(WEATHER)
            self._suffered[request] += chosen != "stall"
            self.met[chosen] += 1
            return chosen


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _serve(self) -> None:
        proxy = cast("_Server", self.server).proxy
        body = self._body()
        # The bucket, whose name is another in every test, has no part in what the seed decides.
        key = self.path.partition("?")[0].removeprefix("/").partition("/")[2]
        if any(name in self.headers or name in self.path for name in proxy.refuses):
            self._answer(501, {"Content-Type": "application/xml"}, _UNKNOWN)
            return
        weather = proxy.weather(f"{self.command} {key}")
        if weather == "throttle":
            self._answer(503, {"Content-Type": "application/xml"}, _SLOW_DOWN)
            return
        if weather == "reset":
            self._reset()
            return
        if weather == "stall":
            time.sleep(STALL_SECONDS)
        status, headers, answer = self._forward(proxy, body)
        if weather == "lost_reply":
            self._reset()
        elif weather == "cut" and answer and self.command != "HEAD":
            self._answer(status, headers, answer, sent=len(answer) // 2)
            self._reset()
        else:
            self._answer(status, headers, answer)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _forward(self, proxy: Proxy, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(urlsplit(proxy.target).netloc, timeout=60)
        hidden = _HOP | proxy.ignores
        headers = {name: value for name, value in self.headers.items() if name.lower() not in hidden}
        connection.request(self.command, self.path, body, {**headers, "Content-Length": str(len(body))})
        response = connection.getresponse()
        answer = response.read()
        if self.command == "HEAD":
            headers = dict(response.getheaders())
        else:
            headers = {name: value for name, value in response.getheaders() if name.lower() not in _HOP}
        connection.close()
        return response.status, headers, answer

    def _answer(self, status: int, headers: dict[str, str], body: bytes, sent: int | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:sent])
        self.wfile.flush()

    def _reset(self) -> None:
        self.close_connection = True
        with suppress(OSError):  # zero linger: the peer gets a reset, not an orderly end
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.shutdown(socket.SHUT_RD)
        with suppress(OSError):
            self.connection.close()

    def handle_one_request(self) -> None:
        with suppress(OSError, ValueError):  # a client that gave up, and files closed by `_reset`
            super().handle_one_request()

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    proxy: Proxy

    def handle_error(self, request: object, client_address: object) -> None:
        """A broken connection is what this is for."""


@contextmanager
def bad_weather(target: str, seed: int, share: float) -> Iterator[Proxy]:
    """A running proxy before the S3 server at `target`."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.proxy = Proxy(target, seed, share, f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server.proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
