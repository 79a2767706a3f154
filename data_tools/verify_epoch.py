"""`mmpt-data verify-epoch SHARDS`: run the ranks of a training dry and prove that they deliver each sample once."""

import argparse
import hashlib
from collections.abc import Iterator
from itertools import count

import numpy as np

from mmpt.data.loader import DataConfig, open_sources
from mmpt.data.mixture import Mixture, batch_positions, place_of
from mmpt.data.sources import SourceReader, Sources


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", help="as data.shards in training: folders or manifests, with :: between")
    parser.add_argument("--weights", default="", metavar="N,N", help="as data.weights in training")
    parser.add_argument("--world-size", type=int, required=True, metavar="W", help="ranks to run")
    parser.add_argument("--global-batch", type=int, required=True, metavar="B", help="pairs per step over all ranks")
    parser.add_argument("--epochs", type=int, default=1, metavar="N", help="passes over the largest source [1]")
    parser.add_argument("--seed", type=int, default=0, help="run.seed of the training [0]")
    parser.add_argument("--lanes", type=int, default=DataConfig.lanes, help=f"data.lanes [{DataConfig.lanes}]")
    parser.add_argument(
        "--window-chunks", type=int, default=DataConfig.window_chunks, help=f"[{DataConfig.window_chunks}]"
    )
    parser.add_argument("--read-keys", action="store_true", help="also read the key of every sample from its shard")


def run(args: argparse.Namespace) -> None:
    """Raises ValueError when a sample is missing from, or repeated in, an epoch of its source."""
    weights = tuple(int(weight) for weight in args.weights.split(",") if weight)
    config = DataConfig(args.shards, weights=weights, lanes=args.lanes, window_chunks=args.window_chunks)
    sources, mixture = open_sources(config, args.seed, check_shards=True)
    reader = SourceReader(sources, config.cache, config.remote) if args.read_keys else None
    chunk_starts = np.cumsum([0, *(length for m in sources.manifests for length in m.chunk_lengths.tolist())])
    delivered, log = np.zeros(int(chunk_starts[-1]), np.int64), hashlib.sha256()
    steps = 0
    for positions in dry_run(mixture, args.global_batch, args.world_size, args.epochs):
        place = place_of(mixture, positions)
        np.add.at(delivered, chunk_starts[place.chunks] + place.indices, 1)
        log.update(positions.tobytes())
        if reader:
            log.update(keys_at(reader, place.chunks, place.indices).encode())
        steps += 1
    check_coverage(sources, mixture, delivered, steps * args.global_batch)
    print(
        f"{args.world_size} ranks, {steps} steps of {args.global_batch}: every sample of every finished epoch was "
        f"delivered once; epochs {', '.join(f'{n:.3f}' for n in mixture.epochs(steps * args.global_batch))}; "
        f"{'keys' if reader else 'positions'} {log.hexdigest()[:16]}"
    )


def dry_run(mixture: Mixture, global_batch: int, world_size: int, epochs: int) -> Iterator[np.ndarray]:
    """The positions of each step, rank after rank, until every source has finished `epochs` epochs."""
    for start in count(0, global_batch):
        if min(mixture.epochs(start)) >= epochs:
            return
        yield np.concatenate([
            batch_positions(mixture, start, global_batch, rank, world_size) for rank in range(world_size)
        ])  # fmt: skip


def keys_at(reader: SourceReader, chunks: np.ndarray, indices: np.ndarray) -> str:
    """The keys of these samples, one per line, from the headers of their shards."""
    keys = {chunk: [extent.key for extent in reader.extents(chunk)[1]] for chunk in np.unique(chunks).tolist()}
    return "".join(f"{keys[chunk][index]}\n" for chunk, index in zip(chunks.tolist(), indices.tolist(), strict=True))


def check_coverage(sources: Sources, mixture: Mixture, delivered: np.ndarray, total: int) -> None:
    """Every sample of a source that is n whole epochs and a part on has come n or n + 1 times, and together they make
    the number that the weights say. ValueError for the first source of which that is not so."""
    first = 0
    for part, passes in _parts(sources, mixture, total):
        counts, first = delivered[first : first + part], first + part
        whole = int(passes)
        wrong = np.flatnonzero((counts < whole) | (counts > whole + 1))
        if len(wrong) or counts.sum() != round(passes * part):
            raise ValueError(
                f"{len(wrong)} of {part} samples were not delivered {whole} or {whole + 1} times "
                f"({counts.sum()} deliveries where {round(passes * part)} were due)"
            )


def _parts(sources: Sources, mixture: Mixture, total: int) -> Iterator[tuple[int, float]]:
    """(samples, passes) of each source, or of all as one where they are not weighted."""
    epochs = mixture.epochs(total)
    if len(epochs) == 1:
        yield sum(manifest.samples for manifest in sources.manifests), epochs[0]
        return
    for manifest, passes in zip(sources.manifests, epochs, strict=True):
        yield manifest.samples, passes
