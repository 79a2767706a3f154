"""Reading a range of a remote file: what may be tried again, for how long, and what must stop the run.

A transient fault (a reset, a stall, a short body, 429, 5xx) is tried again after a pause, from the byte at which it
struck, until a deadline. So it never changes what is read, only when. Anything else is raised at once, as one line.
"""

import io
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 20.0
BUFFER_BYTES = 1 << 22
CHECK_PLACE = "check the address, or run `mmpt-data index` again if the file is gone for good"
REINDEX_REMOTE = "restore the file, or run `mmpt-data index` again if the change was meant"

Result = TypeVar("Result")


@dataclass(frozen=True)
class RemoteConfig:
    """How remote files are read. None of it changes what is read."""

    deadline_seconds: float = 600.0
    """A range that has not arrived whole after this long, all tries together, stops the run."""
    timeout_seconds: float = 30.0
    """A connection that brings nothing for this long is given up, and another one opened."""
    slowest_bytes_per_second: int = 1024
    """So is one that brings less than this on average over `timeout_seconds`."""
    connections: int = 8
    """Connections to one server that a process keeps open, and ranges that it fetches ahead at a time."""

    def __post_init__(self):
        if not 0 < self.timeout_seconds <= self.deadline_seconds:
            raise ValueError(
                f"remote.timeout_seconds ({self.timeout_seconds}) must lie above 0 and up to "
                f"remote.deadline_seconds ({self.deadline_seconds})"
            )
        if self.slowest_bytes_per_second < 0 or self.connections < 1:
            raise ValueError(
                f"remote.slowest_bytes_per_second ({self.slowest_bytes_per_second}) must be 0 or more, "
                f"remote.connections ({self.connections}) 1 or more"
            )


class FileFacts(NamedTuple):
    """Size in bytes and version of a file: its etag, or when it was last modified, or "" where neither is known."""

    size: int
    version: str


class RemoteError(OSError):
    """A remote file that cannot be read: where, why, and what to do."""

    def __init__(self, place: str, offset: int, reason: str, cure: str):
        super().__init__(f"{place} at byte {offset}: {reason}; {cure}")
        self.place, self.offset, self.reason, self.cure = place, offset, reason, cure

    def __reduce__(self) -> Any:
        return type(self), (self.place, self.offset, self.reason, self.cure)


class MissingError(RemoteError, FileNotFoundError):
    """There is no such file (404, 410)."""


class ForbiddenError(RemoteError, PermissionError):
    """The server wants other credentials (401, 403)."""


class ChangedError(RemoteError):
    """The file is not the one that was indexed: its etag, its date or its size is another."""


class NoRangeError(RemoteError):
    """The server answers a request for a range with the whole file, or with something else that was not asked for."""


class GaveUpError(RemoteError, TimeoutError):
    """Transient faults until the deadline."""


class TransientError(Exception):
    """One try failed in a way that another may not. pause_seconds: what the server asked for (Retry-After)."""

    def __init__(self, reason: str, pause_seconds: float = 0.0):
        super().__init__(reason, pause_seconds)
        self.reason, self.pause_seconds = reason, pause_seconds


class Source(Protocol):
    """One remote file. Each call is one try: raises TransientError for what may be tried again, RemoteError if not."""

    place: str

    def facts(self) -> FileFacts: ...

    def blocks(self, start: int, stop: int, expected: FileFacts) -> Iterator[bytes]:
        """Bytes [start, stop) of the file that has these facts (version "" = any), piece by piece."""
        ...


class Retry:
    """The tries of one operation: counts them, pauses between them, gives up at the deadline.

    Pauses are uniform between 0 and twice as long each time ("full jitter": Brooker 2015, "Exponential Backoff And
    Jitter"), so that a thousand readers that one fault stopped do not come back together.
    """

    def __init__(self, place: str, config: RemoteConfig):
        self.place = place
        self.tries, self._begin = 0, time.monotonic()
        self._deadline = self._begin + config.deadline_seconds
        self._random = random.SystemRandom()  # the global generator belongs to the user

    def left_seconds(self) -> float:
        return self._deadline - time.monotonic()

    def pause(self, error: TransientError, offset: int) -> None:
        """Wait before the next try. Raises GaveUpError where it would begin after the deadline."""
        longest = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2**self.tries)
        self.tries += 1
        pause = max(error.pause_seconds, self._random.uniform(0, longest))
        if pause >= self.left_seconds():
            tries = "1 try" if self.tries == 1 else f"{self.tries} tries"
            reason = f"gave up after {tries} in {time.monotonic() - self._begin:.1f} s: {error.reason}"
            raise GaveUpError(self.place, offset, reason, "look at the server and the network, then resume") from error
        time.sleep(pause)


def with_retry(place: str, config: RemoteConfig, operation: Callable[[], Result]) -> Result:
    """What the operation returns, however often it takes. Raises GaveUpError at the deadline."""
    retry = Retry(place, config)
    while True:
        try:
            return operation()
        except TransientError as error:
            retry.pause(error, 0)


def read_range(source: Source, start: int, stop: int, expected: FileFacts, config: RemoteConfig) -> Iterator[bytes]:
    """Bytes [start, stop), exactly, piece by piece. After a fault the next try goes on where the last one stopped.

    Raises RemoteError.
    """
    retry, at = Retry(source.place, config), start
    while at < stop:
        try:
            for block in watched(source.blocks(at, stop, expected), retry, config):
                if len(block) > stop - at:
                    raise NoRangeError(source.place, at, "the server sends more than was asked for", CHECK_PLACE)
                at += len(block)
                yield block
            if at < stop:
                raise TransientError(f"the body ends {stop - at} bytes early")
        except TransientError as error:
            retry.pause(error, at)


def watched(blocks: Iterator[bytes], retry: Retry, config: RemoteConfig) -> Iterator[bytes]:
    """The blocks, as long as they come fast enough. Raises TransientError when they do not, or past the deadline."""
    window, received = time.monotonic(), 0
    for block in blocks:
        yield block
        received += len(block)
        passed = time.monotonic() - window
        if retry.left_seconds() <= 0:
            raise TransientError("too slow for the deadline")
        if passed >= config.timeout_seconds:
            if received < passed * config.slowest_bytes_per_second:
                raise TransientError(f"only {received} bytes in {passed:.1f} s")
            window, received = time.monotonic(), 0


class RangeFile(io.RawIOBase):
    """A remote file that is read by ranges. Raises RemoteError."""

    def __init__(self, source: Source, version: str, config: RemoteConfig):
        self._source, self._config, self._at = source, config, 0
        self._version, self._facts = version, None

    @property
    def facts(self) -> FileFacts:
        if self._facts is None:
            found = with_retry(self._source.place, self._config, self._source.facts)
            check_facts(self._source.place, 0, found, FileFacts(found.size, self._version))
            self._facts = found
        return self._facts

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at}.get(whence)
        self._at = max(0, offset + (self.facts.size if base is None else base))
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        stop = min(self._at + len(buffer), self.facts.size)
        begin = self._at
        for block in read_range(self._source, begin, stop, self.facts, self._config):
            buffer[self._at - begin : self._at - begin + len(block)] = block
            self._at += len(block)
        return self._at - begin

    def readall(self) -> bytes:
        size = self.facts.size
        data = b"".join(read_range(self._source, self._at, size, self.facts, self._config))
        self._at = max(self._at, size)
        return data


def buffered(file: RangeFile) -> io.BufferedReader:
    """With one request for many small reads that follow one another, such as those of headers."""
    return io.BufferedReader(file, BUFFER_BYTES)


def check_facts(place: str, offset: int, found: FileFacts, expected: FileFacts) -> None:
    """Raises ChangedError when a file has another size, or another version than the one expected ("" = any)."""
    if found.size != expected.size:
        reason = f"the file has {found.size} bytes where the index has {expected.size}"
        raise ChangedError(place, offset, reason, REINDEX_REMOTE)
    if expected.version and found.version and found.version != expected.version:
        reason = f"the file was changed (version {found.version!r} where the index has {expected.version!r})"
        raise ChangedError(place, offset, reason, REINDEX_REMOTE)
