"""Batch normalisation with the statistics of all ranks, on gloo and NCCL alike (torch's SyncBatchNorm refuses a CPU).

    y = (x - mean) / sqrt(var + eps) * weight + bias

with the mean and the biased variance of each channel over the samples and places of all ranks (Ioffe and Szegedy 2015,
algorithm 1). Ranks may hold different numbers of samples: each sample counts once.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmpt import dist


class BatchNormed(NamedTuple):
    y: Tensor
    """[B, C, ...], in x's type."""
    mean: Tensor
    """[C], in at least fp32, without gradient."""
    variance: Tensor
    """[C], the same, unbiased: what running statistics take in."""


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        count, mean, variance = _statistics(x)
        scale = (variance + eps).rsqrt()  # [C]
        gain = weight * scale
        y = (x * _along(gain, x) + _along(bias - mean * gain, x)).to(x.dtype)
        # Not the weight itself: ZeRO 3 may have taken it apart again by the time of the backward.
        ctx.save_for_backward(x, mean, scale, gain, count)
        ctx.types = weight.dtype, bias.dtype
        unbiased = variance * (count / (count - 1).clamp(min=1)).to(variance.dtype)
        ctx.mark_non_differentiable(mean, unbiased)
        return y, mean, unbiased

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        x, mean, scale, gain, count = ctx.saved_tensors
        over, exact = _all_but_channels(x), mean.dtype
        normed = (x - _along(mean, x)) * _along(scale, x)
        grad = grad.to(exact)
        of_bias, of_weight = grad.sum(over), (grad * normed).sum(over)  # this rank's; the engine adds up over ranks
        of_x = None
        if ctx.needs_input_grad[0]:
            means = (dist.sum_over_ranks(torch.stack([of_bias, of_weight])) / count).to(exact)
            of_x = (grad - _along(means[0], x) - normed * _along(means[1], x)) * _along(gain, x)
            of_x = of_x.to(x.dtype)
        return of_x, of_weight.to(ctx.types[0]), of_bias.to(ctx.types[1]), None


def batch_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> BatchNormed:
    """x [B, C, ...], weight and bias [C]. One collective in the forward, one in the backward: all ranks call it.

    Statistics are taken in at least fp32. The gradients of weight and bias are this rank's share, as of any parameter.
    ValueError where one process holds less than two values per channel, which have no variance.
    """
    if dist.world_size() > 1:
        return BatchNormed(*_BatchNorm.apply(x, weight, bias, eps))
    if x.numel() < 2 * x.shape[1]:
        raise ValueError(f"batch norm in training wants two values per channel or more, got {list(x.shape)}")
    exact = torch.promote_types(x.dtype, torch.float32)
    mean, variance = (torch.zeros(x.shape[1], dtype=exact, device=x.device) for _ in range(2))
    # torch's kernel, several times as fast on a CPU; with this momentum it overwrites what it calls running statistics.
    y = torch.nn.functional.batch_norm(x, mean, variance, weight.to(exact), bias.to(exact), True, 1.0, eps)
    return BatchNormed(y, mean, variance)


def _statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Samples times places of all ranks (a scalar in fp64), mean [C] and biased variance [C]."""
    exact = torch.promote_types(x.dtype, torch.float32)
    local = x.numel() // x.shape[1]
    if local:
        variance, mean = torch.var_mean(x.to(exact), _all_but_channels(x), correction=0)
    else:
        variance = mean = x.new_zeros(x.shape[1], dtype=exact)
    # Sums of squares add up over ranks in fp64, where taking the mean's square off again costs nothing.
    mean, variance = mean.double(), variance.double()
    sums = torch.cat([local * mean, local * (variance + mean.square()), mean.new_full((1,), local)])
    first, second, count = dist.sum_over_ranks(sums).split([len(mean), len(mean), 1])
    mean = first / count
    return count[0], mean.to(exact), (second / count - mean.square()).clamp(min=0).to(exact)


def _all_but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.ndim)]


def _along(channels: Tensor, x: Tensor) -> Tensor:
    """[C] as [C, 1, ...], to meet x."""
    return channels.view(-1, *(1,) * (x.ndim - 2))
