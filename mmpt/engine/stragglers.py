"""Which rank holds the others up: by what each does itself, not by how long its steps take, which all share.

own = seconds of the steps - seconds of waiting in collectives; of it, data = seconds of waiting for batches.
On CUDA ZeRO's collectives are not told apart (zero_waits.py): a rank that is slow in the backward alone looks less slow
there than it is.
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
        zero_seconds = sum(wait.seconds() for wait in self._waits if wait.zero)
        our_seconds = sum(wait.seconds() for wait in self._waits if not wait.zero)
        own = [self._step_seconds - zero_seconds - our_seconds, self._data_seconds, our_seconds, zero_seconds]
        all_ranks = dist.gather(torch.tensor([own], device=self._device)).tolist()  # [W, 4]
        self._clear()
        record, line = compare(all_ranks, self._nodes)
        return record | communication(all_ranks, zero_known=self._device.type == "cpu"), line


def communication(all_ranks: list[list[float]], zero_known: bool) -> dict[str, float]:
    """Shares of the ranks' time in collectives, the wait for slower ranks included; nothing where there is one rank."""
    if len(all_ranks) == 1:
        return {}
    own, _, ours, zero = (sum(column) for column in zip(*all_ranks, strict=True))
    whole = own + ours + zero
    record = {"communication_share/method": ours / whole}
    return record | ({"communication_share/zero": zero / whole} if zero_known else {})


def compare(all_ranks: list[list[float]], nodes: list[str]) -> tuple[dict[str, float], str]:
    """From each rank's [own seconds, seconds of them for data, ...] and node."""
    owns = [row[0] for row in all_ranks]
    slowest, median = owns.index(max(owns)), statistics.median_low(owns)
    factor = max(owns) / median if median > 0 else 1.0
    record = {"straggler_factor": factor, "straggler_rank": float(slowest)}
    if factor < NAMED_FACTOR or max(owns) - median < NAMED_SECONDS:
        return record, ""
    own, data = all_ranks[slowest][:2]
    return record, (
        f"slow: rank {slowest} on {nodes[slowest]} took {own:.1f} s ({data:.1f} s for data) where the median rank took "
        f"{median:.1f} s; the others waited for it"
    )
