"""A web server on loopback that serves a folder, or stands before another server, and misbehaves to a seeded plan."""

import hashlib
import http.client
import random
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

TRANSIENT = (
    "refuse", "reset", "cut", "cut at a block", "stall", "stall before", "drip", "drip before", "500", "503", "429",
)  # fmt: skip
PERMANENT = ("whole", "other etag", "other size", "other range", "compressed", "404", "403")
RANGE = re.compile(r"bytes=(\d+)-(\d+)")


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


Answers = Callable[[str, str, dict[str, str], bytes], Answer]
"""From (method, path, headers, body) of a request to what to say."""


class Seen(NamedTuple):
    """A request as it came, with the fault that it got ("" = none) and when."""

    path: str
    headers: dict[str, str]
    fault: str
    time: float


@dataclass
class Plan:
    """Which request gets which fault: `share` of them, one of `faults` each, by their number; or all to `only`."""

    faults: tuple[str, ...] = ()
    share: float = 0.0
    seed: int = 0
    only: str = ""
    most: int = 10**9
    """No more faults than this."""
    retry_after: str = "0"
    given: int = 0
    seen: list[Seen] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def next(self, path: str, headers: dict[str, str]) -> tuple[str, random.Random]:
        """(the fault of this request, a generator for its details)"""
        with self.lock:
            details = random.Random(f"{self.seed} {len(self.seen)}")
            fault = ""
            if self.faults and self.given < self.most and details.random() < self.share and self.only in path:
                fault = details.choice(self.faults)
                self.given += 1
            self.seen.append(Seen(path, headers, fault, time.monotonic()))
        return fault, details


def folder_answers(folder: Path, versions: str = "etag") -> Answers:
    """What a well-behaved server says; versions: etag, weak, date or none."""

    def answer(method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        file = folder / path.partition("?")[0].lstrip("/")
        if not file.is_file():
            return Answer(404, {}, b"no such file")
        data = file.read_bytes()
        digest = hashlib.md5(data).hexdigest()
        version = {"etag": f'"{digest}"', "weak": f'W/"{digest}"', "date": formatdate(10**9, usegmt=True)}.get(versions)
        out = {} if version is None else {"Last-Modified" if versions == "date" else "ETag": version}
        match = RANGE.fullmatch(headers.get("Range", ""))
        if not match or headers.get("If-Range", version) != version or (versions == "weak" and "If-Range" in headers):
            return Answer(200, out, data)
        first, last = int(match[1]), min(int(match[2]), len(data) - 1)
        if first >= len(data):
            return Answer(416, out | {"Content-Range": f"bytes */{len(data)}"}, b"")
        return Answer(206, out | {"Content-Range": f"bytes {first}-{last}/{len(data)}"}, data[first : last + 1])

    return answer


def upstream_answers(port: int) -> Answers:
    """What a server on this port of loopback says."""

    def answer(method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            connection.request(method, path, body or None, headers)
            response = connection.getresponse()
            kept = {name.title(): value for name, value in response.getheaders()}
            for name in ("Connection", "Transfer-Encoding"):
                kept.pop(name, None)
            return Answer(response.status, kept, response.read())
        finally:
            connection.close()

    return answer


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer would wait for the acknowledgement of its head
    server: "FaultServer"

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        answer = self.server.answers(self.command, self.path, dict(self.headers), body)
        fault, details = self.server.plan.next(self.path, dict(self.headers))
        if fault in PERMANENT:
            answer, fault = _lie(answer, fault, self.server, self.path), ""
        try:
            self._deliver(answer, fault, details)
        except OSError:
            self.close_connection = True  # the client has given up

    do_HEAD = do_PUT = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _deliver(self, answer: Answer, fault: str, details: random.Random) -> None:
        if fault in ("500", "503", "429"):
            answer, fault = Answer(int(fault), {"Retry-After": self.server.plan.retry_after}, b"busy"), ""
        if fault == "refuse":
            return self._reset()
        if fault == "stall before":
            return self._stall()
        head = self._head(answer)
        if fault == "drip before":
            return self._drip(head * 1000)
        self.wfile.write(head)
        if self.command == "HEAD":
            return None
        body = answer.body
        cut = details.randrange(len(body)) if body else 0
        if fault == "cut at a block":
            cut -= cut % 512
        if fault == "drip":
            self._drip(body)
        elif fault:
            self.wfile.write(body[:cut])
            self.wfile.flush()
            if fault == "reset":
                self._reset()
            elif fault == "stall":
                self._stall()
            else:
                self.close_connection = True  # a short body, politely ended
        else:
            self.wfile.write(body)
        return None

    def _head(self, answer: Answer) -> bytes:
        lines = [f"HTTP/1.1 {answer.status} {http.client.responses.get(answer.status, '')}"]
        headers = {name.title(): value for name, value in answer.headers.items()}
        if self.command != "HEAD" or "Content-Length" not in headers:
            headers["Content-Length"] = str(len(answer.body))
        lines += [f"{name}: {value}" for name, value in headers.items()]
        return ("\r\n".join(lines) + "\r\n\r\n").encode()

    def _stall(self) -> None:
        self.server.closing.wait(60)
        self.close_connection = True

    def _drip(self, data: bytes) -> None:
        for i in range(len(data)):
            self.wfile.write(data[i : i + 1])
            if self.server.closing.wait(0.05):
                break
        self.close_connection = True

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.server.resetting.add(self.connection)


def _lie(answer: Answer, fault: str, server: "FaultServer", path: str) -> Answer:
    headers = dict(answer.headers)
    if fault in ("404", "403"):
        return Answer(int(fault), {}, b"")
    if fault == "whole":
        headers.pop("Content-Range", None)
        return Answer(200, headers, server.answers("GET", path, {}, b"").body)
    if fault == "other etag":
        return Answer(answer.status, headers | {"ETag": '"another"'}, answer.body)
    if fault == "other size":
        return Answer(answer.status, headers | {"Content-Range": headers["Content-Range"] + "7"}, answer.body)
    if fault == "other range":
        size = headers["Content-Range"].split("/")[1]
        return Answer(answer.status, headers | {"Content-Range": f"bytes 1-2/{size}"}, answer.body)
    return Answer(answer.status, headers | {"Content-Encoding": "gzip"}, answer.body)


class FaultServer(ThreadingHTTPServer):
    """Closes every connection and waits for every thread when it ends."""

    daemon_threads = False
    request_queue_size = 128

    def __init__(self, answers: Answers, plan: Plan):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers, self.plan = answers, plan
        self.closing = threading.Event()
        self.resetting: set[socket.socket] = set()
        self._open: set[socket.socket] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def get_request(self) -> tuple[socket.socket, tuple[str, int]]:
        connection, address = super().get_request()
        self._open.add(connection)
        return connection, address

    def shutdown_request(self, request: socket.socket) -> None:  # type: ignore[override]
        if request in self.resetting:
            self.close_request(request)  # with SO_LINGER 0: a reset, where a shutdown would end it politely
        else:
            super().shutdown_request(request)

    def close_request(self, request: socket.socket) -> None:  # type: ignore[override]
        self._open.discard(request)
        self.resetting.discard(request)
        super().close_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that went away

    def end(self) -> None:
        self.closing.set()
        self.shutdown()
        for connection in list(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.server_close()


@contextmanager
def serving(answers: Answers, plan: Plan | None = None) -> Iterator[FaultServer]:
    server = FaultServer(answers, plan or Plan())
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.end()
        thread.join()
