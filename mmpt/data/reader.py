"""Samples by place: from (chunk, index within the chunk) to the bytes of a sample's files."""

from collections import OrderedDict
from typing import NamedTuple

import numpy as np

from mmpt.data import storage
from mmpt.data.manifest import IMAGE_EXTENSIONS, Manifest
from mmpt.data.tar import REINDEX, Extent, ShardError, read_extents


class RawSample(NamedTuple):
    """The undecoded files of one sample by extension, and where they came from: shard, key, first byte."""

    shard: str
    key: str
    offset: int
    files: dict[str, bytes]

    def image(self) -> bytes:
        """The file of its one image: the index has made sure that there is one."""
        return next(data for extension, data in self.files.items() if extension in IMAGE_EXTENSIONS)


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
        shards = self.manifest.shards_of(chunks)
        for shard in np.unique(shards):
            mine = np.flatnonzero(shards == shard)
            mine = mine[np.lexsort((indices[mine], chunks[mine]))]
            place = self.manifest.place(int(shard))
            try:
                with storage.open_bytes(place) as file:
                    for i in mine.tolist():
                        extent = self._extents_of(int(chunks[i]), file, place)[indices[i]]
                        samples[i] = RawSample(place, extent.key, extent.start, _files(file, extent, place))
            except OSError as error:
                raise ShardError(place, 0, f"it cannot be read ({error})", REINDEX) from error
        return samples  # type: ignore[return-value]

    def extents(self, chunk: int) -> tuple[str, list[Extent]]:
        """(the shard's place, where the samples of a chunk lie), without reading their files."""
        place = self.manifest.place(int(self.manifest.shards_of(np.array([chunk]))[0]))
        with storage.open_bytes(place) as file:
            return place, self._extents_of(chunk, file, place)

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
        if chunk.kept is not None:
            extents = [extents[i] for i in chunk.kept.tolist()]
        self._extents[k] = extents
        if len(self._extents) > self._remembered_chunks:
            self._extents.popitem(last=False)
        return extents


def _files(file: storage.ByteFile, extent: Extent, place: str) -> dict[str, bytes]:
    files = {}
    for extension, start, size in extent.files:
        file.seek(start)
        files[extension] = file.read(size)
        if len(files[extension]) != size:
            raise ShardError(place, start, f"the file ends inside {extent.key}.{extension}", REINDEX)
    return files
