"""What 2 billion samples in 200,000 shards cost: the manifest is real, the shards are not needed for it."""

import multiprocessing
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import psutil
import pytest

from mmpt.data.manifest import FILE_NAME, Manifest, load_manifest, save_manifest
from mmpt.data.mixture import batch_positions, place_of
from mmpt.data.sources import Sources
from mmpt.data.tables import pack_texts
from mmpt.data.text import caption_fields

SHARDS, SHARD_SAMPLES, CHUNK = 200_000, 10_000, 256
PROCESSES, PER_NODE, NODE_BYTES = 2, 8, 500_000_000


def synthetic(folder: Path) -> Manifest:
    """Ten thousand samples of 43 kB in each of 200,000 shards, with an etag each."""
    chunks = -(-SHARD_SAMPLES // CHUNK)
    lengths = np.full((SHARDS, chunks), CHUNK, dtype=np.int32)
    lengths[:, -1] = SHARD_SAMPLES - (chunks - 1) * CHUNK
    return Manifest(
        str(folder), pack_texts([f"{i:06d}.tar" for i in range(SHARDS)]),
        pack_texts([f"{i:032x}" for i in range(SHARDS)]),
        shard_bytes=np.full(SHARDS, 430_000_000), shard_samples=np.full(SHARDS, SHARD_SAMPLES),
        shard_digests=np.random.default_rng(0).integers(0, 256, (SHARDS, 16), dtype=np.uint8), chunk_samples=CHUNK,
        chunk_starts=np.tile(np.arange(chunks) * CHUNK * 43_008, SHARDS),
        chunk_digests=np.ones(lengths.size, dtype=np.uint32), chunk_lengths=lengths.reshape(-1),
        kept=np.empty((0, 0), np.uint8),
    )  # fmt: skip


def use(path: str, rank: int, pipe: Connection) -> None:
    """What a rank does: load, order an epoch, locate some batches. Reports its own memory when all have done so."""
    before, began = psutil.Process().memory_full_info().uss, time.perf_counter()
    manifest = load_manifest(path, check_shards=False)
    seconds = time.perf_counter() - began
    sources = Sources((manifest,), (caption_fields("txt"),))
    mixture = sources.mixture((), seed=3, lanes=64, window_chunks=4)
    chunks = 0
    for step in range(3):
        place = place_of(mixture, batch_positions(mixture, step * 32768, 32768, rank, PROCESSES))
        chunks += sum(manifest.chunk(int(k)).stored for k in np.unique(place.chunks)[:5])
    pipe.send((manifest.samples, chunks, seconds))
    pipe.recv()
    pipe.send(psutil.Process().memory_full_info().uss - before)


@pytest.mark.slow
def test_two_billion_samples_fit_a_node(tmp_path: Path):
    """The file once, plus what each of a node's eight ranks holds for itself, stays under half a gigabyte."""
    save_manifest(synthetic(tmp_path), tmp_path / FILE_NAME)
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for rank in range(PROCESSES):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=use, args=(str(tmp_path / FILE_NAME), rank, theirs)))
        processes[-1].start()
        pipes.append(ours)
    facts = [pipe.recv() for pipe in pipes]
    assert {samples for samples, _, _ in facts} == {SHARDS * SHARD_SAMPLES}
    for pipe in pipes:
        pipe.send("all have mapped it")
    own = [pipe.recv() for pipe in pipes]
    for process in processes:
        process.join()
    total = (tmp_path / FILE_NAME).stat().st_size + PER_NODE * max(own)
    assert total < NODE_BYTES, f"{total / 1e6:.0f} MB: the file and {[round(n / 1e6) for n in own]} MB"
    slowest = max(seconds for _, _, seconds in facts)
    print(f"{total / 1e6:.0f} MB per node, of which each rank {max(own) / 1e6:.0f} MB; loaded in {slowest:.1f} s")
