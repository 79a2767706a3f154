"""How long the host stands still in ZeRO's collectives; those of our own are timed in dist.py.

On a CPU alone, where a collective blocks whoever calls it or, if it was started early, whoever waits for it. On CUDA
ZeRO's run on streams beside the computing: how much of them is hidden, only a profile tells (engine/profile.py).
DeepSpeed's own log of collectives synchronises with the device at each, and stops the clock of those that were started
early before they are done.
"""

from collections.abc import Callable
from typing import Any

import deepspeed
import torch

from mmpt.waits import waiting

COLLECTIVES = (
    "all_reduce", "reduce", "broadcast", "all_gather", "all_gather_into_tensor", "all_gather_coalesced",
    "reduce_scatter", "reduce_scatter_tensor", "all_to_all_single", "barrier",
)  # fmt: skip


def time_zero(device: torch.device) -> None:
    """From now on DeepSpeed's collectives in this process are timed, if the device is a CPU."""
    backend = deepspeed.comm.comm.cdb
    assert backend is not None, "DeepSpeed is told of the process group first"
    if device.type == "cpu" and not isinstance(backend.all_reduce, Timed):
        for name in COLLECTIVES:
            setattr(backend, name, Timed(getattr(backend, name)))


class Timed:
    """A collective; and what it returns, where it was started early."""

    def __init__(self, collective: Callable[..., Any]):
        self._collective = collective

    def __call__(self, *args: Any, **options: Any) -> Any:
        with waiting(torch.device("cpu"), zero=True):
            work = self._collective(*args, **options)
        return TimedWork(work) if hasattr(work, "wait") else work


class TimedWork:
    def __init__(self, work: Any):
        self._work = work

    def wait(self, *args: Any) -> Any:
        with waiting(torch.device("cpu"), zero=True):
            return self._work.wait(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)
