"""Files in a folder that many processes share, no more bytes together than a limit.

What is taken is written down in a ledger file before it is written to disk, and every change of it happens under one
file lock, which the kernel takes from a process that dies. So the limit holds at every moment, whoever is killed when.
Nothing is kept in shared memory.
"""

import errno
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

POLL_SECONDS = 0.02
ROOM_LEFT = 0.1
"""Share of the limit that one eviction frees, so that not each new file needs one: it looks at every file."""


class SpaceError(OSError):
    """There is no room for another file: where, and what to do."""


class Space:
    """folder/files/: finished files by name; folder/partial/: files being written; folder/ledger: bytes of both."""

    def __init__(self, folder: str | os.PathLike, limit_bytes: int):
        self.folder, self.limit_bytes = Path(folder), limit_bytes
        self._files, self._partial = self.folder / "files", self.folder / "partial"
        for part in (self._files, self._partial):
            part.mkdir(parents=True, exist_ok=True)

    def path(self, name: str) -> Path:
        """Where a finished file lies. Whoever has opened it may read on after it was evicted."""
        return self._files / name[:2] / name

    def touch(self, name: str) -> None:
        """Make it the last to be evicted."""
        with suppress(FileNotFoundError):  # evicted meanwhile
            os.utime(self.path(name))

    def begin(self, size: int, wait_seconds: float) -> BinaryIO:
        """A new file of this size, open for writing; to be given to `finish` or to `abandon`.

        Evicts those that were not used for longest. Raises SpaceError when the limit is below the size, when there is
        no room after wait_seconds, because other processes write too, or when the disk is full.
        """
        if size > self.limit_bytes:
            raise SpaceError(f"the cache in {self.folder} may hold {self.limit_bytes} bytes and one chunk has {size}")
        give_up = time.monotonic() + wait_seconds
        while True:
            with self._ledger() as ledger:
                if ledger.taken + size > self.limit_bytes:
                    self._evict(ledger, min(self.limit_bytes - size, int(self.limit_bytes * (1 - ROOM_LEFT))))
                if ledger.taken + size <= self.limit_bytes:
                    return self._create(size, ledger)
            if time.monotonic() > give_up:
                reason = "is too small for those that read at once"
                raise SpaceError(f"the cache in {self.folder} of {self.limit_bytes} bytes {reason}")
            time.sleep(POLL_SECONDS)

    def finish(self, file: BinaryIO, name: str) -> None:
        """Give a file that has been written its name. It stays open."""
        file.flush()
        path = self.path(name)
        path.parent.mkdir(exist_ok=True)
        with self._ledger() as ledger:
            replaced = path.stat().st_size if path.exists() else 0
            os.replace(file.name, path)
            ledger.taken -= replaced

    def abandon(self, file: BinaryIO) -> None:
        with self._ledger() as ledger:
            ledger.taken -= os.fstat(file.fileno()).st_size
            os.unlink(file.name)
        file.close()

    def remove(self, name: str, inode: int) -> None:
        """Take away a finished file, if it is still this one."""
        with self._ledger() as ledger:
            path = self.path(name)
            if path.exists() and path.stat().st_ino == inode:
                ledger.taken -= path.stat().st_size
                path.unlink()

    def clean(self) -> None:
        """Take away what killed processes left half written."""
        with self._ledger() as ledger:
            if self._clean_partial():
                self._evict(ledger, self.limit_bytes)

    def _create(self, size: int, ledger: "_Ledger") -> BinaryIO:
        size = max(size, 1)
        ledger.taken += size
        ledger.save()  # first: a process that is killed here has taken too much, never too little
        path = self._partial / f"{os.getpid()}-{threading.get_ident()}-{time.monotonic_ns()}"
        file = open(path, "w+b")  # noqa: SIM115  the caller closes it
        try:
            fcntl.flock(file, fcntl.LOCK_EX)  # as long as it is held, its writer lives
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                self._evict(ledger, ledger.taken // 2, coming=size)  # others have filled the disk: make do with less
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            file.close()
            path.unlink()
            ledger.taken -= size
            if error.errno == errno.ENOSPC:
                raise SpaceError(f"the disk of {self.folder} is full: {size} bytes are needed for a chunk") from error
            raise
        return file

    def _evict(self, ledger: "_Ledger", target: int, coming: int = 0) -> None:
        """Take away the files least recently used until `target` bytes are taken; count anew while at it.

        coming: bytes that are taken but not yet to be seen on disk.
        """
        self._clean_partial()
        partial = coming + sum(entry.stat().st_size for entry in os.scandir(self._partial))
        found = []
        for folder in os.scandir(self._files):
            found += [(entry.stat().st_mtime_ns, entry.stat().st_size, entry.path) for entry in os.scandir(folder)]
        ledger.taken = partial + sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if ledger.taken <= target:
                break
            os.unlink(path)
            ledger.taken -= size

    def _clean_partial(self) -> int:
        """Take away each file that a dead process was writing; how many they were."""
        count = 0
        for entry in list(os.scandir(self._partial)):
            with open(entry.path, "rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue  # its writer lives
                os.unlink(entry.path)
                count += 1
        return count

    @contextmanager
    def _ledger(self) -> Iterator["_Ledger"]:
        with open(self.folder / "ledger", "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            text = file.read()
            ledger = _Ledger(file, int(text) if text.isdigit() else 0)
            if not text.isdigit():
                self._evict(ledger, self.limit_bytes)
            try:
                yield ledger
            finally:
                ledger.save()


class _Ledger:
    """How many bytes are taken. Without a number, as when its writer was killed, they are counted anew."""

    def __init__(self, file: BinaryIO, taken: int):
        self._file, self.taken = file, taken

    def save(self) -> None:
        self._file.seek(0)
        self._file.truncate()
        self._file.write(b"%d" % max(0, self.taken))
        self._file.flush()
