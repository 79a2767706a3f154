"""From shards to a manifest: read every header, or trust the counts and offsets that others have left beside them."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Literal, NamedTuple

import numpy as np
from pyarrow import parquet

from mmpt.data import storage
from mmpt.data.manifest import IMAGE_EXTENSIONS, Manifest
from mmpt.data.storage import ListedFile
from mmpt.data.tables import pack_texts
from mmpt.data.tar import Extent, ShardError, chunk_digest, read_extents, sample_digest

LARGEST_CHUNK_SAMPLES = 256
CHUNKS_WANTED = 4096
Source = Literal["headers", "offsets", "counts"]


class KeyFilter(NamedTuple):
    """Which samples of a shard are part of the data set: those whose key is `within` (None: any) and not `without`.

    within: from (folder, shard name) to the keys to keep, or None for all of them. It travels to other processes.
    """

    within: Callable[[str, str], frozenset[str] | None]
    without: frozenset[str]

    def of_shard(self, folder: str, name: str) -> Callable[[str], bool]:
        within = self.within(folder, name)
        return lambda key: (within is None or key in within) and key not in self.without


class Scan(NamedTuple):
    """What one shard holds: its samples, the first byte of each (or of the first alone, where no other is known), a
    digest of each ([count] uint32, None = unknown), one of the whole layout ([16] uint8), and which samples are kept
    ([count] bool, None = all)."""

    count: int
    starts: np.ndarray
    sample_digests: np.ndarray | None
    digest: np.ndarray
    kept: np.ndarray | None


Progress = Callable[[Iterable[Scan], int], Iterable[Scan]]


class Task(NamedTuple):
    folder: str
    file: ListedFile
    source: Source
    keep: KeyFilter | None


def build_manifest(
    folder: str, files: Sequence[ListedFile], chunk_samples: int = 0, source: Source = "headers",
    keep: KeyFilter | None = None, workers: int = 0, progress: Progress | None = None,
) -> Manifest:  # fmt: skip
    """The manifest of these shards (names relative to folder), in the order given.

    chunk_samples: 0 = LARGEST_CHUNK_SAMPLES for a million samples and more, fewer for less, so that the order of a
    small data set mixes samples rather than long runs of neighbours. source: `headers` reads every header of every
    shard; `offsets` believes the `.tar.idx` beside each; `counts` believes a `_stats.json` or the `.parquet` beside it,
    or a `sizes.json` in the folder, and makes each shard one chunk, as it knows no offsets. workers: processes that
    scan; 0 = this one. progress: wraps the iterable of results, as a progress bar does.
    Raises ShardError for a damaged shard, ValueError when there is no sample at all or no such file beside a shard.
    """
    if source == "counts" and (chunk_samples or keep):
        raise ValueError("with counts alone a shard is one chunk and all of its samples are kept: read the headers")
    tasks = [Task(folder, file, source, keep) for file in files]
    show = progress or (lambda scans, _: scans)
    if not workers or len(tasks) < 2:
        return assemble(folder, files, show(map(scan_shard, tasks), len(tasks)), chunk_samples, source)
    with ProcessPoolExecutor(workers, mp_context=get_context("forkserver")) as pool:
        scans = pool.map(scan_shard, tasks, chunksize=int(np.clip(len(tasks) // workers // 8, 1, 64)))
        return assemble(folder, files, show(scans, len(tasks)), chunk_samples, source)


def assemble(
    folder: str, files: Sequence[ListedFile], scans: Iterable[Scan], chunk_samples: int, source: Source
) -> Manifest:
    """Put the scans of all shards together, keeping of each only its chunks as soon as their size is known."""
    counts, digests, waiting, chunks, total = [], [], list[Scan](), list[_Chunks](), 0
    for scan in scans:
        counts.append(scan.count)
        total += scan.count
        digests.append(scan.digest)
        waiting.append(scan)
        if source != "counts" and (chunk_samples or total >= CHUNKS_WANTED * LARGEST_CHUNK_SAMPLES):
            chunk_samples = chunk_samples or LARGEST_CHUNK_SAMPLES
            chunks += [_cut(scan, chunk_samples) for scan in waiting]
            waiting = []
    if not total:
        raise ValueError(f"{folder} has no samples in {len(files)} shards")
    chunk_samples = chunk_samples or (max(counts) if source == "counts" else max(1, total // CHUNKS_WANTED))
    chunks += [_cut(scan, chunk_samples) for scan in waiting]
    lengths = np.concatenate([part.lengths for part in chunks])
    if not lengths.sum():
        raise ValueError(f"the filter keeps none of the {total} samples of {folder}")
    return Manifest(
        folder, pack_texts([file.name for file in files]), pack_texts([file.version for file in files]),
        shard_bytes=np.array([file.size for file in files], dtype=np.int64),
        shard_samples=np.array(counts, dtype=np.int64),
        shard_digests=np.stack(digests),
        chunk_samples=chunk_samples,
        chunk_starts=np.concatenate([part.starts for part in chunks]),
        chunk_digests=np.concatenate([part.digests for part in chunks]),
        chunk_lengths=lengths,
        kept=np.concatenate([part.kept_bits(chunk_samples) for part in chunks])
        if any(part.kept is not None for part in chunks) else np.empty((0, 0), np.uint8),
    )  # fmt: skip


class _Chunks(NamedTuple):
    """The chunks of one shard: first bytes, digests and lengths [k], samples stored [k], and [k, chunk_samples] which
    of them are kept, or None for all."""

    starts: np.ndarray
    digests: np.ndarray
    lengths: np.ndarray
    stored: np.ndarray
    kept: np.ndarray | None

    def kept_bits(self, chunk_samples: int) -> np.ndarray:
        """[k, ceil(chunk_samples / 8)] uint8, lowest bit first."""
        kept = np.arange(chunk_samples) < self.stored[:, None] if self.kept is None else self.kept
        return np.packbits(kept, axis=1, bitorder="little")


def _cut(scan: Scan, chunk_samples: int) -> _Chunks:
    firsts = np.arange(0, scan.count, chunk_samples)
    stored = np.minimum(chunk_samples, scan.count - firsts).astype(np.int32)
    digests = np.zeros(len(stored), dtype=np.uint32)
    if scan.sample_digests is not None:
        digests[:] = [chunk_digest(scan.sample_digests[first : first + chunk_samples]) for first in firsts.tolist()]
    starts = scan.starts[::chunk_samples].copy()
    if scan.kept is None:
        return _Chunks(starts, digests, stored, stored, None)
    padded = np.zeros(len(stored) * chunk_samples, dtype=bool)
    padded[: scan.count] = scan.kept
    kept = padded.reshape(len(stored), chunk_samples)
    return _Chunks(starts, digests, kept.sum(1, dtype=np.int32), stored, kept)


def scan_shard(task: Task) -> Scan:
    """What one shard holds, from where the task says. Raises ShardError for damage, ValueError for no such file."""
    place = storage.join(task.folder, task.file.name)
    if task.source == "headers":
        return read_headers(task.file, place, task.keep and task.keep.of_shard(task.folder, task.file.name))
    if task.source == "offsets" and task.keep is None:
        starts = read_offsets(f"{place}.idx", task.file.size)
        return Scan(len(starts), starts, None, np.zeros(16, np.uint8), None)
    if task.source == "offsets":
        raise ValueError(f"which samples of {place} to keep is told by their keys: read the headers")
    count = _read_count(task.folder, task.file.name)
    return Scan(count, np.zeros(min(count, 1), np.int64), None, np.zeros(16, np.uint8), None)


def read_headers(file: ListedFile, place: str, keep: Callable[[str], bool] | None = None) -> Scan:
    """Read every header of a shard. Raises ShardError for any damage and for a sample without its one image."""
    digest, starts, digests, keys = hashlib.blake2b(digest_size=16), [], [], []
    with storage.open_bytes(place, file.version) as data:
        for extent in read_extents(data, place, 0, file.size, to_end=True):
            image_of(extent, place)
            digest.update(repr(extent).encode())
            starts.append(extent.start)
            digests.append(sample_digest(extent))
            keys.append(extent.key)
    kept = None if keep is None else np.array([keep(key) for key in keys], dtype=bool)
    whole = np.frombuffer(digest.digest(), np.uint8)
    return Scan(len(keys), np.array(starts, np.int64), np.array(digests, np.uint32), whole, kept)


def image_of(extent: Extent, shard: str) -> tuple[str, int, int]:
    """The one image among a sample's files. Raises ShardError when there is none or more than one."""
    images = [file for file in extent.files if file[0] in IMAGE_EXTENSIONS]
    if len(images) != 1:
        found = ", ".join(f".{extension}" for extension, _, _ in extent.files)
        raise ShardError(shard, extent.start, f"key {extent.key!r} should have one image and has {found}")
    return images[0]


def read_offsets(place: str, shard_bytes: int) -> np.ndarray:
    """[n] int64, the first byte of each sample, from Energon's `.tar.idx`: uint64 offsets and, last, the end of the
    last sample. Raises ValueError when they do not ascend within the shard."""
    with storage.open_bytes(place) as file:
        data = file.read(-1)
    if not data or len(data) % 8:
        raise ValueError(f"{place} of {len(data)} bytes is not a list of 8-byte offsets")
    offsets = np.frombuffer(data, "<u8").astype(np.int64)
    if offsets[0] != 0 or (np.diff(offsets) <= 0).any() or offsets[-1] > shard_bytes or (offsets % 512).any():
        raise ValueError(f"{place} does not list ascending offsets within the {shard_bytes} bytes of its shard")
    return offsets[:-1]


def _read_count(folder: str, name: str) -> int:
    """The samples of a shard, from img2dataset's `NAME_stats.json` or webdataset's `sizes.json`, or the rows of
    img2dataset's `NAME.parquet` whose status is `success`."""
    for place, field in (
        (storage.join(folder, f"{name.removesuffix('.tar')}_stats.json"), "successes"),
        (storage.join(folder, "sizes.json"), name),
    ):  # fmt: skip
        if storage.exists(place):
            value = json.loads(storage.read_text(place)).get(field)
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"{place}: {field!r} is {value!r} and not a count")
            return value
    table = storage.join(folder, f"{name.removesuffix('.tar')}.parquet")
    if storage.exists(table):
        with storage.open_bytes(table) as file:
            rows = parquet.read_table(file, columns=["status"])  # type: ignore[arg-type]
        return rows["status"].to_pylist().count("success")
    raise ValueError(f"nothing beside {storage.join(folder, name)} tells how many samples it has: read the headers")
