"""Where bytes come from: the only door to files. A place is a local path or a URL.

http and https are read by our own range client, s3, gs and az by obstore, all other schemes by fsspec. Nothing here
starts a shell: `pipe:` and its like are refused.
"""

import io
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import fsspec
from braceexpand import braceexpand
from fsspec.core import url_to_fs

from mmpt.data.remote.objects import SCHEMES as OBJECT_SCHEMES
from mmpt.data.remote.objects import ObjectFile, is_prefix, list_objects
from mmpt.data.remote.ranges import (
    CHECK_PLACE,
    FileFacts,
    MissingError,
    RangeFile,
    RemoteConfig,
    Source,
    TransientError,
    buffered,
    check_facts,
    with_retry,
)
from mmpt.data.remote.web import WebFile

DEFAULTS = RemoteConfig(deadline_seconds=60.0)
"""For programs that somebody waits for; a run, which may outlive its server's restart, has its own: `data.remote`."""


class ByteFile(Protocol):
    """A file open for reading at any offset."""

    def seek(self, offset: int, whence: int = 0, /) -> int: ...
    def read(self, size: int, /) -> bytes: ...
    def __enter__(self) -> "ByteFile": ...
    def __exit__(self, kind: Any, error: Any, traceback: Any, /) -> Any: ...


class ListedFile(NamedTuple):
    """A file in a folder: its name there, its size in bytes, and its version (etag) where the storage has one."""

    name: str
    size: int
    version: str


def scheme_of(place: str) -> str:
    """`s3` of s3://bucket/path, "" of a local path. Raises ValueError for what would be run by a shell."""
    bare = place.strip()
    if bare.startswith(("pipe:", "|")) or bare.endswith("|"):
        raise ValueError(f"{place!r} is a command for a shell, which is not run: give a path or a URL")
    return place.partition("://")[0].lower() if "://" in place else ""


def is_local(place: str) -> bool:
    return not scheme_of(place)


def is_pattern(place: str) -> bool:
    """Whether it stands for several places; see `expand`."""
    return "{" in place or "::" in place


def expand(pattern: str) -> list[str]:
    """The places that a pattern stands for, in its order: `{00000..00099}`, `{a,b}`, nested, with `::` between parts.

    Raises ValueError for braces that do not match and for a part that is empty.
    """
    places = []
    for part in pattern.split("::"):
        if not part:
            raise ValueError(f"{pattern!r} has nothing on one side of '::'")
        scheme_of(part)
        try:
            places += braceexpand(part)
        except ValueError as error:
            raise ValueError(f"{pattern!r} has braces that do not match") from error
    return places


def can_list(folder: str) -> bool:
    """Whether the storage can say what is in a folder; HTTP cannot."""
    return scheme_of(folder) not in ("http", "https")


def list_files(folder: str, suffix: str, remote: RemoteConfig = DEFAULTS) -> list[ListedFile]:
    """The files directly in a folder whose names end in `suffix`, by name, from one listing."""
    scheme = scheme_of(folder)
    if not can_list(folder):
        raise ValueError(f"{folder} cannot be listed over HTTP: name the files, such as {folder}/{{00000..00099}}.tar")
    if not scheme:
        with os.scandir(folder) as entries:
            found = [(entry.name, FileFacts(entry.stat().st_size, "")) for entry in entries if entry.is_file()]
    elif scheme in OBJECT_SCHEMES:
        found = with_retry(folder, remote, lambda: list_objects(folder, remote))
    else:
        filesystem, path = url_to_fs(folder)
        entries = filesystem.ls(path, detail=True)
        found = [(entry["name"].rpartition("/")[2], _fsspec_facts(entry)) for entry in entries]
    return sorted(ListedFile(name, *facts) for name, facts in found if name.endswith(suffix))


def stat(place: str, remote: RemoteConfig = DEFAULTS) -> FileFacts:
    """Size and version of a file. Raises FileNotFoundError when there is none, RemoteError when it cannot be told."""
    if is_local(place):
        return FileFacts(os.stat(place).st_size, "")
    return with_retry(place, remote, source_of(place, remote).facts)


def stat_all(places: Iterable[str], remote: RemoteConfig = DEFAULTS) -> list[FileFacts]:
    """The same of many files, several at a time."""
    with ThreadPoolExecutor(remote.connections) as threads:
        return list(threads.map(lambda place: stat(place, remote), places))


def source_of(place: str, remote: RemoteConfig) -> Source:
    """How ranges of a remote file are read. Raises ValueError for a scheme that nothing here knows."""
    scheme = scheme_of(place)
    if scheme in ("http", "https"):
        return WebFile(place, remote)
    return ObjectFile(place, remote) if scheme in OBJECT_SCHEMES else _OtherFile(place)


def open_bytes(place: str, version: str = "", remote: RemoteConfig = DEFAULTS) -> ByteFile:
    """Open for reading. A remote file of another version than this ("" = any) is refused when it is read.

    Raises FileNotFoundError when there is no such file, for a remote one at the first read; there also RemoteError.
    """
    if is_local(place):
        return open(place, "rb", buffering=0)
    return buffered(RangeFile(source_of(place, remote), version, remote))


def read_text(place: str) -> str:
    with open_bytes(place) as file:
        return file.read(-1).decode("utf-8")


def size_bytes(place: str) -> int:
    """Size of a file. Raises FileNotFoundError when there is none."""
    return stat(place).size


def exists(place: str) -> bool:
    try:
        stat(place)
    except FileNotFoundError:
        return is_folder(place) if can_list(place) else False
    return True


def is_folder(place: str, remote: RemoteConfig = DEFAULTS) -> bool:
    """Over HTTP, which has no folders, a URL whose last part has no dot passes for one."""
    scheme = scheme_of(place)
    if not scheme:
        return os.path.isdir(place)
    if scheme in ("http", "https"):
        path = place.partition("://")[2].partition("/")[2]
        return place.endswith("/") or "." not in path.rpartition("/")[2]
    if scheme in OBJECT_SCHEMES:
        return with_retry(place, remote, lambda: is_prefix(place, remote))
    filesystem, path = url_to_fs(place)
    return filesystem.isdir(path)


def join(folder: str, name: str) -> str:
    """The place called `name` inside a folder."""
    return f"{folder.rstrip('/')}/{name}" if folder else name


def parent(place: str) -> str:
    """The folder that holds a place."""
    return place.rstrip("/").rpartition("/")[0] or ("/" if place.startswith("/") else ".")


class _OtherFile:
    """A file that fsspec opens; see `mmpt.data.remote.ranges.Source`."""

    def __init__(self, place: str):
        self.place = place
        try:
            self._filesystem, self._path = url_to_fs(place)
        except (ValueError, ImportError) as error:
            raise ValueError(f"{place} cannot be read: {' '.join(str(error).split())}") from error

    def facts(self) -> FileFacts:
        try:
            return _fsspec_facts(self._filesystem.info(self._path))
        except FileNotFoundError as error:
            raise MissingError(self.place, 0, "there is no such file", CHECK_PLACE) from error
        except OSError as error:
            raise TransientError(str(error)) from error

    def blocks(self, start: int, stop: int, expected: FileFacts) -> Iterator[bytes]:
        found = self.facts()
        check_facts(self.place, start, found, expected)
        try:
            with fsspec.open(self.place, "rb") as file:
                file.seek(start)  # type: ignore[union-attr]
                while start < stop and (block := file.read(min(io.DEFAULT_BUFFER_SIZE << 5, stop - start))):  # type: ignore[union-attr]
                    start += len(block)
                    yield block
        except FileNotFoundError as error:
            raise MissingError(self.place, start, "there is no such file", CHECK_PLACE) from error
        except OSError as error:
            raise TransientError(str(error)) from error


def _fsspec_facts(entry: dict[str, Any]) -> FileFacts:
    version = str(entry.get("ETag") or entry.get("etag") or entry.get("mtime") or "").strip('"')
    return FileFacts(int(entry["size"] or 0), version)
