"""What a run has seen, computed from its integer: the keys at any range of positions, the exposure of given keys."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmpt.data import storage
from mmpt.data.mixture import Mixture, place_of
from mmpt.data.order import positions_of
from mmpt.data.partners import keep_own
from mmpt.data.quarantine import rows_of
from mmpt.data.remote.cache import CacheConfig
from mmpt.data.sources import SourceReader, Sources
from mmpt.data.tasks import inputs_for, task_of
from mmpt.data.work import Plan

BLOCK = 1 << 16  # positions located at a time


class Seen(NamedTuple):
    """One delivered sample: its global position, the epoch of its source, its shard and its key."""

    position: int
    epoch: int
    shard: str
    key: str


class Exposure(NamedTuple):
    """A sample that was asked for, and the positions, ascending, at which the run has seen it; and those of other
    samples whose texts its picture was shown with, for methods that match them."""

    shard: str
    key: str
    positions: list[int]
    as_partner: list[int]


def stand_ins_of(run_dir: Path) -> dict[int, str]:
    """The key that stood in at each position whose sample could not be used, from the run's ledgers."""
    return {row["position"]: row["stand_in"] for row in rows_of(run_dir)}


def seen(
    sources: Sources, mixture: Mixture, start: int, stop: int, stood_in: dict[int, str] | None = None
) -> Iterator[Seen]:
    """What was delivered at positions start, start + 1, ..., stop - 1. Reads the headers of the chunks concerned.

    stood_in: see `stand_ins_of`. Raises ShardError for a shard that is not what its manifest says.
    """
    reader, replaced = SourceReader(sources, CacheConfig(), storage.DEFAULTS), stood_in or {}
    for first in range(start, stop, BLOCK):
        positions = np.arange(first, min(first + BLOCK, stop), dtype=np.int64)
        place = place_of(mixture, positions)
        keys: dict[int, tuple[str, list[str]]] = {}
        for chunk in np.unique(place.chunks).tolist():
            shard, extents = reader.extents(chunk)
            keys[chunk] = shard, [extent.key for extent in extents]
        for position, epoch, chunk, index in zip(positions.tolist(), *(part.tolist() for part in place), strict=True):
            shard, names = keys[chunk]
            yield Seen(position, epoch, shard, replaced[position] if position in replaced else names[index])


def exposures(
    sources: Sources, plan: Plan, wanted: frozenset[str], stop: int, global_batch: int,
    stood_in: dict[int, str] | None = None,
) -> Iterator[Exposure]:  # fmt: skip
    """Each sample whose key is wanted, with the positions below `stop` at which the run has seen it.

    Reads the headers of every shard once, then inverts the orders: no epoch is walked through. A partner that could not
    be used counts as shown, and what stood in for it does not: no ledger has it.
    """
    mixture = plan.mixture
    reader, replaced = SourceReader(sources, CacheConfig(), storage.DEFAULTS), stood_in or {}
    standing_in: dict[tuple[int, str], list[int]] = {}
    if replaced:
        at = np.array(sorted(position for position in replaced if position < stop), dtype=np.int64)
        for position, chunk in zip(at.tolist(), place_of(mixture, at).chunks.tolist(), strict=True):
            standing_in.setdefault((chunk, replaced[position]), []).append(position)
    for chunk in range(int(sources.first_chunks[-1])):
        shard, extents = reader.extents(chunk)
        for index, extent in enumerate(extents):
            if extent.key in wanted:
                own = [p for p in _positions(sources, mixture, chunk, index, stop) if p not in replaced]
                shown = _positions(sources, plan.second, chunk, index, stop) if plan.second else []
                partner = [position for position in shown if _is_shown(plan, position, global_batch)]
                yield Exposure(shard, extent.key, sorted(own + standing_in.get((chunk, extent.key), [])), partner)


def _is_shown(plan: Plan, position: int, global_batch: int) -> bool:
    """Whether the text at this position was shown its partner's picture."""
    task = task_of(plan.inputs.tasks, plan.seed, position // global_batch * global_batch, global_batch)
    return inputs_for(plan.inputs, task).partners and not keep_own(plan.seed, np.array([position]))[0]


def _positions(sources: Sources, mixture: Mixture, chunk: int, index: int, stop: int) -> list[int]:
    """Global positions below `stop` at which the order delivers one sample: one in each epoch."""
    source = 0 if len(mixture.orders) == 1 else int(sources.source_of(np.array([chunk]))[0])
    order, own_chunk = mixture.orders[source], np.array([chunk - mixture.first_chunks[source]])
    found = []
    for epoch in range(int(np.ceil(mixture.epochs(stop)[source]))):
        own = positions_of(order, epoch, own_chunk, np.array([index]))
        found.append(int(mixture.global_positions(source, own)[0]))
    return sorted(position for position in found if position < stop)
