"""A learned number with bounds that the optimizer can come back from.

CLIP clips its logit scale at 100 after every update, ALBEF its temperature to [0.001, 0.5]. Writing to the parameter
does not reach the fp32 master weights of a sharded engine, so the bounds are in the forward, and the backward is that
of a projected gradient step: nothing is changed between the bounds; at or beyond one, a gradient that would push
further out is blocked and one that points back passes. (A plain clamp blocks both and freezes the number for ever; one
that passes both lets the parameter drift away, and coming back takes as long.)
"""

import math
from typing import Any

import torch
from torch import Tensor

from mmpt import dist


class _Bounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        # Not the parameter itself: ZeRO 3 may have taken it apart again by the time of the backward.
        ctx.save_for_backward(x <= low, x >= high)
        ctx.dtype = x.dtype
        return x.to(torch.promote_types(x.dtype, torch.float32)).clamp(low, high)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        lowest, highest = ctx.saved_tensors
        # The direction is that of the whole batch: each rank sees only its own share, and shares may disagree.
        gradient = dist.sum_over_ranks(grad) / dist.world_size()
        outwards = (highest & (gradient < 0)) | (lowest & (gradient > 0))  # descent would go further out
        return gradient.masked_fill(outwards, 0.0).to(ctx.dtype), None, None


def bounded(x: Tensor, low: float, high: float) -> Tensor:
    """min(max(x, low), high), [1] -> [1] in at least fp32, with the gradient of a projection onto the bounds.

    The gradient is averaged over ranks here, so that all of them block or pass it together: what an engine that
    averages gradients would have made of it anyway. A collective runs in the backward.
    """
    return _Bounded.apply(x, low, high)


def capped_exp(log_scale: Tensor, cap: float) -> Tensor:
    """min(exp(log_scale), cap), [1] -> [1] in at least fp32, bounded as above; cap = inf is a plain exp."""
    return bounded(log_scale, -math.inf, math.log(cap)).exp()
