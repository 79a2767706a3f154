"""Samples by place: from (chunk, index within the chunk) to the bytes of a sample's files."""

from collections import OrderedDict
from typing import NamedTuple

import numpy as np

from mmpt.data import storage
from mmpt.data.manifest import Manifest
from mmpt.data.tar import REINDEX, Extent, ShardError, read_extents


class RawSample(NamedTuple):
    """The undecoded files of one sample by extension, and where they came from."""

    shard: str
    key: str
    files: dict[str, bytes]


class Reader:
    """Reads samples of one manifest. Remembers where the samples of recently used chunks lie, not their bytes."""

    def __init__(self, manifest: Manifest, remembered_chunks: int = 4096):
        self.manifest = manifest
        self._remembered_chunks = remembered_chunks
        self._extents: OrderedDict[int, list[Extent]] = OrderedDict()

    def read(self, chunks: np.ndarray, indices: np.ndarray) -> list[RawSample]:
        """The samples at these places, in the order given; read shard by shard, front to back.

        Raises ShardError when a shard is not what the manifest says.
        """
        samples: list[RawSample | None] = [None] * len(chunks)
        shards = self.manifest.chunk_shards[chunks]
        for shard in np.unique(shards):
            mine = np.flatnonzero(shards == shard)
            mine = mine[np.lexsort((indices[mine], chunks[mine]))]
            place = self.manifest.place(int(shard))
            try:
                with storage.open_bytes(place) as file:
                    for i in mine.tolist():
                        extent = self._extents_of(int(chunks[i]), file, place)[indices[i]]
                        samples[i] = RawSample(place, extent.key, _files(file, extent, place))
            except OSError as error:
                raise ShardError(place, 0, f"it cannot be read ({error})", REINDEX) from error
        return samples  # type: ignore[return-value]

    def _extents_of(self, chunk: int, file: storage.ByteFile, place: str) -> list[Extent]:
        if chunk in self._extents:
            self._extents.move_to_end(chunk)
            return self._extents[chunk]
        start, stop, to_end = self._range(chunk)
        extents = list(read_extents(file, place, start, stop, to_end))
        expected = int(self.manifest.chunk_lengths[chunk])
        if len(extents) != expected:
            raise ShardError(place, start, f"{len(extents)} samples where the index has {expected}", REINDEX)
        self._extents[chunk] = extents
        if len(self._extents) > self._remembered_chunks:
            self._extents.popitem(last=False)
        return extents

    def _range(self, chunk: int) -> tuple[int, int, bool]:
        """(first byte, byte after the last, whether that is the end of the shard)."""
        manifest = self.manifest
        start, shard = int(manifest.chunk_starts[chunk]), manifest.chunk_shards[chunk]
        if chunk + 1 < len(manifest.chunk_starts) and manifest.chunk_shards[chunk + 1] == shard:
            return start, int(manifest.chunk_starts[chunk + 1]), False
        return start, int(manifest.shard_bytes[shard]), True


def _files(file: storage.ByteFile, extent: Extent, place: str) -> dict[str, bytes]:
    files = {}
    for extension, start, size in extent.files:
        file.seek(start)
        files[extension] = file.read(size)
        if len(files[extension]) != size:
            raise ShardError(place, start, f"the file ends inside {extent.key}.{extension}", REINDEX)
    return files
