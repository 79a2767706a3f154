"""Several data sets in one stream, in given proportions; and what each rank gets of a batch of it.

Every sample that is ever delivered has a global position p. With integer weights w_s that sum to P, a pattern of P
places, repeated for ever, tells which source fills each; it is source s's

    own position(p) = (p // P) * w_s + (places of s in the pattern before p mod P)

so each source runs through its own epochs in its own order, and the whole state is still p. Of every prefix of n
samples, source s has n w_s / P within less than one sample (Tijdeman 1980, "The chairman assignment problem").

A global batch is the next B positions. They are laid out source by source and in each lane by lane, and rank r of W
takes the r-th of W equal parts: it reads long runs, and world size, workers and prefetching change nothing.
"""

from dataclasses import dataclass
from functools import cached_property
from math import gcd
from typing import NamedTuple

import numpy as np

from mmpt.data.order import Order, locate

LARGEST_PERIOD = 100_000


@dataclass(frozen=True, eq=False)
class Mixture:
    """orders: of S sources, all with the same number of lanes. weights: one integer for each.

    first_chunks: where the chunks of each source begin among those of all sources.
    """

    orders: tuple[Order, ...]
    weights: tuple[int, ...]
    first_chunks: tuple[int, ...]

    def __post_init__(self):
        assert len(self.orders) == len(self.weights) == len(self.first_chunks)
        assert len({order.lanes for order in self.orders}) == 1

    @cached_property
    def pattern(self) -> np.ndarray:
        """[P] int64, which source fills each place."""
        return spread(self.weights)

    @cached_property
    def earlier(self) -> np.ndarray:
        """[P] int64, places before this one that its source fills."""
        out = np.empty_like(self.pattern)
        for source in range(len(self.weights)):
            out[self.pattern == source] = np.arange((self.pattern == source).sum())
        return out

    def own_positions(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(the source that fills each global position, the position in that source's own stream): [m] int64 each."""
        if len(self.orders) == 1:
            return np.zeros_like(positions), positions
        periods, places = np.divmod(positions, len(self.pattern))
        sources = self.pattern[places]
        return sources, periods * np.array(self.weights)[sources] + self.earlier[places]

    def global_positions(self, source: int, own: np.ndarray) -> np.ndarray:
        """The inverse of `own_positions` for one source: [m] int64 -> [m] int64."""
        if len(self.orders) == 1:
            return own
        periods, nth = np.divmod(own, self.weights[source])
        return periods * len(self.pattern) + np.flatnonzero(self.pattern == source)[nth]

    def epochs(self, position: int) -> tuple[float, ...]:
        """Passes over each source when `position` samples have been delivered."""
        counts = (position // sum(self.weights)) * np.array(self.weights)
        counts += np.bincount(self.pattern[: position % sum(self.weights)], minlength=len(self.weights))
        return tuple(count / order.samples for count, order in zip(counts.tolist(), self.orders, strict=True))


class Place(NamedTuple):
    """Where samples are, [m] int64 each: the epoch of their source, the chunk among all sources' chunks, and the index
    within that chunk."""

    epochs: np.ndarray
    chunks: np.ndarray
    indices: np.ndarray


def smallest_weights(weights: tuple[int, ...]) -> tuple[int, ...]:
    """The same proportions in the smallest integers. ValueError for weights below 1 or a period that is too long."""
    if min(weights) < 1:
        raise ValueError(f"weights must be 1 or more, got {weights}")
    weights = tuple(weight // gcd(*weights) for weight in weights)
    if sum(weights) > LARGEST_PERIOD:
        raise ValueError(f"weights {weights} sum to {sum(weights)}, more than {LARGEST_PERIOD}: give rounder ones")
    return weights


def spread(weights: tuple[int, ...]) -> np.ndarray:
    """[P] int64: each source s in w_s of P = sum(w) places, so evenly that of the first n places it fills n w_s / P
    within less than one.

    Tijdeman's rule: of the sources that would fall behind by more than allowed, the one that must come soonest. Integer
    arithmetic: everything is multiplied by 2 (S - 1) P. Weights must be coprime for the period to be the shortest.
    """
    period, sources = sum(weights), len(weights)
    if sources == 1:
        return np.zeros(period, dtype=np.int64)
    scale = 2 * (sources - 1)
    w, filled = np.array(weights, dtype=np.int64), np.zeros(sources, dtype=np.int64)
    out = np.empty(period, dtype=np.int64)
    for n in range(period):
        due = scale * (w * (n + 1) - filled * period)  # how far behind each would be, times scale * P
        eligible = due >= period
        slack = np.where(eligible, (scale * period - period - due) / w, np.inf)
        out[n] = int(slack.argmin())
        filled[out[n]] += 1
    return out


def batch_positions(mixture: Mixture, start: int, global_batch: int, rank: int, world_size: int) -> np.ndarray:
    """Positions of rank's part of the global batch that follows `start` delivered samples: [global_batch // W] int64.

    Raises ValueError unless world_size divides the global batch.
    """
    if global_batch < 1 or world_size < 1 or global_batch % world_size:
        raise ValueError(f"the world size ({world_size}) must divide the global batch ({global_batch})")
    assert 0 <= rank < world_size and start >= 0
    positions = np.arange(start, start + global_batch, dtype=np.int64)
    sources, own = mixture.own_positions(positions)
    lanes = mixture.orders[0].lanes
    key = sources * lanes + own % lanes
    if len(mixture.orders) * lanes < 1 << 16:
        key = key.astype(np.uint16)  # numpy sorts these in linear time
    laid_out = np.argsort(key, kind="stable")
    size = global_batch // world_size
    return positions[laid_out[rank * size : (rank + 1) * size]]


def place_of(mixture: Mixture, positions: np.ndarray) -> Place:
    """Where the samples at these global positions lie. positions: [m] int64, any, in any order."""
    sources, own = mixture.own_positions(positions)
    out = Place(*(np.empty_like(positions) for _ in Place._fields))
    for source in np.unique(sources):
        here = sources == source
        epochs, chunks, indices = locate(mixture.orders[source], own[here])
        out.epochs[here], out.chunks[here], out.indices[here] = epochs, chunks + mixture.first_chunks[source], indices
    return out
