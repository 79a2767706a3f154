"""Where bytes come from: the only file that opens anything. A place is a local path or any URL that fsspec knows."""

from typing import Any, NamedTuple, Protocol

import fsspec
from fsspec.core import url_to_fs


class ByteFile(Protocol):
    """A file open for reading at any offset."""

    def seek(self, offset: int, /) -> Any: ...
    def read(self, size: int, /) -> bytes: ...
    def __enter__(self) -> "ByteFile": ...
    def __exit__(self, *args: Any) -> Any: ...


class ListedFile(NamedTuple):
    """A file in a folder: its name there, its size in bytes, and its version (etag) where the storage has one."""

    name: str
    size: int
    version: str


def is_local(place: str) -> bool:
    return "://" not in place and "::" not in place


def can_list(folder: str) -> bool:
    """Whether the storage can say what is in a folder; HTTP cannot."""
    return not folder.startswith(("http://", "https://"))


def list_files(folder: str, suffix: str) -> list[ListedFile]:
    """The files directly in a folder whose names end in `suffix`, by name, from one listing."""
    filesystem, path = url_to_fs(folder)
    found = [
        ListedFile(entry["name"].rpartition("/")[2], int(entry["size"]), str(entry.get("ETag", "")).strip('"'))
        for entry in filesystem.ls(path, detail=True)
    ]
    return sorted(file for file in found if file.name.endswith(suffix))


def join(folder: str, name: str) -> str:
    """The place called `name` inside a folder."""
    return f"{folder.rstrip('/')}/{name}" if folder else name


def parent(place: str) -> str:
    """The folder that holds a place."""
    return place.rstrip("/").rpartition("/")[0] or ("/" if place.startswith("/") else ".")


def is_folder(place: str) -> bool:
    filesystem, path = url_to_fs(place)
    return filesystem.isdir(path)


def exists(place: str) -> bool:
    filesystem, path = url_to_fs(place)
    return filesystem.exists(path)


def list_names(folder: str, suffix: str) -> list[str]:
    """Sorted names of the files directly in a folder that end in `suffix`."""
    filesystem, path = url_to_fs(folder)
    names = (entry.rpartition("/")[2] for entry in filesystem.ls(path, detail=False))
    return sorted(name for name in names if name.endswith(suffix))


def size_bytes(place: str) -> int:
    """Size of a file. Raises FileNotFoundError when there is none."""
    filesystem, path = url_to_fs(place)
    return int(filesystem.size(path))


def open_bytes(place: str, version: str = "") -> ByteFile:
    """Open for reading. Raises FileNotFoundError when there is no such file."""
    return fsspec.open(place, "rb").open()  # type: ignore[return-value]


def read_text(place: str) -> str:
    with open_bytes(place) as file:
        return file.read(-1).decode("utf-8")
