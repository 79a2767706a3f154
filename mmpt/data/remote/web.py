"""Files on web servers: HTTP range requests that are held against the file's version (RFC 9110: 13.1.5, 14)."""

import os
import re
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from email.utils import parsedate_to_datetime
from functools import lru_cache
from urllib.parse import urlsplit

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import HTTPError, LocationValueError, NewConnectionError, SSLError, TimeoutError

from mmpt.data.remote.ranges import (
    CHECK_PLACE,
    REINDEX_REMOTE,
    ChangedError,
    FileFacts,
    ForbiddenError,
    MissingError,
    NoRangeError,
    RemoteConfig,
    RemoteError,
    TransientError,
    check_facts,
)

BLOCK_BYTES = 1 << 18
MOST_REDIRECTS = 8
CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)")
SUPPORT_RANGES = "serve it from one that supports range requests"


class _PromptConnection(HTTPConnection):
    """A connection on which an answer's headers must arrive within the timeout, however often a byte of them does."""

    def getresponse(self):  # type: ignore[no-untyped-def]
        timer = threading.Timer(float(self.timeout or 60), _cut, (self.sock,))  # type: ignore[arg-type]
        timer.daemon = True
        timer.start()
        try:
            return super().getresponse()
        finally:
            timer.cancel()


def _cut(sock: socket.socket | None) -> None:
    if sock is not None:
        with suppress(OSError):  # it has been closed at the same moment
            sock.shutdown(socket.SHUT_RDWR)


class _PromptSecureConnection(HTTPSConnection, _PromptConnection):
    """The same over TLS."""


class _PromptPool(HTTPConnectionPool):
    ConnectionCls = _PromptConnection  # type: ignore[assignment]


class _PromptSecurePool(HTTPSConnectionPool):
    ConnectionCls = _PromptSecureConnection  # type: ignore[assignment]


class WebFile:
    """A file at an http or https URL; see `mmpt.data.remote.ranges.Source`."""

    def __init__(self, place: str, config: RemoteConfig):
        self.place, self._config = place, config

    def facts(self) -> FileFacts:
        response = self._get({"Range": "bytes=0-0"}, 0)
        try:
            if response.status == 206:
                size = self._range(response, 0)[2]
            elif response.status == 416 and (found := _content_range(response)):
                size = found[2]  # an empty file
            elif response.status == 200:  # of a server that knows no ranges; reading will say so where it matters
                size = int(response.headers.get("Content-Length", -1))
            else:
                raise self._refusal(response, 0)
            if size is None or size < 0:
                raise NoRangeError(self.place, 0, "the server does not tell the size of the file", SUPPORT_RANGES)
            return FileFacts(size, _version(response))
        finally:
            response.close()

    def blocks(self, start: int, stop: int, expected: FileFacts) -> Iterator[bytes]:
        headers = {"Range": f"bytes={start}-{stop - 1}"}
        if _is_strong(expected.version):
            headers["If-Range"] = expected.version
        response = self._get(headers, start)
        try:
            self._check_answer(response, start, stop, expected)
            left = stop - start
            while left and (block := response.read1(min(left, BLOCK_BYTES))):
                left -= len(block)
                yield block
            if not left:
                response.drain_conn()  # reads nothing, but hands the connection back to the pool
        except (HTTPError, OSError) as error:
            if isinstance(error, RemoteError):
                raise
            raise _transient(error, self._config) from error
        finally:
            response.close()

    def _check_answer(self, response: urllib3.BaseHTTPResponse, start: int, stop: int, expected: FileFacts) -> None:
        """Whether what comes is the range that was asked for, of the version that was indexed."""
        version = _version(response)
        if response.status == 200:
            check_facts(self.place, start, FileFacts(expected.size, version), expected)
            raise NoRangeError(self.place, start, "the server answers a range with the whole file", SUPPORT_RANGES)
        if response.status == 416:
            size = (_content_range(response) or (0, 0, None))[2]
            found = f"has {size} bytes" if size is not None else "is shorter"
            reason = f"the file {found} where the index has {expected.size}"
            raise ChangedError(self.place, start, reason, REINDEX_REMOTE)
        if response.status != 206:
            raise self._refusal(response, start)
        first, last, size = self._range(response, start)
        check_facts(self.place, start, FileFacts(expected.size if size is None else size, version), expected)
        if (first, last) != (start, stop - 1):
            asked, sent = f"bytes {start}-{stop - 1}", f"bytes {first}-{last}"
            raise NoRangeError(self.place, start, f"the server was asked for {asked} and sends {sent}", SUPPORT_RANGES)
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise NoRangeError(self.place, start, "the server compresses what it sends", "turn that off for shards")

    def _range(self, response: urllib3.BaseHTTPResponse, start: int) -> tuple[int, int, int | None]:
        if found := _content_range(response):
            return found
        header = response.headers.get("Content-Range", "")
        raise NoRangeError(self.place, start, f"the server answers a range with {header!r}", SUPPORT_RANGES)

    def _get(self, headers: dict[str, str], offset: int) -> urllib3.BaseHTTPResponse:
        """The answer, its body unread; redirects are followed. Raises TransientError for 429 and 5xx."""
        config = self._config
        try:
            pool = _pool(_proxy(self.place), config.connections, config.timeout_seconds, os.getpid())
            response = pool.request(
                "GET", self.place, headers=headers | {"Accept-Encoding": "identity"}, preload_content=False,
                retries=urllib3.Retry(total=None, connect=0, read=0, status=0, other=0, redirect=MOST_REDIRECTS),
            )  # fmt: skip
        except (LocationValueError, UnicodeError) as error:
            raise RemoteError(self.place, offset, f"not a usable URL ({error})", CHECK_PLACE) from error
        except HTTPError as error:
            if isinstance(getattr(error, "reason", error), SSLError) and "CERTIFICATE_VERIFY" in str(error):
                cure = "name the authority's file in SSL_CERT_FILE"
                raise ForbiddenError(self.place, offset, "the server's certificate cannot be verified", cure) from error
            raise _transient(error, config) from error
        except (OSError, ssl.SSLError) as error:
            raise _transient(error, config) from error
        if response.status in (408, 425, 429) or response.status >= 500:
            pause = _retry_after(response.headers.get("Retry-After", ""))
            response.close()
            raise TransientError(f"the server answers {response.status}", pause)
        return response

    def _refusal(self, response: urllib3.BaseHTTPResponse, offset: int) -> RemoteError:
        reason = f"the server answers {response.status} {response.reason or ''}".rstrip()
        if response.status in (404, 410):
            return MissingError(self.place, offset, reason, CHECK_PLACE)
        if response.status in (401, 403):
            return ForbiddenError(self.place, offset, reason, "check the credentials and the permissions")
        return RemoteError(self.place, offset, reason, CHECK_PLACE)


@lru_cache(maxsize=8)
def _pool(proxy: str, connections: int, timeout_seconds: float, pid: int) -> urllib3.PoolManager:
    """Open connections of this process; a process that is forked does not inherit them."""
    kind = urllib3.ProxyManager if proxy else urllib3.PoolManager
    pool = kind(
        *([proxy] if proxy else []), num_pools=64, maxsize=connections,
        timeout=urllib3.Timeout(connect=timeout_seconds, read=timeout_seconds),
        headers={"User-Agent": "mmpt"},
    )  # fmt: skip
    pool.pool_classes_by_scheme = {"http": _PromptPool, "https": _PromptSecurePool}
    return pool


def _proxy(place: str) -> str:
    """The proxy that the environment names for this place, or ""."""
    parts = urlsplit(place)
    if urllib.request.proxy_bypass(parts.netloc):
        return ""
    return urllib.request.getproxies().get(parts.scheme, "")


def _content_range(response: urllib3.BaseHTTPResponse) -> tuple[int, int, int | None] | None:
    match = CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", "").strip())
    if not match:
        return None
    first, last, size = match.groups()
    return int(first or 0), int(last or 0), None if size == "*" else int(size)


def _version(response: urllib3.BaseHTTPResponse) -> str:
    return response.headers.get("ETag") or response.headers.get("Last-Modified") or ""


def _is_strong(version: str) -> bool:
    """Whether If-Range may carry it: a weak etag (W/...) never matches there, and what is not quoted is a date."""
    return version.startswith('"') or version.endswith("GMT")


def _retry_after(header: str) -> float:
    """Seconds, from a number of them or a date; 0 from anything else."""
    if header.strip().isdecimal():
        return float(header)
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0


def _transient(error: Exception, config: RemoteConfig) -> TransientError:
    reason = getattr(error, "reason", None) or error
    if isinstance(reason, TimeoutError) and not isinstance(reason, NewConnectionError):
        return TransientError(f"no answer for {config.timeout_seconds:g} s")
    text = " ".join(str(reason).split())
    return TransientError(f"the connection failed ({type(reason).__name__}: {text[:200]})")
