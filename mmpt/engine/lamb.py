"""LAMB whose trust ratio is per named parameter at every ZeRO stage.

You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes" (ICLR 2020), algorithm 2:

    m = b1 m + (1 - b1) g          v = b2 v + (1 - b2) g^2
    u = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) + wd * x
    x = x - lr * (|x| / |u|) * u

The norms run over one parameter ("layer"). ZeRO hands an optimizer one flat partition per group, where a stock LAMB
would take one ratio for all layers. Here the squared norms of every segment of the partition go into a vector with an
entry per parameter, which is summed over ranks: one small all-reduce per group.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmpt.engine.partition import Segment


class Lamb(torch.optim.Optimizer):
    """Call `attach` once the engine has laid out its partitions and before the first step.

    Groups without weight decay (biases, norm gains, temperatures) take the plain Adam direction with ratio 1, as is
    customary since the authors' own code.
    """

    def __init__(self, groups: list[dict], lr: float, betas: tuple[float, float], eps: float):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._segments: dict[int, list[tuple[int, Segment]]] = {}
        self._parameters = 0

    def attach(self, segments: list[Segment], names: list[str], over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Tell which run of which parameter lies where in this rank's partition.

        names: all trainable parameters, in an order that every rank shares; a parameter's place is its entry in the
        vector of norms. over_ranks: sums a vector over the ranks that hold pieces of the same parameters.
        """
        index = {name: i for i, name in enumerate(names)}
        self._segments, self._over_ranks, self._parameters = {}, over_ranks, len(names)
        for segment in segments:
            self._segments.setdefault(id(segment.flat), []).append((index[segment.name], segment))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every group that `param_groups` holds at the moment (ZeRO steps them one by one)."""
        assert self._parameters, "Lamb.attach was not called"
        for group in self.param_groups:
            updates = {p: self._direction(p, group) for p in group["params"] if p.grad is not None}
            # ZeRO 3 empties the groups that it is not stepping, on all ranks alike.
            ratios = self._trust_ratios(updates) if updates and group["weight_decay"] else None
            for parameter, update in updates.items():
                if ratios is not None:
                    for i, segment in self._segments.get(id(parameter), []):
                        segment.of(update).mul_(ratios[i])
                parameter.sub_(update, alpha=group["lr"])

    def _direction(self, parameter: Tensor, group: dict) -> Tensor:
        """u of the module docstring, in the parameter's layout."""
        state, gradient, (beta1, beta2) = self.state[parameter], parameter.grad, group["betas"]
        assert gradient is not None
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        step = state["step"].item()
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        scale = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
        update = (state["exp_avg"] / (1 - beta1**step)).div_(scale)
        return update.add_(parameter, alpha=group["weight_decay"])

    def _trust_ratios(self, updates: dict[Tensor, Tensor]) -> Tensor:
        """[parameters] |x| / |u|, and 1 where either norm is 0 or the parameter is not among these."""
        device = next(iter(updates)).device
        squares = torch.zeros(2, self._parameters, device=device)
        for parameter, update in updates.items():
            for i, segment in self._segments.get(id(parameter), []):
                squares[0, i] += segment.of(parameter).float().square().sum()
                squares[1, i] += segment.of(update).float().square().sum()
        weight, step = self._over_ranks(squares).sqrt()
        return torch.where((weight > 0) & (step > 0), weight / step, torch.ones_like(weight))
