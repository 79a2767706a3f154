"""How long this rank has waited in collectives: for the slower ranks, and for the network.

On a CPU a collective blocks, and the host's clock tells. On CUDA it is enqueued: two events around it tell, once the
device has passed them; nothing waits for that but whoever asks for `seconds`.
"""

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch

_passed = deque["Wait"](maxlen=100_000)


@dataclass
class Wait:
    """One collective. began: `time.perf_counter()` of the host. zero: whether it is one of ZeRO's."""

    began: float
    zero: bool = False
    ended: float = 0.0
    events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None

    def seconds(self) -> float:
        """Synchronises with the device, if it was there."""
        if self.events is None:
            return self.ended - self.began
        self.events[1].synchronize()
        return self.events[0].elapsed_time(self.events[1]) / 1000


@contextlib.contextmanager
def waiting(device: torch.device, zero: bool = False) -> Iterator[None]:
    """Around a collective on tensors of this device."""
    wait = Wait(time.perf_counter(), zero)
    if device.type == "cuda":
        wait.events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        wait.events[0].record()
    try:
        yield
    finally:
        if wait.events is not None:
            wait.events[1].record()
        wait.ended = time.perf_counter()
        _passed.append(wait)


def take(since: float) -> list[Wait]:
    """The collectives that began since then; older ones are forgotten."""
    taken = []
    while _passed:
        wait = _passed.popleft()
        if wait.began >= since:
            taken.append(wait)
    return taken
