"""A strict reader of tar shards: a damaged shard is an error, never a shorter epoch.

Python's `tarfile`, and so every loader built on it, takes a bad header or a missing end-of-archive mark for the end of
the file and silently drops the rest. Here every header's checksum is verified, every member must lie inside the file,
two zero blocks must end it and nothing may follow them.

Format: POSIX.1-2001 ustar and pax, and GNU long names: what webdataset, img2dataset, tarfile and GNU tar write.
"""

import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from mmpt.data.storage import ByteFile

BLOCK = 512
TAIL_BYTES = 1 << 16
LARGEST_EXTENDED_HEADER_BYTES = 1 << 20
PAX_KEYWORDS = (
    b"atime", b"charset", b"comment", b"ctime", b"gid", b"gname", b"hdrcharset", b"linkpath", b"mtime", b"path",
    b"size", b"uid", b"uname",
)  # fmt: skip
REPACK = "restore the shard from its source, or write it again with `mmpt-data pack`"
REINDEX = "restore the shard, or run `mmpt-data index` again if the change was meant"


class ShardError(ValueError):
    """A shard that cannot be trusted: where, why, and what to do."""

    def __init__(self, shard: str, offset: int, reason: str, cure: str = REPACK):
        super().__init__(shard, offset, reason, cure)  # all four, so that it survives pickling between processes
        self.shard, self.offset, self.reason, self.cure = shard, offset, reason, cure

    def __str__(self) -> str:
        return f"{self.shard} at byte {self.offset}: {self.reason}; {self.cure}"


class Member(NamedTuple):
    """One entry of an archive. Bytes count from the start of the file; `kind` is tar's type flag."""

    path: str
    header_start: int
    data_start: int
    size: int
    kind: bytes

    def is_file(self) -> bool:
        return self.kind in (b"0", b"\0")

    def end(self) -> int:
        """Where the next header begins."""
        return self.data_start + -(-self.size // BLOCK) * BLOCK


class Extent(NamedTuple):
    """Where one sample lies: its key, its first byte, and (extension, first byte, size) of each of its files."""

    key: str
    start: int
    files: tuple[tuple[str, int, int], ...]


def sample_digest(extent: Extent) -> int:
    """CRC-32 of a sample's key and of the extension, place and size of each of its files."""
    return zlib.crc32(repr(extent).encode())


def chunk_digest(samples: np.ndarray) -> int:
    """CRC-32 of the digests of consecutive samples, [n] uint32; never 0, which stands for an unknown one."""
    return zlib.crc32(samples.astype("<u4").tobytes()) or 1


def read_extents(file: ByteFile, shard: str, start: int, stop: int, to_end: bool) -> Iterator[Extent]:
    """The samples in bytes [start, stop) of a shard.

    to_end: the range reaches the end of the file, so the end-of-archive mark must come; otherwise it may not.
    Raises ShardError for any damage, for members that are not regular files, for paths that could escape a folder,
    for a file that comes twice, and for files of one key that are not neighbours.
    """
    key, first, files, finished = "", start, {}, set[str]()
    for member in read_members(file, shard, start, stop, to_end):
        member_key, extension = _split_path(member, shard)
        if member_key != key and files:
            finished.add(key)
            yield Extent(key, first, tuple(files.values()))
            files = {}
        if not files:
            key, first = member_key, member.header_start
        if key in finished:
            raise ShardError(shard, member.header_start, f"the files of key {key!r} are not next to one another")
        if extension in files:
            raise ShardError(shard, member.header_start, f"key {key!r} has two .{extension} files")
        files[extension] = (extension, member.data_start, member.size)
    if files:
        yield Extent(key, first, tuple(files.values()))


def read_members(file: ByteFile, shard: str, start: int, stop: int, to_end: bool) -> Iterator[Member]:
    """The entries in bytes [start, stop) of an archive, extended headers applied. Raises ShardError for any damage."""
    at, header_start, extended = start, start, {}
    while at < stop or to_end:
        header = _read(file, shard, at, BLOCK, stop)
        if header.count(0) == BLOCK:
            if extended:
                raise ShardError(shard, at, "an extended header has no member")
            _check_end(file, shard, at, stop, to_end)
            return
        member = _parse_header(header, shard, at)
        if member.end() > stop:
            beyond = f"the file ends at {stop}" if to_end else f"the index has the next sample at {stop}"
            raise ShardError(shard, at, f"member {member.path!r} of {member.size} bytes is cut short: {beyond}")
        if member.kind in (b"x", b"L"):
            extended |= _extended_fields(member, _read_extended(file, shard, member, stop), shard)
        elif member.kind != b"g":  # a global pax header carries nothing that we use
            if "size" in extended:
                raise ShardError(shard, at, "members beyond 8 GiB are not supported")
            yield member._replace(path=extended.get("path", member.path), header_start=header_start)
            extended = {}
        at = member.end()
        header_start = header_start if extended else at
    if extended:
        raise ShardError(shard, at, "an extended header has no member")


def _check_end(file: ByteFile, shard: str, at: int, stop: int, to_end: bool) -> None:
    if not to_end:
        raise ShardError(shard, at, f"zeros where a header should be: the index has samples up to {stop}", REINDEX)
    if stop - at < 2 * BLOCK:
        raise ShardError(shard, at, "one zero block at the end instead of two: the shard is cut short")
    while at < stop:  # the filling is short, but what follows a hole in a damaged shard need not be
        file.seek(at)
        tail = file.read(min(stop - at, TAIL_BYTES))
        if not tail or tail.count(0) != len(tail):
            raise ShardError(shard, at, "zeros in the middle: data follow what looks like the end of the archive")
        at += len(tail)


def _read(file: ByteFile, shard: str, at: int, size: int, stop: int) -> bytes:
    if at >= stop:
        raise ShardError(shard, at, "the end-of-archive mark is missing: the shard is cut short")
    file.seek(at)
    data = file.read(size)
    if len(data) < size:
        raise ShardError(shard, at, f"the file ends inside a header ({len(data)} of {size} bytes)")
    return data


def _parse_header(header: bytes, shard: str, at: int) -> Member:
    if not _checksum_holds(header):
        raise ShardError(shard, at, _not_tar(header) if at == 0 else "the checksum of a header does not hold")
    try:
        name = header[:100].split(b"\0", 1)[0]
        if header[257:263] == b"ustar\0":
            prefix = header[345:500].split(b"\0", 1)[0]
            name = prefix + b"/" + name if prefix else name
        return Member(name.decode("utf-8"), at, at + BLOCK, _number(header[124:136]), header[156:157])
    except ValueError as error:  # UnicodeDecodeError is one
        raise ShardError(shard, at, f"a header cannot be read ({error})") from error


def _checksum_holds(header: bytes) -> bool:
    """The sum of the header's bytes, the checksum field itself counted as eight spaces (POSIX.1-1988, ustar)."""
    field = header[148:156].split(b"\0", 1)[0].strip()
    if not field or field.strip(b"01234567"):
        return False
    return int(field, 8) == sum(header) - sum(header[148:156]) + 8 * 32


def _number(field: bytes) -> int:
    """An octal number, or GNU's base-256 for those that do not fit."""
    if field[0] == 0o200:
        return int.from_bytes(field[1:], "big")
    return int(field.split(b"\0", 1)[0].strip() or b"0", 8)


def _not_tar(header: bytes) -> str:
    if header.startswith(b"\x1f\x8b"):
        return "compressed with gzip, which cannot be read at an offset: gunzip it"
    return f"not a tar archive: it begins with {header[:24]!r}"


def _read_extended(file: ByteFile, shard: str, member: Member, stop: int) -> bytes:
    if member.size > LARGEST_EXTENDED_HEADER_BYTES:
        raise ShardError(shard, member.header_start, f"an extended header of {member.size} bytes")
    return _read(file, shard, member.data_start, member.size, stop)


def _extended_fields(member: Member, data: bytes, shard: str) -> dict[str, str]:
    """The fields of a GNU long name or a pax header that change what a member is: its path and its size."""
    try:
        if member.kind == b"L":
            return {"path": data.split(b"\0", 1)[0].decode("utf-8")}
        fields = {}
        while data:
            length = int(data[: data.index(b" ")])
            name, equals, value = data[data.index(b" ") + 1 : length].partition(b"=")
            if not equals or length > len(data) or not value.endswith(b"\n"):
                raise ValueError("malformed record")
            if name not in PAX_KEYWORDS and b"." not in name:  # as in VENDOR.keyword; a damaged `path` is no other name
                raise ValueError(f"unknown keyword {name!r}")
            if name in (b"path", b"size"):
                fields[name.decode()] = value[:-1].decode("utf-8")
            data = data[length:]
        return fields
    except ValueError as error:
        raise ShardError(shard, member.header_start, f"an extended header cannot be read ({error})") from error


def _split_path(member: Member, shard: str) -> tuple[str, str]:
    """(key, extension in lower case): the path is cut at the first dot of its last part, as webdataset does."""
    path = member.path
    if not member.is_file():
        raise ShardError(shard, member.header_start, f"{path!r} is not a regular file (type {member.kind!r})")
    folder, slash, name = path.rpartition("/")
    stem, dot, extension = name.partition(".")
    if not stem or not dot or not extension:
        raise ShardError(shard, member.header_start, f"{path!r} has no key and extension")
    if path.startswith("/") or ".." in folder.split("/") or "\0" in path or "\\" in path:
        raise ShardError(shard, member.header_start, f"{path!r} is not a path inside the shard")
    return folder + slash + stem, extension.lower()
