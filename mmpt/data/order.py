"""The order of samples as a pure function of (seed, epoch, manifest); the whole state of a loader is one integer.

Every sample of a data set that is ever delivered has a *position* p = 0, 1, 2, ... in an endless stream. Of N samples

    epoch(p) = p // N        lane(p) = p mod L        offset(p) = p // L

so each epoch holds each sample exactly once, nothing is dropped and nothing repeated. Within an epoch:

1. Shards are cut into chunks of consecutive samples; a keyed permutation orders the chunks.
2. Their samples, laid one after another in that order, are cut into L contiguous slices, one per *lane*, so that a lane
   reads few chunks at a time. Lane l's slice is as long as the number of the epoch's positions that are l modulo L.
3. Within a lane's slice, windows of a few chunks' samples are shuffled by a keyed permutation.

No step needs a table of all samples or all chunks: of the chunks' order only every STRIDE-th sum of lengths is held.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from mmpt.data.permutation import hash_key, permute, unpermute

CHUNK_ORDER, WINDOW_ORDER = 1, 2  # what a key is for
STRIDE = 16  # chunks between two sums of lengths that are held: 4 MB for 2 billion samples in chunks of 256
BLOCK = STRIDE << 14  # chunks whose order is computed at a time


@dataclass(frozen=True, eq=False)
class Order:
    """Facts that fix the order.

    chunk_lengths:  [K] integers, samples in each chunk, shard after shard; some may be 0.
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
        return int(self.chunk_lengths.sum(dtype=np.int64))


class Place(NamedTuple):
    """Where samples are, [m] int64 each: the epoch, the chunk, and the index within that chunk."""

    epochs: np.ndarray
    chunks: np.ndarray
    indices: np.ndarray


def locate(order: Order, positions: np.ndarray) -> Place:
    """Where the samples at these positions lie. positions: [m] int64, any, in any order."""
    epochs = positions // order.samples
    chunks, indices = np.empty_like(positions), np.empty_like(positions)
    for epoch in np.unique(epochs):  # one, or two where a batch straddles
        here = epochs == epoch
        chunks[here], indices[here] = _at_rank(order, int(epoch), _rank_in_epoch(order, int(epoch), positions[here]))
    return Place(epochs, chunks, indices)


def positions_of(order: Order, epoch: int, chunks: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """The inverse of `locate` within one epoch: at which position each sample is delivered. All [m] int64."""
    slots = unpermute(chunks, len(order.chunk_lengths), hash_key(order.seed, epoch, CHUNK_ORDER))
    groups, group = np.unique(slots // STRIDE, return_inverse=True)
    _, lengths, ends = _groups(order, epoch, groups)
    ranks = ends[group, slots % STRIDE] - lengths[group, slots % STRIDE] + indices
    lane = _lane_at_rank(order, epoch, ranks)
    window, within = np.divmod(ranks - _slice_start(order, epoch, lane), order.window_samples)
    first, _, window_length, key = _window(order, epoch, lane, window)
    offset = first + window * order.window_samples + unpermute(within, window_length, key)
    return offset * order.lanes + lane


def _at_rank(order: Order, epoch: int, ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(chunk, index within it) of the samples at these places of the epoch's sequence of permuted chunks."""
    groups, group = np.unique(
        np.searchsorted(_group_ends(order, epoch), ranks, side="right"), return_inverse=True
    )  # [g], [m]
    chunks, lengths, ends = _groups(order, epoch, groups)  # [g, STRIDE] each
    slot = (ends[group] <= ranks[:, None]).sum(1)
    return chunks[group, slot], ranks - (ends[group, slot] - lengths[group, slot])


def _groups(order: Order, epoch: int, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of groups of STRIDE chunks that follow one another in the epoch: the chunks, their lengths, and where each ends
    in the epoch's sequence of samples: [g, STRIDE] int64 each. Past the last chunk the length is 0."""
    count = len(order.chunk_lengths)
    slots = groups[:, None] * STRIDE + np.arange(STRIDE)
    real = slots < count
    key = hash_key(order.seed, epoch, CHUNK_ORDER)
    chunks = permute(np.where(real, slots, 0).ravel(), count, key).reshape(slots.shape)
    lengths = np.where(real, order.chunk_lengths[chunks], 0).astype(np.int64)
    before = np.concatenate([[0], _group_ends(order, epoch)])[groups]
    return chunks, lengths, before[:, None] + lengths.cumsum(1)


@lru_cache(maxsize=64)  # of each source two orders, if it has partners, and two epochs
def _group_ends(order: Order, epoch: int) -> np.ndarray:
    """Where each group of STRIDE chunks ends in the epoch's sequence of samples, [ceil(K / STRIDE)] int64."""
    count, key, sums = len(order.chunk_lengths), hash_key(order.seed, epoch, CHUNK_ORDER), []
    for first in range(0, count, BLOCK):
        chunks = permute(np.arange(first, min(first + BLOCK, count)), count, key)
        sums.append(np.add.reduceat(order.chunk_lengths[chunks], np.arange(0, len(chunks), STRIDE), dtype=np.int64))
    return np.cumsum(np.concatenate(sums))


def _rank_in_epoch(order: Order, epoch: int, positions: np.ndarray) -> np.ndarray:
    """The place of each position among the epoch's samples as the permuted chunks lay them out."""
    lane, offset = positions % order.lanes, positions // order.lanes
    window = (offset - _offset_at(order, epoch, lane)) // order.window_samples
    first, window_start, window_length, key = _window(order, epoch, lane, window)
    within = permute(offset - first - window_start, window_length, key)
    return _slice_start(order, epoch, lane) + window_start + within


def _window(
    order: Order, epoch: int, lane: np.ndarray, window: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(offset at which the lane begins the epoch, where the window begins in the lane's slice, its length, its key)"""
    first = _offset_at(order, epoch, lane)
    start = window * order.window_samples
    length = np.minimum(order.window_samples, _offset_at(order, epoch + 1, lane) - first - start)
    return first, start, length, hash_key(order.seed, epoch, WINDOW_ORDER, lane, window)


def _slice_start(order: Order, epoch: int, lane: np.ndarray) -> np.ndarray:
    """Where the lane's slice begins among the epoch's samples."""
    return _before_lane(order, epoch + 1, lane) - _before_lane(order, epoch, lane)


def _lane_at_rank(order: Order, epoch: int, ranks: np.ndarray) -> np.ndarray:
    """The lane in whose slice each place of the epoch's samples lies. Empty slices hold no place."""
    starts = _slice_start(order, epoch, np.arange(order.lanes))
    return np.searchsorted(starts, ranks, side="right") - 1


def _offset_at(order: Order, epoch: int, lane: np.ndarray) -> np.ndarray:
    """Samples that each lane has delivered when `epoch` begins: the positions below epoch * N that are l modulo L."""
    return (epoch * order.samples - lane + order.lanes - 1) // order.lanes


def _before_lane(order: Order, epoch: int, lane: np.ndarray) -> np.ndarray:
    """Samples that the lanes before this one have delivered together when `epoch` begins."""
    rounds, rest = divmod(epoch * order.samples, order.lanes)
    return rounds * lane + np.minimum(rest, lane)
