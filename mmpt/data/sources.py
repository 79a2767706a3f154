"""The data sets of a run as one: their manifests, how they are mixed, and where each one's captions are.

Chunks of all sources are numbered on, source after source.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mmpt.data import storage
from mmpt.data.manifest import Manifest
from mmpt.data.mixture import Mixture, smallest_weights
from mmpt.data.order import Order
from mmpt.data.permutation import hash_key
from mmpt.data.reader import RawSample, Reader, range_of
from mmpt.data.remote.cache import CacheConfig, Range
from mmpt.data.remote.ranges import RemoteConfig
from mmpt.data.tar import Extent
from mmpt.data.text import CaptionFields, caption_fields

SEPARATOR = "::"
SOURCE = 4  # what the key of a seed is for; order.py has 1 and 2, quarantine.py 3


@dataclass(frozen=True, eq=False)
class Sources:
    """manifests: of the S sources; captions: the caption fields of each."""

    manifests: tuple[Manifest, ...]
    captions: tuple[CaptionFields, ...]

    @cached_property
    def first_chunks(self) -> np.ndarray:
        """[S + 1] int64, where the chunks of each source begin among all; at the end their number."""
        return np.cumsum([0, *(len(manifest.chunk_lengths) for manifest in self.manifests)])

    def source_of(self, chunks: np.ndarray) -> np.ndarray:
        """The source of each chunk: [m] int64 -> [m] int64."""
        return np.searchsorted(self.first_chunks, chunks, side="right") - 1

    def caption_fields_of(self, chunk: int) -> CaptionFields:
        return self.captions[int(self.source_of(np.array([chunk]))[0])]

    def remote_ranges(self, chunks: np.ndarray) -> list[Range]:
        """What the node's cache must hold for these chunks: nothing of local sources."""
        out = []
        for source in np.unique(self.source_of(chunks)).tolist():
            manifest = self.manifests[source]
            if not storage.is_local(manifest.folder):
                own = np.unique(chunks[self.source_of(chunks) == source]) - self.first_chunks[source]
                out += [range_of(manifest, manifest.chunk(chunk)) for chunk in own.tolist()]
        return out

    def mixture(self, weights: tuple[int, ...], seed: int, lanes: int, window_chunks: int) -> Mixture:
        """The order of all samples. Without weights the sources are one data set, each sample once per epoch; with
        weights (one for each, ValueError otherwise) each runs through epochs of its own."""
        if not weights:
            lengths = [manifest.chunk_lengths for manifest in self.manifests]
            window = window_chunks * max(manifest.chunk_samples for manifest in self.manifests)
            whole = lengths[0] if len(lengths) == 1 else np.concatenate(lengths)
            return Mixture((Order(whole, seed, lanes, window),), (1,), (0,))
        if len(weights) != len(self.manifests):
            raise ValueError(f"data.weights has {len(weights)} numbers for {len(self.manifests)} sources")
        orders = tuple(
            Order(manifest.chunk_lengths, _seed_of(seed, source), lanes, window_chunks * manifest.chunk_samples)
            for source, manifest in enumerate(self.manifests)
        )
        return Mixture(orders, smallest_weights(weights), tuple(self.first_chunks[:-1].tolist()))


def split_sources(text: str) -> list[str]:
    """`a::b` -> [a, b]; fsspec's chained URLs, which also use ::, are not supported as sources.

    ValueError for a part that is empty, which is what a shell makes of a variable that is not set.
    """
    parts = text.split(SEPARATOR) if text else []
    if not all(parts):
        raise ValueError(f"data.shards {text!r} has nothing on one side of {SEPARATOR!r}")
    return parts


def captions_per_source(text: str, sources: int) -> tuple[CaptionFields, ...]:
    """`caption_field` for all sources, or one for each, separated by ::. ValueError for another number."""
    fields = tuple(caption_fields(part) for part in text.split(SEPARATOR))
    if len(fields) not in (1, sources):
        raise ValueError(f"data.caption_field names {len(fields)} sources and data.shards {sources}")
    return fields * sources if len(fields) == 1 else fields


def _seed_of(seed: int, source: int) -> int:
    """Unrelated for any two pairs of seed and source, as seed + source would not be."""
    return int(hash_key(seed, SOURCE, source)[0] >> np.uint64(1))


class SourceReader:
    """Reads samples of all sources by chunk and index; see `Reader`."""

    def __init__(
        self, sources: Sources, cache: CacheConfig, remote: RemoteConfig, unread: frozenset[str] = frozenset()
    ):
        self._sources = sources
        self._readers = [Reader(manifest, cache, remote, unread) for manifest in sources.manifests]

    def read(self, chunks: np.ndarray, indices: np.ndarray) -> Sequence[RawSample]:
        """The samples at these places, in the order given. Raises ShardError for a shard that cannot be trusted."""
        out: list[RawSample | None] = [None] * len(chunks)
        of = self._sources.source_of(chunks)
        for source in np.unique(of).tolist():
            here = np.flatnonzero(of == source)
            own = chunks[here] - self._sources.first_chunks[source]
            for i, sample in zip(here.tolist(), self._readers[source].read(own, indices[here]), strict=True):
                out[i] = sample
        return out  # type: ignore[return-value]

    def extents(self, chunk: int) -> tuple[str, list[Extent]]:
        """(the shard's place, where the samples of a chunk lie), without reading their files."""
        source, own = self._own(chunk)
        return self._readers[source].extents(own)

    def chunk_length(self, chunk: int) -> int:
        """Samples of a chunk."""
        source, own = self._own(chunk)
        return int(self._sources.manifests[source].chunk_lengths[own])

    def _own(self, chunk: int) -> tuple[int, int]:
        """(the chunk's source, its index among that source's chunks)"""
        source = int(self._sources.source_of(np.array([chunk]))[0])
        return source, chunk - int(self._sources.first_chunks[source])
