"""The learned temperature and bias of a contrastive loss, as the field keeps them.

Each is a module of its own with a parameter of shape [1]: ZeRO 3 gathers a parameter only around the forward of the
module that owns it, and DeepSpeed cannot shard a parameter without a dimension.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


class LogitScale(nn.Module):
    """exp(log_scale), at most `cap`: [1], in at least fp32.

    Radford et al. 2021, section 2.5: starts at 1/0.07, clipped at 100.
    capped_exp is given by the method, because its backward averages over ranks and models hold no collectives.
    It starts at 1 / initial_temperature; ValueError unless that is above 0 and at most the cap.
    """

    def __init__(self, initial_temperature: float, cap: float, capped_exp: Callable[[Tensor, float], Tensor]):
        super().__init__()
        if initial_temperature <= 0 or 1 / initial_temperature > cap:
            raise ValueError(
                f"a logit scale starts above 0 and at most at its cap: initial_temperature {initial_temperature}, "
                f"cap {cap}"
            )
        self.cap, self.capped_exp = cap, capped_exp
        self.log_scale = nn.Parameter(torch.empty(1))
        nn.init.constant_(self.log_scale, -math.log(initial_temperature))

    def forward(self) -> Tensor:
        return self.capped_exp(self.log_scale, self.cap)


class Temperature(nn.Module):
    """1 / t, [1], in at least fp32, for a learned t between `low` and `high`: the temperature itself and not its log.

    ALIGN (Jia et al. 2021, section 4.2) starts t at 1; ALBEF (Li et al. 2021) at 0.07, within [0.001, 0.5]. `bounded`
    is given by the method, as above. Raises ValueError unless 0 < low <= initial <= high.
    """

    def __init__(self, initial: float, low: float, high: float, bounded: Callable[[Tensor, float, float], Tensor]):
        super().__init__()
        if not 0 < low <= initial <= high:
            raise ValueError(f"a temperature lies above 0 and within its bounds: starts at {initial}, [{low}, {high}]")
        self.low, self.high, self.bounded = low, high, bounded
        self.temperature = nn.Parameter(torch.empty(1))
        nn.init.constant_(self.temperature, initial)

    def forward(self) -> Tensor:
        return 1 / self.bounded(self.temperature, self.low, self.high)


class LogitBias(nn.Module):
    """A learned number, [1], in at least fp32. SigLIP (Zhai et al. 2023, section 3.2) starts it at -10."""

    def __init__(self, initial: float):
        super().__init__()
        self.bias = nn.Parameter(torch.empty(1))
        nn.init.constant_(self.bias, initial)

    def forward(self) -> Tensor:
        return self.bias.to(torch.promote_types(self.bias.dtype, torch.float32), copy=True)
