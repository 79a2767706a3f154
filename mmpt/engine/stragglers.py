"""Which rank holds the others up: by what each does itself, not by how long its steps take, which all share.

own = seconds of the steps - seconds of waiting in collectives; of it, data = seconds of waiting for batches.
DeepSpeed's collectives are not told apart: a rank that is slow in the backward alone looks less slow than it is.
"""

import statistics
import time

import torch

from mmpt import dist, waits

NAMED_FACTOR = 1.3
NAMED_SECONDS = 1.0


class Stragglers:
    """Collects steps; `record` compares the ranks and clears. Construction is collective."""

    def __init__(self, device: torch.device):
        self._device, self._nodes = device, dist.gather_objects(dist.node_name())
        self._clear()

    def _clear(self) -> None:
        self._step_seconds, self._data_seconds, self._waits = 0.0, 0.0, list[waits.Wait]()

    def add(self, data_seconds: float, step_seconds: float) -> None:
        """The step that has just ended: its wait for a batch, and its whole duration."""
        self._step_seconds += step_seconds
        self._data_seconds += data_seconds
        self._waits += waits.take(time.perf_counter() - step_seconds)

    def record(self) -> tuple[dict[str, float], str]:
        """(for the metrics, a line if one rank is much slower than the median); the same on all ranks. Collective."""
        waited_seconds = sum(wait.seconds() for wait in self._waits)
        own = [self._step_seconds - waited_seconds, self._data_seconds, waited_seconds]
        all_ranks = dist.gather(torch.tensor([own], device=self._device)).tolist()  # [W, 3]
        self._clear()
        return compare(all_ranks, self._nodes)


def compare(all_ranks: list[list[float]], nodes: list[str]) -> tuple[dict[str, float], str]:
    """From each rank's [own seconds, seconds of them for data, seconds of waiting] and node."""
    owns = [own for own, _, _ in all_ranks]
    slowest, median = owns.index(max(owns)), statistics.median_low(owns)
    factor = max(owns) / median if median > 0 else 1.0
    record = {"straggler_factor": factor, "straggler_rank": float(slowest)}
    if factor < NAMED_FACTOR or max(owns) - median < NAMED_SECONDS:
        return record, ""
    own, data, _ = all_ranks[slowest]
    return record, (
        f"slow: rank {slowest} on {nodes[slowest]} took {own:.1f} s ({data:.1f} s for data) where the median rank took "
        f"{median:.1f} s; the others waited for it"
    )
