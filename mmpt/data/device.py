"""Batches on the device: while a step runs, the next one is already being copied.

Workers hand batches over in pinned memory (torch's allocator reuses the same few buffers); a thread cuts them into
micro-batches and starts their copies on a stream of its own; the step waits for an event, not for the host.

With a token budget all ranks must cut alike often: every forward pass may hold collectives. How often is not known to a
rank by itself, for it follows from the captions and pictures that the others have read. The ranks agree on it in the
training thread: there all of them ask for the same delivery in the same order, while a collective of the copying
thread could meet the step's own (NCCL runs what it is given in order), or be waited for by a rank whose run is over.
They agree over gloo, so that no host waits for its device; and the copies are then started, still on their own stream.
"""

import queue
import threading
from typing import NamedTuple, Self

import torch
from torch.profiler import record_function

from mmpt import dist
from mmpt.batch import Batch
from mmpt.data.loader import Loader
from mmpt.data.micro_batches import TokenBudget, micro_batches_for, split_by_tokens
from mmpt.data.quarantine import BadSample

BATCHES_ON_THE_WAY = 1


class Delivery(NamedTuple):
    """A batch as micro-batches on the device, and the loader's facts at the moment of its delivery.

    state, epochs: see `Loader`. quarantined: samples of this batch that could not be used.
    """

    micro_batches: list[Batch]
    state: int
    epochs: tuple[float, ...]
    quarantined: list[BadSample]


class DeviceLoader:
    """An endless iterator over deliveries; see `Loader` for their order.

    parts: into how many equal micro-batches each batch is cut; or the tokens that one may have, and then all ranks make
    and use their loaders together. overlap: read, and copy where that can be, in a thread, one batch ahead.
    """

    def __init__(self, loader: Loader, device: torch.device, parts: int | TokenBudget, overlap: bool):
        self._loader, self._device, self._parts = loader, device, parts
        self._group = dist.host_group() if isinstance(parts, TokenBudget) else None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ready = queue.Queue[tuple[Delivery, torch.Event | torch.cuda.Event | None] | Exception](
            BATCHES_ON_THE_WAY
        )
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._copy_ahead, daemon=True) if overlap else None
        if self._thread:
            self._thread.start()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Delivery:
        """Raises what the loader raises."""
        with record_function("mmpt: data"):
            return self._next()

    def _next(self) -> Delivery:
        if not self._thread:
            return self._cut(self._deliver())
        made = self._ready.get()
        if isinstance(made, Exception):
            self._ready.put(made)  # whoever asks again is told again
            raise made
        delivery, copied = made
        if isinstance(self._parts, TokenBudget):
            with torch.cuda.stream(self._stream):
                delivery = self._cut(delivery)
                copied = self._stream.record_event() if self._stream else None
        if copied is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(copied)
            for batch in delivery.micro_batches:
                for tensor in batch.moving():
                    tensor.record_stream(current)  # or its memory would be reused while the step still reads it
        return delivery

    def close(self) -> None:
        """End the thread and the loader. Safe to call twice."""
        self._closing.set()
        while self._thread and self._thread.is_alive():
            try:
                self._ready.get(timeout=0.05)  # the thread may be waiting to hand over
            except queue.Empty:
                continue
        self._loader.close()

    def _deliver(self) -> Delivery:
        """The next batch: cut and on its way where all ranks know how to cut it, else whole and on the host."""
        batch = next(self._loader)
        parts = [batch] if isinstance(self._parts, TokenBudget) else self._moved(batch.split(self._parts))
        return Delivery(parts, self._loader.state, self._loader.epochs, self._loader.take_quarantined())

    def _cut(self, delivery: Delivery) -> Delivery:
        """Cut by the budget, as often as the rank with the most tokens has to. Collective."""
        if not isinstance(self._parts, TokenBudget):
            return delivery
        (batch,) = delivery.micro_batches
        parts = dist.largest_over_ranks(micro_batches_for(batch, self._parts), self._group)
        return delivery._replace(micro_batches=self._moved(split_by_tokens(batch, parts, self._parts.square_tokens)))

    def _moved(self, parts: list[Batch]) -> list[Batch]:
        return [part.to(self._device) for part in parts]

    def _copy_ahead(self) -> None:
        while not self._closing.is_set():
            try:
                with torch.cuda.stream(self._stream):  # does nothing where there is none
                    delivery = self._deliver()
                    copied = self._stream.record_event() if self._stream else None
                self._ready.put((delivery, copied))
            except Exception as error:  # it is raised where the batch is asked for
                self._ready.put(error)
                return
