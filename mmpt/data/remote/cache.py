"""Chunks of remote shards on a disk of this node: each is downloaded once, whichever process needs it first.

A cached file holds the bytes of the chunk, the CRC-32 of every block of BLOCK_BYTES, and the CRC-32 of those. All
that is read is verified, so a file that was damaged on disk is fetched again and never believed.
"""

import fcntl
import hashlib
import os
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple, Self

import numpy as np

from mmpt.data import storage
from mmpt.data.remote.ranges import FileFacts, GaveUpError, RemoteConfig, read_range
from mmpt.data.remote.space import POLL_SECONDS, Space, SpaceError

BLOCK_BYTES = 1 << 16
LOCKS = 256


@dataclass(frozen=True)
class CacheConfig:
    """Where chunks of remote shards are kept. Local shards are read where they are."""

    folder: str = ""
    """Folder on a disk of this node, shared by all of its processes and by later runs; "" takes a folder of this user
    in the system's folder for temporary files."""
    limit_bytes: int = 64 << 30
    """Most bytes in it; the chunks that were not used for longest make room. One chunk for each process that reads is
    the least; windows of all lanes are better."""

    def __post_init__(self):
        if self.limit_bytes < 1:
            raise ValueError(f"cache.limit_bytes must be above 0, got {self.limit_bytes}")


class Range(NamedTuple):
    """Bytes [start, stop) of a remote file that has `total` bytes and this version ("" = any)."""

    place: str
    version: str
    start: int
    stop: int
    total: int

    def name(self) -> str:
        return hashlib.blake2b(repr(tuple(self)).encode(), digest_size=20).hexdigest()


class ChunkCache:
    """Safe with any number of threads and processes at once. Raises OSError where the folder cannot be written, or has
    the name of this user's and is another's."""

    def __init__(self, config: CacheConfig, remote: RemoteConfig):
        self._space, self._remote = Space(config.folder or _own_folder(), config.limit_bytes), remote
        self._space.clean()
        self._locks = self._space.folder / "locks"
        self._locks.mkdir(exist_ok=True)

    def open(self, wanted: Range) -> "CachedChunk":
        """A file whose offsets are those of the shard, and which can be read from wanted.start to wanted.stop.

        Raises RemoteError when it cannot be downloaded, SpaceError when the disk is full or the cache is too small.
        """
        return CachedChunk(self, wanted, self.fetch(wanted))

    def fetch(self, wanted: Range) -> BinaryIO:
        """The cached file, open; downloaded unless it is there. Raises as `open` does."""
        if file := self._look_up(wanted):
            return file
        with self._lock(wanted):
            return self._look_up(wanted) or self._download(wanted)

    def fetch_again(self, wanted: Range, damaged: BinaryIO) -> BinaryIO:
        """The same, when what is there is damaged."""
        self._space.remove(wanted.name(), os.fstat(damaged.fileno()).st_ino)
        damaged.close()
        return self.fetch(wanted)

    def _look_up(self, wanted: Range) -> BinaryIO | None:
        name = wanted.name()
        try:
            file = open(self._space.path(name), "rb", buffering=0)  # noqa: SIM115  the caller closes it
        except FileNotFoundError:
            return None
        self._space.touch(name)
        return file  # type: ignore[return-value]

    def _download(self, wanted: Range) -> BinaryIO:
        size = wanted.stop - wanted.start
        try:
            file = self._space.begin(size + _trailer_bytes(size), self._remote.deadline_seconds)
        except SpaceError as error:
            raise SpaceError(f"{error} (data.cache; for {wanted.place} at byte {wanted.start})") from error
        try:
            source = storage.source_of(wanted.place, self._remote)
            expected = FileFacts(wanted.total, wanted.version)
            blocks = read_range(source, wanted.start, wanted.stop, expected, self._remote)
            _write(file, blocks, size)
        except BaseException:
            self._space.abandon(file)
            raise
        self._space.finish(file, wanted.name())
        return file

    @contextmanager
    def _lock(self, wanted: Range) -> Iterator[None]:
        """One process at a time downloads a chunk, and the others wait for it, but not for ever."""
        give_up = time.monotonic() + 2 * self._remote.deadline_seconds
        stripe = int(wanted.name()[:8], 16) % LOCKS
        with open(self._locks / f"{stripe}", "ab") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as error:
                    if time.monotonic() > give_up:
                        reason = "another process of this node has been fetching it for too long"
                        raise GaveUpError(wanted.place, wanted.start, reason, "resume the run") from error
                time.sleep(POLL_SECONDS)
            yield


def _own_folder() -> str:
    """This user's, in the folder for temporary files, where anybody may have made one of that name before."""
    folder = os.path.join(tempfile.gettempdir(), f"mmpt-cache-{os.getuid()}")
    os.makedirs(folder, mode=0o700, exist_ok=True)
    if os.stat(folder).st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user: name a folder of your own in data.cache.folder")
    return folder


class CachedChunk:
    """A part of a shard, read from the cache; see `mmpt.data.storage.ByteFile`."""

    def __init__(self, cache: ChunkCache, wanted: Range, file: BinaryIO):
        self._cache, self._wanted, self._at = cache, wanted, wanted.start
        self._size = wanted.stop - wanted.start
        self._use(file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any, /) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        assert whence == os.SEEK_SET and offset >= self._wanted.start
        self._at = offset
        return offset

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes (-1: any number), up to the end of the chunk."""
        first = self._at - self._wanted.start
        last = self._size if size < 0 else min(first + size, self._size)
        if first >= last:
            return b""
        if not self._held_from <= first <= last <= self._held_from + len(self._held):
            self._hold(first // BLOCK_BYTES, -(-last // BLOCK_BYTES))
        self._at += last - first
        return self._held[first - self._held_from : last - self._held_from]

    def _hold(self, first_block: int, last_block: int) -> None:
        """Read these blocks and verify them; fetch the chunk again when they are damaged."""
        begin, end = first_block * BLOCK_BYTES, min(last_block * BLOCK_BYTES, self._size)
        for _ in range(2):
            data = os.pread(self._file.fileno(), end - begin, begin)
            expected = self._checksums[first_block:last_block]
            if len(data) == end - begin and np.array_equal(_checksums_of(data), expected):
                self._held_from, self._held = begin, data
                return
            self._use(self._cache.fetch_again(self._wanted, self._file))
        raise self._damaged()

    def _use(self, file: BinaryIO) -> None:
        self._file, self._held_from, self._held = file, 0, b""
        for _ in range(2):
            trailer = os.pread(self._file.fileno(), _trailer_bytes(self._size), self._size)
            if len(trailer) == _trailer_bytes(self._size) and zlib.crc32(trailer[:-4]) == _number(trailer[-4:]):
                self._checksums = np.frombuffer(trailer[:-4], "<u4")
                return
            self._file = self._cache.fetch_again(self._wanted, self._file)
        raise self._damaged()

    def _damaged(self) -> OSError:
        self.close()
        place, at = self._wanted.place, self._wanted.start
        return OSError(f"{place} at byte {at}: its chunk is damaged in the cache again and again: look at the disk")


def _write(file: BinaryIO, blocks: Iterator[bytes], size: int) -> None:
    """The blocks, `size` bytes together, and after them their checksums."""
    waiting, checksums, written = bytearray(), [], 0
    for block in blocks:
        written += file.write(block)
        waiting += block
        whole = len(waiting) - len(waiting) % BLOCK_BYTES
        checksums.append(_checksums_of(bytes(waiting[:whole])))
        del waiting[:whole]
    checksums.append(_checksums_of(bytes(waiting)))
    trailer = np.concatenate(checksums).tobytes()
    assert written == size  # read_range sees to it
    file.write(trailer + zlib.crc32(trailer).to_bytes(4, "little"))


def _checksums_of(data: bytes) -> np.ndarray:
    """[ceil(n / BLOCK_BYTES)] uint32."""
    view = memoryview(data)
    return np.array([zlib.crc32(view[i : i + BLOCK_BYTES]) for i in range(0, len(data), BLOCK_BYTES)], "<u4")


def _trailer_bytes(size: int) -> int:
    return 4 * -(-size // BLOCK_BYTES) + 4


def _number(data: bytes) -> int:
    return int.from_bytes(data, "little")
