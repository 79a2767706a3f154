"""The learned temperature of a contrastive loss, as the field keeps it: log of its inverse."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


class LogitScale(nn.Module):
    """exp(log_scale), at most `cap`: [1]. Radford et al. 2021, section 2.5: starts at 1/0.07, clipped at 100.

    capped_exp is given by the method, because its backward averages over ranks and models hold no collectives. A module
    of its own with shape [1]: ZeRO 3 gathers a parameter only around the forward of the module that owns it, and
    DeepSpeed cannot shard a parameter without a dimension.
    """

    def __init__(self, initial: float, cap: float, capped_exp: Callable[[Tensor, float], Tensor]):
        super().__init__()
        self.initial, self.cap, self.capped_exp = initial, cap, capped_exp
        self.log_scale = nn.Parameter(torch.empty(1))
        nn.init.constant_(self.log_scale, math.log(initial))

    def forward(self) -> Tensor:
        return self.capped_exp(self.log_scale, self.cap)
