"""The manifest: what is known of a data set before a byte of it is read in training.

One file, `manifest.safetensors`, beside the shards or anywhere else; built by `mmpt-data index`. It makes the sample
order a pure function and lets a reader start at any sample, because it knows where every chunk of consecutive samples
begins. Its arrays are mapped into memory, so that all processes of a node hold 2 billion samples' worth of it once.
"""

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from mmpt.data import storage
from mmpt.data.remote.ranges import RemoteConfig
from mmpt.data.tables import Texts, read_tables, write_tables
from mmpt.data.tar import REINDEX, ShardError

FILE_NAME = "manifest.safetensors"
FORMAT_VERSION = "2"
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
SHOWN = 3  # shards named in an error about many


class Chunk(NamedTuple):
    """A run of consecutive samples of one shard.

    Bytes [start, stop) of the shard, which hold `stored` samples; to_end: they reach the end of the file. digest: see
    `chunk_digest`; 0 = unknown. kept: [n] indices of the samples that the index's filter kept, ascending, or None where
    it kept all.
    """

    shard: int
    start: int
    stop: int
    to_end: bool
    stored: int
    digest: int
    kept: np.ndarray | None


@dataclass(frozen=True, eq=False)
class Manifest:
    """Facts about S shards cut into K chunks.

    folder:         the place that shard names are relative to; not a fact of the data, so not hashed.
    names:          of the S shards.
    versions:       of the S shards: etags where the storage has them, otherwise ""; not hashed.
    shard_bytes:    [S] int64 sizes.
    shard_samples:  [S] int64, samples stored in each.
    shard_digests:  [S, 16] uint8, BLAKE2b of the keys, extensions, places and sizes of all files in each shard; zeros
                    where the headers were not read.
    chunk_samples:  samples stored per chunk; the last chunk of a shard may hold fewer.
    chunk_starts:   [K] int64, the byte at which each chunk begins, shard after shard.
    chunk_digests:  [K] uint32, see `chunk_digest`; zeros where the headers were not read.
    chunk_lengths:  [K] int32, samples of each chunk that are part of the data set: all, unless there is a filter.
    kept:           [K, ceil(chunk_samples / 8)] uint8, a bit for each stored sample, lowest first; [0, 0] = no filter.
    file:           where this was read from, so that another process can map the same file; "" = nowhere.
    """

    folder: str
    names: Texts
    versions: Texts
    shard_bytes: np.ndarray
    shard_samples: np.ndarray
    shard_digests: np.ndarray
    chunk_samples: int
    chunk_starts: np.ndarray
    chunk_digests: np.ndarray
    chunk_lengths: np.ndarray
    kept: np.ndarray
    file: str = ""

    @cached_property
    def samples(self) -> int:
        """N, the samples of one epoch."""
        return int(self.chunk_lengths.sum(dtype=np.int64))

    @cached_property
    def first_chunks(self) -> np.ndarray:
        """[S + 1] int64, the index of each shard's first chunk; at the end K."""
        return np.concatenate([[0], np.cumsum(-(-self.shard_samples // self.chunk_samples))])

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 over every fact of the data, in hexadecimal."""
        digest = hashlib.sha256(f"{FORMAT_VERSION} {self.chunk_samples}\n".encode())
        for facts in (
            self.names.data, self.names.ends, self.shard_bytes, self.shard_samples, self.shard_digests,
            self.chunk_starts, self.chunk_digests, self.chunk_lengths, self.kept,
        ):  # fmt: skip
            digest.update(f"{facts.shape}".encode())
            digest.update(np.ascontiguousarray(facts, dtype=facts.dtype.newbyteorder("<")).data)
        return digest.hexdigest()

    def place(self, shard: int) -> str:
        """The path or URL of a shard."""
        return storage.join(self.folder, self.names[shard])

    def version(self, shard: int) -> str:
        """The etag of a shard, or "" where the storage has none."""
        return self.versions[shard]

    def shards_of(self, chunks: np.ndarray) -> np.ndarray:
        """The shard that each chunk is part of: [m] int64 -> [m] int64."""
        return np.searchsorted(self.first_chunks, chunks, side="right") - 1  # of empty shards beginning there the last

    def chunk(self, k: int) -> Chunk:
        shard = int(self.shards_of(np.array([k]))[0])
        before = (k - int(self.first_chunks[shard])) * self.chunk_samples
        stored = min(self.chunk_samples, int(self.shard_samples[shard]) - before)
        to_end = k + 1 == int(self.first_chunks[shard + 1])
        stop = int(self.shard_bytes[shard] if to_end else self.chunk_starts[k + 1])
        kept = np.flatnonzero(np.unpackbits(self.kept[k], bitorder="little")) if len(self.kept) else None
        return Chunk(shard, int(self.chunk_starts[k]), stop, to_end, stored, int(self.chunk_digests[k]), kept)

    def __reduce__(self) -> Any:
        """Another process maps the file that this was read from; what is in no file travels whole."""
        if self.file:
            return _read, (self.file, self.folder)
        return Manifest, (
            self.folder, self.names, self.versions, self.shard_bytes, self.shard_samples, self.shard_digests,
            self.chunk_samples, self.chunk_starts, self.chunk_digests, self.chunk_lengths, self.kept,
        )  # fmt: skip


def save_manifest(manifest: Manifest, path: str | os.PathLike) -> None:
    """Write to a local file at once or not at all. The folder is kept in it unless the file lies in that folder."""
    beside = storage.parent(os.path.abspath(path)) == os.path.abspath(manifest.folder)
    tables = {
        "names": manifest.names.data, "name_ends": manifest.names.ends, "versions": manifest.versions.data,
        "version_ends": manifest.versions.ends, "shard_bytes": manifest.shard_bytes,
        "shard_samples": manifest.shard_samples, "shard_digests": manifest.shard_digests,
        "chunk_starts": manifest.chunk_starts, "chunk_digests": manifest.chunk_digests,
        "chunk_lengths": manifest.chunk_lengths, "kept": manifest.kept,
    }  # fmt: skip
    facts = {
        "format_version": FORMAT_VERSION, "content_hash": manifest.content_hash,
        "chunk_samples": str(manifest.chunk_samples), "folder": "" if beside else manifest.folder,
    }  # fmt: skip
    write_tables(path, tables, facts)


def load_manifest(place: str, check_shards: bool = True, remote: RemoteConfig = storage.DEFAULTS) -> Manifest:
    """Read the manifest in this folder, or this manifest file.

    check_shards: also list the folder of the shards and hold it against the manifest; where a folder cannot be listed
    (HTTP), changes are met when a shard is read. Raises ValueError, naming what is wrong and the cure, when there is
    no manifest, when it is damaged, or when shards were changed, are missing, or were added.
    """
    path = storage.join(place, FILE_NAME) if storage.is_folder(place) else place
    if not storage.exists(path):
        if path == place:
            raise ValueError(f"{place} does not exist; give a folder of indexed shards, or a manifest")
        raise ValueError(f"{path} does not exist; build it with `mmpt-data index {place}`")
    manifest = _read(path)
    if manifest.content_hash != read_tables(path)[1]["content_hash"]:
        raise _damaged(path, "its content hash does not hold")
    if check_shards and storage.can_list(manifest.folder):
        check_against(manifest, storage.list_files(manifest.folder, ".tar", remote))
    return manifest


def check_against(manifest: Manifest, found: list[storage.ListedFile]) -> None:
    """Hold the manifest against a listing of its folder. Raises ShardError for the first shard that differs, naming
    others too: missing, changed (in size or version), or, in a folder that the manifest once listed, added."""
    listed = {file.name: file for file in found}
    missing, changed = [], []
    for name, size, version in zip(manifest.names, manifest.shard_bytes.tolist(), manifest.versions, strict=True):
        file = listed.pop(name, None)
        if file is None:
            missing.append(name)
        elif file.size != size:
            changed.append(f"{name} ({file.size} bytes where the index has {size})")
        elif version and file.version and file.version != version:
            changed.append(f"{name} (another version of the same size)")
    inside_folder = not any("/" in name for name in manifest.names)
    for problem, names in (
        ("missing from", missing), ("changed in", changed), ("new in", sorted(listed) if inside_folder else [])
    ):  # fmt: skip
        if names:
            count = f"{len(names)} shard{'s' * (len(names) > 1)}"
            shown = ", ".join(names[:SHOWN]) + ", ..." * (len(names) > SHOWN)
            raise ShardError(manifest.folder, 0, f"{count} {problem} the folder since it was indexed: {shown}", REINDEX)


def _read(path: str, folder: str = "") -> Manifest:
    try:
        tables, facts = read_tables(path)
        if facts["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format version {facts['format_version']} instead of {FORMAT_VERSION}")
        return Manifest(
            folder or facts["folder"] or storage.parent(path), Texts(tables["names"], tables["name_ends"]),
            Texts(tables["versions"], tables["version_ends"]), tables["shard_bytes"], tables["shard_samples"],
            tables["shard_digests"], int(facts["chunk_samples"]), tables["chunk_starts"], tables["chunk_digests"],
            tables["chunk_lengths"],
            tables["kept"], path,
        )  # fmt: skip
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: str, reason: str) -> ValueError:
    return ValueError(f"{path} is damaged ({reason}); build it again with `mmpt-data index {storage.parent(path)}`")
