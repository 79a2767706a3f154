"""The order of samples as a pure function of (seed, epoch, manifest); the whole state of a loader is one integer.

Every sample that is ever delivered has a *position* p = 0, 1, 2, ... in an endless stream. Of a data set of N samples

    epoch(p) = p // N        lane(p) = p mod L        offset(p) = p // L

so each epoch holds each sample exactly once, nothing is dropped and nothing repeated, and a batch may straddle two
epochs. Within an epoch:

1. Shards are cut into chunks of consecutive samples; a keyed permutation orders the chunks.
2. Their samples, laid one after another in that order, are cut into L contiguous slices, one per *lane*, so that a lane
   reads few chunks at a time. Lane l's slice is as long as the number of the epoch's positions that are l modulo L.
3. Within a lane's slice, windows of a few chunks' samples are shuffled by a keyed permutation.

A global batch of N_b = q L samples is the next q of each lane, lane after lane; rank r of W takes the r-th of W equal
parts. World size, workers and prefetching therefore never change what is delivered.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from mmpt.data.permutation import hash_key, permute

CHUNK_ORDER, WINDOW_ORDER = 1, 2  # what a key is for
MOST_LANES = 64  # by default: enough for diverse batches, few enough that each reads long runs


@dataclass(frozen=True, eq=False)
class Order:
    """Facts that fix the order.

    chunk_lengths:  [K] int64, samples in each chunk, shard after shard.
    seed:           keys every permutation.
    lanes:          L.
    window_samples: samples of a lane that are shuffled among one another.
    """

    chunk_lengths: np.ndarray
    seed: int
    lanes: int
    window_samples: int

    @cached_property
    def samples(self) -> int:
        """N, the samples of one epoch."""
        return int(self.chunk_lengths.sum())


class Place(NamedTuple):
    """Where samples are, [m] int64 each: the epoch, the chunk, and the index within that chunk."""

    epochs: np.ndarray
    chunks: np.ndarray
    indices: np.ndarray


def default_lanes(global_batch: int) -> int:
    """The largest divisor of the global batch that is at most MOST_LANES."""
    return max(lanes for lanes in range(1, MOST_LANES + 1) if global_batch % lanes == 0)


def batch_positions(start: int, global_batch: int, lanes: int, rank: int, world_size: int) -> np.ndarray:
    """Positions of rank's part of the global batch that follows `start` delivered samples: [global_batch // W] int64.

    Raises ValueError unless lanes and world_size divide the global batch and lanes divides start.
    """
    if global_batch < 1 or lanes < 1 or global_batch % lanes:
        raise ValueError(f"lanes ({lanes}) must divide the global batch ({global_batch})")
    if world_size < 1 or global_batch % world_size:
        raise ValueError(f"the world size ({world_size}) must divide the global batch ({global_batch})")
    if start < 0 or start % lanes:
        raise ValueError(f"lanes ({lanes}) must divide the data state ({start}): was the run begun with other lanes?")
    assert 0 <= rank < world_size
    size = global_batch // world_size
    slots = np.arange(rank * size, (rank + 1) * size, dtype=np.int64)
    per_lane = global_batch // lanes
    return (start // lanes + slots % per_lane) * lanes + slots // per_lane


def locate(order: Order, positions: np.ndarray) -> Place:
    """Where the samples at these positions lie. positions: [m] int64, any, in any order."""
    epochs = positions // order.samples
    chunks, indices = np.empty_like(positions), np.empty_like(positions)
    for epoch in np.unique(epochs):  # one, or two where the batch straddles
        here = epochs == epoch
        ranks = _rank_in_epoch(order, int(epoch), positions[here])
        permutation, ends = _chunk_order(order, int(epoch))
        slots = np.searchsorted(ends, ranks, side="right")
        chunks[here] = permutation[slots]
        indices[here] = ranks - (ends[slots] - order.chunk_lengths[permutation[slots]])
    return Place(epochs, chunks, indices)


def _rank_in_epoch(order: Order, epoch: int, positions: np.ndarray) -> np.ndarray:
    """The place of each position among the epoch's samples as the permuted chunks lay them out."""
    lane, offset = positions % order.lanes, positions // order.lanes
    first = _offset_at(order, epoch, lane)
    length = _offset_at(order, epoch + 1, lane) - first  # of the lane's slice
    window = (offset - first) // order.window_samples
    window_start = window * order.window_samples
    window_length = np.minimum(order.window_samples, length - window_start)
    key = hash_key(order.seed, epoch, WINDOW_ORDER, lane, window)
    slice_start = _before_lane(order, epoch + 1, lane) - _before_lane(order, epoch, lane)
    return slice_start + window_start + permute(offset - first - window_start, window_length, key)


def _offset_at(order: Order, epoch: int, lane: np.ndarray) -> np.ndarray:
    """Samples that each lane has delivered when `epoch` begins: the positions below epoch * N that are l modulo L."""
    return (epoch * order.samples - lane + order.lanes - 1) // order.lanes


def _before_lane(order: Order, epoch: int, lane: np.ndarray) -> np.ndarray:
    """Samples that the lanes before this one have delivered together when `epoch` begins."""
    rounds, rest = divmod(epoch * order.samples, order.lanes)
    return rounds * lane + np.minimum(rest, lane)


@lru_cache(maxsize=4)
def _chunk_order(order: Order, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The chunks in the epoch's order [K], and where each ends in the epoch's sequence of samples [K]."""
    count = len(order.chunk_lengths)
    key = hash_key(order.seed, epoch, CHUNK_ORDER)
    permutation = permute(np.arange(count, dtype=np.int64), count, key)
    return permutation, np.cumsum(order.chunk_lengths[permutation])
