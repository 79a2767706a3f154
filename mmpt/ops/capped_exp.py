"""exp of a learned log scale with a ceiling that the optimizer can come back from.

CLIP clips its logit scale at 100 after every update. Writing to the parameter does not reach the fp32 master weights of
a sharded engine, so the ceiling is in the forward, and the backward is that of a projected gradient step: nothing is
changed below the ceiling; at or above it, a gradient that would push further up is blocked and one that points back
down passes. (A plain clamp blocks both and freezes the scale for ever; one that passes both lets the parameter drift
away, and coming back takes as long.)
"""

import math
from typing import Any

import torch
from torch import Tensor

from mmpt import dist


class _CappedExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_scale: Tensor, log_cap: float) -> Tensor:
        exact = torch.promote_types(log_scale.dtype, torch.float32)
        value = log_scale.to(exact).clamp(max=log_cap).exp()
        # Not the parameter itself: ZeRO 3 may have taken it apart again by the time of the backward.
        ctx.save_for_backward(value, log_scale >= log_cap)
        ctx.dtype = log_scale.dtype
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        value, capped = ctx.saved_tensors
        # The direction is that of the whole batch: each rank sees only its own share, and shares may disagree.
        gradient = dist.sum_over_ranks(grad * value) / dist.world_size()
        outwards = capped & (gradient < 0)  # descent would raise the scale
        return gradient.masked_fill(outwards, 0.0).to(ctx.dtype), None


def capped_exp(log_scale: Tensor, cap: float) -> Tensor:
    """min(exp(log_scale), cap), [1] -> [1] in at least fp32, with the gradient of a projection onto the ceiling.

    The gradient is averaged over ranks here, so that all of them block or pass it together: what an engine that
    averages gradients would have made of it anyway. A collective runs in the backward; cap = inf is a plain exp.
    """
    return _CappedExp.apply(log_scale, math.log(cap))
