"""Which samples make up which batch: pure functions of how many samples were delivered before it."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from mmpt.data.left_out import Stretches, go_on
from mmpt.data.manifest import Manifest
from mmpt.data.mixture import Mixture, batch_positions, place_of
from mmpt.data.partners import PartnerPlaces, partner_places
from mmpt.data.tasks import inputs_for, task_of
from mmpt.inputs import InputSpec


class Work(NamedTuple):
    """The samples of one batch, [B] int64 each: their positions and epochs, and where they lie.

    task: which of the method's tasks the batch is for. partners: whose pictures its texts are shown, if it is for that.
    """

    positions: np.ndarray
    epochs: np.ndarray
    chunks: np.ndarray
    indices: np.ndarray
    task: str = ""
    partners: PartnerPlaces | None = None

    def all_chunks(self) -> np.ndarray:
        """The chunks that are read for it, some of them twice."""
        if self.partners is None:
            return self.chunks
        return np.concatenate([self.chunks, self.partners.chunks[~self.partners.own]])


class Plan(NamedTuple):
    """What the training batches of a run follow from. second: the order under `partner_seed`, where one is needed.
    left_out: stretches that are not delivered."""

    inputs: InputSpec
    mixture: Mixture
    second: Mixture | None
    seed: int
    left_out: Stretches = ()


def training_work(plan: Plan, start: int, global_batch: int, rank: int, world_size: int) -> Iterator[Work]:
    """The parts of one rank of the global batches that follow position `start`, without end."""
    while True:
        start = go_on(start, plan.left_out)
        positions = batch_positions(plan.mixture, start, global_batch, rank, world_size)
        task, partners = task_of(plan.inputs.tasks, plan.seed, start, global_batch), None
        if plan.second is not None and inputs_for(plan.inputs, task).partners:
            partners = partner_places(plan.second, plan.seed, positions)
        yield Work(positions, *place_of(plan.mixture, positions), task, partners)
        start += global_batch


def evaluation_work(manifest: Manifest, rank: int, world_size: int, batch: int) -> list[Work]:
    """Each sample once, in stored order; see `eval_batches`. Raises ValueError for more ranks than samples."""
    if world_size > manifest.samples or batch < 1:
        raise ValueError(f"cannot split {manifest.samples} samples over {world_size} ranks in batches of {batch}")
    first, last = (r * manifest.samples // world_size for r in (rank, rank + 1))
    steps = math.ceil(math.ceil(manifest.samples / world_size) / batch)
    ends = np.cumsum(manifest.chunk_lengths)
    work = []
    for positions in np.array_split(np.arange(first, last, dtype=np.int64), steps):
        chunks = np.searchsorted(ends, positions, side="right")
        indices = positions - (ends[chunks] - manifest.chunk_lengths[chunks])
        work.append(Work(positions, np.zeros_like(positions), chunks, indices))
    return work
