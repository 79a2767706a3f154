"""Batch normalisation whose running statistics follow optimizer steps, not forwards (Ioffe and Szegedy 2015).

Each micro-batch is normalised by its own statistics, over all ranks. What they were is kept aside by the forwards that
gradients will flow through, and the method, told that the step was applied, settles their mean into the running
statistics once. So neither the first pass of cached accumulation nor a recomputed activation counts twice, and a
skipped step leaves no trace.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Normalise = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor]]
"""(x, weight, bias, eps) -> (y, mean, unbiased variance): ops/batch_norm.py's, whose statistics are of all ranks."""


class BatchNorm(nn.Module):
    """[B, C, ...] -> the same, normalised per channel; by the running statistics in evaluation, and in a tower that is
    locked, which is not to move.

    momentum: the share of a step's statistics in the running ones, 1 - the momentum of TensorFlow.
    """

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.normalise: Normalise | None = None
        self.locked = False
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_variance", torch.ones(channels))
        self.running_mean: Tensor
        self.running_variance: Tensor
        self._sum: Tensor | None = None  # [2, C], of the means and variances since the last step
        self._forwards = 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.locked:
            return self._by_running_statistics(x)
        if self.normalise is None:
            raise ValueError("batch norm trains inside a method that calls use_batch_norm(self, batch_norm)")
        y, mean, variance = self.normalise(x, self.weight, self.bias, self.eps)
        if torch.is_grad_enabled() and not _recomputing():
            found = torch.stack([mean, variance])
            self._sum = found if self._sum is None else self._sum + found
            self._forwards += 1
        return y

    def _by_running_statistics(self, x: Tensor) -> Tensor:
        gain = self.weight * (self.running_variance + self.eps).rsqrt()  # [C]
        shape = (-1, *(1,) * (x.ndim - 2))
        return (x * gain.view(shape) + (self.bias - self.running_mean * gain).view(shape)).to(x.dtype)

    @torch.no_grad()
    def settle(self) -> None:
        """After an applied step."""
        if self._sum is not None:
            mean, variance = self._sum / self._forwards
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_variance.lerp_(variance.to(self.running_variance.dtype), self.momentum)
        self.discard()

    def discard(self) -> None:
        """After a skipped step."""
        self._sum, self._forwards = None, 0

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """A module in half precision keeps its running statistics in fp32: a tenth of a small difference is rounded
        away in bf16."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            exact = before[name]
            if buffer is not None and exact is not None and torch.finfo(buffer.dtype).bits < 32:
                self._buffers[name] = exact.to(buffer.device)
        return self


def _recomputing() -> bool:
    """Whether a backward is running: a forward inside it is activation checkpointing's second."""
    return torch._C._current_graph_task_id() != -1


def batch_norms(module: nn.Module) -> list[BatchNorm]:
    return [found for found in module.modules() if isinstance(found, BatchNorm)]


def use_batch_norm(module: nn.Module, normalise: Normalise) -> None:
    """Give the function to every batch norm of a method, whose constructor calls this: it needs all ranks, and models
    hold no collectives."""
    for found in batch_norms(module):
        found.normalise = normalise


def settle(module: nn.Module) -> None:
    """Every batch norm's running statistics take in the step that was applied."""
    for found in batch_norms(module):
        found.settle()


def discard(module: nn.Module) -> None:
    """Every batch norm forgets the step that was skipped."""
    for found in batch_norms(module):
        found.discard()
