"""Samples by place: from (chunk, index within the chunk) to the bytes of a sample's files."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from os import SEEK_END
from typing import NamedTuple

import numpy as np

from mmpt.data import storage
from mmpt.data.manifest import IMAGE_EXTENSIONS, Chunk, Manifest
from mmpt.data.remote.cache import CacheConfig, ChunkCache, Range
from mmpt.data.remote.ranges import RemoteConfig, RemoteError
from mmpt.data.remote.space import SpaceError
from mmpt.data.scan import image_of
from mmpt.data.tar import REINDEX, Extent, ShardError, chunk_digest, read_extents, sample_digest


class RawSample(NamedTuple):
    """The undecoded files of one sample by extension, and where they came from: shard, key, first byte."""

    shard: str
    key: str
    offset: int
    files: dict[str, bytes]

    def image(self) -> bytes:
        """The file of its one image: `Reader` has made sure that there is one."""
        return next(data for extension, data in self.files.items() if extension in IMAGE_EXTENSIONS)


class Reader:
    """Reads samples of one manifest: of local shards where they lie, of remote ones through the cache of this node.

    unread: extensions of files that are passed over; a picture's regions weigh ten times the picture.
    Remembers where the samples of recently used chunks lie, not their bytes.
    """

    def __init__(
        self, manifest: Manifest, cache: CacheConfig | None = None, remote: RemoteConfig | None = None,
        unread: frozenset[str] = frozenset(), remembered_chunks: int = 4096,
    ):  # fmt: skip
        self.manifest, self._unread = manifest, unread
        self._cache = None
        if not storage.is_local(manifest.folder):
            self._cache = ChunkCache(cache or CacheConfig(), remote or storage.DEFAULTS)
        self._remembered_chunks = remembered_chunks
        self._extents: OrderedDict[int, list[Extent]] = OrderedDict()

    def read(self, chunks: np.ndarray, indices: np.ndarray) -> list[RawSample]:
        """The samples at these places, in the order given; read chunk by chunk, front to back.

        Raises ShardError when a shard is not what the manifest says, or cannot be read.
        """
        samples: list[RawSample | None] = [None] * len(chunks)
        for k in np.unique(chunks).tolist():
            mine = np.flatnonzero(chunks == k)
            with self._opened(k) as (file, place):
                extents = self._extents_of(k, file, place)
                for i in mine[np.argsort(indices[mine], kind="stable")].tolist():
                    extent = extents[indices[i]]
                    samples[i] = RawSample(place, extent.key, extent.start, _files(file, extent, place, self._unread))
        return samples  # type: ignore[return-value]

    def extents(self, chunk: int) -> tuple[str, list[Extent]]:
        """(the shard's place, where the samples of a chunk lie), without reading their files."""
        with self._opened(chunk) as (file, place):
            return place, self._extents_of(chunk, file, place)

    @contextmanager
    def _opened(self, k: int) -> Iterator[tuple[storage.ByteFile, str]]:
        """(a file in which the chunk can be read at its offsets in the shard, the shard's place)"""
        chunk = self.manifest.chunk(k)
        place = self.manifest.place(chunk.shard)
        try:
            if self._cache is None:
                with storage.open_bytes(place) as file:
                    self._check_size(chunk, file.seek(0, SEEK_END), place)
                    yield file, place
            else:
                with self._cache.open(range_of(self.manifest, chunk)) as file:
                    yield file, place
        except RemoteError as error:
            raise ShardError(place, error.offset, error.reason, error.cure) from error
        except SpaceError as error:
            raise ShardError(place, chunk.start, str(error), "give data.cache more room") from error
        except OSError as error:
            raise ShardError(place, chunk.start, f"it cannot be read ({error})", REINDEX) from error

    def _check_size(self, chunk: Chunk, found: int, place: str) -> None:
        expected = int(self.manifest.shard_bytes[chunk.shard])
        if found != expected:
            raise ShardError(place, min(found, expected), f"{found} bytes where the index has {expected}", REINDEX)

    def _extents_of(self, k: int, file: storage.ByteFile, place: str) -> list[Extent]:
        """Where the samples of a chunk lie that are part of the data set."""
        if k in self._extents:
            self._extents.move_to_end(k)
            return self._extents[k]
        chunk = self.manifest.chunk(k)
        extents = list(read_extents(file, place, chunk.start, chunk.stop, chunk.to_end))
        if len(extents) != chunk.stored:
            found = f"{len(extents)} samples where the index has {chunk.stored}"
            raise ShardError(place, chunk.start, found, REINDEX)
        for extent in extents:
            image_of(extent, place)
        if chunk.digest and chunk_digest(np.array([sample_digest(extent) for extent in extents])) != chunk.digest:
            raise ShardError(place, chunk.start, "its files are not those that were indexed", REINDEX)
        if chunk.kept is not None:
            extents = [extents[i] for i in chunk.kept.tolist()]
        self._extents[k] = extents
        if len(self._extents) > self._remembered_chunks:
            self._extents.popitem(last=False)
        return extents


def range_of(manifest: Manifest, chunk: Chunk) -> Range:
    """What the cache is asked for by a chunk."""
    shard = chunk.shard
    total = int(manifest.shard_bytes[shard])
    return Range(manifest.place(shard), manifest.versions[shard], chunk.start, chunk.stop, total)


def _files(file: storage.ByteFile, extent: Extent, place: str, unread: frozenset[str]) -> dict[str, bytes]:
    files = {}
    for extension, start, size in extent.files:
        if extension in unread:
            continue
        file.seek(start)
        files[extension] = file.read(size)
        if len(files[extension]) != size:
            raise ShardError(place, start, f"the file ends inside {extent.key}.{extension}", REINDEX)
    return files
