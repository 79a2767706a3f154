"""The manifest: what is known of a data set before a byte of it is read in training.

One small file, `manifest.npz`, beside the shards; built by `mmpt-data index`. It makes the sample order a pure function
and lets a reader start at any sample, because it knows where every chunk of consecutive samples begins.
"""

import hashlib
import io
import os
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from mmpt.data import storage
from mmpt.data.tar import REINDEX, Extent, ShardError, read_extents

FILE_NAME = "manifest.npz"
FORMAT_VERSION = 1
LARGEST_CHUNK_SAMPLES = 256
CHUNKS_WANTED = 4096
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")


@dataclass(frozen=True, eq=False)
class Manifest:
    """Facts about S shards cut into K chunks.

    folder:         the place that shard names are relative to; not a fact of the data, so not hashed.
    shards:         [S] names.
    shard_bytes:    [S] int64 sizes.
    shard_samples:  [S] int64 sample counts.
    shard_digests:  [S] 16 bytes each, BLAKE2b of the keys, extensions, places and sizes of all files in the shard.
    chunk_samples:  samples per chunk; the last chunk of a shard may hold fewer.
    chunk_starts:   [K] int64, the byte at which each chunk begins, shard after shard.
    """

    folder: str
    shards: tuple[str, ...]
    shard_bytes: np.ndarray
    shard_samples: np.ndarray
    shard_digests: np.ndarray
    chunk_samples: int
    chunk_starts: np.ndarray

    @cached_property
    def samples(self) -> int:
        """N, all samples."""
        return int(self.shard_samples.sum())

    @cached_property
    def chunk_shards(self) -> np.ndarray:
        """[K] int64, the shard that each chunk is part of."""
        return np.repeat(np.arange(len(self.shards)), -(-self.shard_samples // self.chunk_samples))

    @cached_property
    def chunk_lengths(self) -> np.ndarray:
        """[K] int64, the samples in each chunk."""
        chunks = -(-self.shard_samples // self.chunk_samples)
        first = np.cumsum(chunks) - chunks
        before = (np.arange(len(self.chunk_shards)) - first[self.chunk_shards]) * self.chunk_samples
        return np.minimum(self.chunk_samples, self.shard_samples[self.chunk_shards] - before)

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 over every fact, in hexadecimal."""
        digest = hashlib.sha256(f"{FORMAT_VERSION} {self.chunk_samples} {len(self.shards)}\n".encode())
        digest.update("\n".join(self.shards).encode())
        for facts in (self.shard_bytes, self.shard_samples, self.shard_digests, self.chunk_starts):
            digest.update(np.ascontiguousarray(facts, dtype=facts.dtype.newbyteorder("<")).tobytes())
        return digest.hexdigest()

    def place(self, shard: int) -> str:
        """The path or URL of a shard."""
        return storage.join(self.folder, self.shards[shard])


def build_manifest(folder: str, names: Iterable[str], chunk_samples: int = 0) -> Manifest:
    """Scan the headers of these shards (names relative to folder).

    chunk_samples 0: LARGEST_CHUNK_SAMPLES for a million samples and more, fewer for less, so that the order of a small
    data set mixes samples rather than long runs of neighbours.
    Raises ShardError for a damaged shard, ValueError when there is no sample at all.
    """
    names = tuple(names)
    scans = [_scan(storage.join(folder, name)) for name in names]
    samples = np.array([len(starts) for starts, _, _ in scans], dtype=np.int64)
    if not samples.sum():
        raise ValueError(f"{folder} has no samples in {len(names)} shards")
    chunk_samples = chunk_samples or int(np.clip(samples.sum() // CHUNKS_WANTED, 1, LARGEST_CHUNK_SAMPLES))
    return Manifest(
        folder, names,
        shard_bytes=np.array([size for _, size, _ in scans], dtype=np.int64),
        shard_samples=samples,
        shard_digests=np.frombuffer(b"".join(digest for _, _, digest in scans), np.uint8).reshape(-1, 16),
        chunk_samples=chunk_samples,
        chunk_starts=np.concatenate([starts[::chunk_samples] for starts, _, _ in scans]),
    )  # fmt: skip


def _scan(shard: str) -> tuple[np.ndarray, int, bytes]:
    """(first byte of each sample, size of the shard, digest of its layout)."""
    size = storage.size_bytes(shard)
    digest, starts = hashlib.blake2b(digest_size=16), []
    with storage.open_bytes(shard) as file:
        for extent in read_extents(file, shard, 0, size, to_end=True):
            image_of(extent, shard)
            digest.update(repr(extent).encode())
            starts.append(extent.start)
    return np.array(starts, dtype=np.int64), size, digest.digest()


def image_of(extent: Extent, shard: str) -> tuple[str, int, int]:
    """The one image among a sample's files. Raises ShardError when there is none or more than one."""
    images = [file for file in extent.files if file[0] in IMAGE_EXTENSIONS]
    if len(images) != 1:
        found = ", ".join(f".{extension}" for extension, _, _ in extent.files)
        raise ShardError(shard, extent.start, f"key {extent.key!r} should have one image and has {found}")
    return images[0]


def save_manifest(manifest: Manifest, path: str | os.PathLike) -> None:
    """Write to a local file at once or not at all."""
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer, version=np.int64(FORMAT_VERSION), content_hash=np.array(manifest.content_hash),
        shards=np.array("\n".join(manifest.shards)), shard_bytes=manifest.shard_bytes,
        shard_samples=manifest.shard_samples, shard_digests=manifest.shard_digests,
        chunk_samples=np.int64(manifest.chunk_samples), chunk_starts=manifest.chunk_starts,
    )  # fmt: skip
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    temporary.write_bytes(buffer.getvalue())
    temporary.replace(path)


def load_manifest(place: str) -> Manifest:
    """Read the manifest in this folder, or this manifest file, and check that its shards are there.

    Raises ValueError, naming what is wrong and the cure, when there is no manifest, when it is damaged, or when a shard
    is missing or has another size than it had.
    """
    path = storage.join(place, FILE_NAME) if storage.is_folder(place) else place
    folder = storage.parent(path)
    if not storage.exists(path):
        raise ValueError(f"{path} does not exist; build it with `mmpt-data index {folder}`")
    manifest = _read(path, folder)
    for shard, expected in zip(manifest.shards, manifest.shard_bytes.tolist(), strict=True):
        place = storage.join(folder, shard)
        if not storage.exists(place):
            raise ShardError(place, 0, "the shard is missing", REINDEX)
        if (size := storage.size_bytes(place)) != expected:
            raise ShardError(place, min(size, expected), f"{size} bytes where the index has {expected}", REINDEX)
    return manifest


def _read(path: str, folder: str) -> Manifest:
    try:
        with storage.open_bytes(path) as file, np.load(io.BytesIO(file.read(-1)), allow_pickle=False) as facts:
            if int(facts["version"]) != FORMAT_VERSION:
                raise ValueError(f"format version {facts['version']} instead of {FORMAT_VERSION}")
            manifest = Manifest(
                folder, tuple(str(facts["shards"]).split("\n")), facts["shard_bytes"], facts["shard_samples"],
                facts["shard_digests"], int(facts["chunk_samples"]), facts["chunk_starts"],
            )  # fmt: skip
            if manifest.content_hash != str(facts["content_hash"]):
                raise ValueError("its content hash does not hold")
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        cure = f"build it again with `mmpt-data index {folder}`"
        raise ValueError(f"{path} is damaged ({error}); {cure}") from error
    return manifest
