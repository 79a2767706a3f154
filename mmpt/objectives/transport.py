"""The distance between two sets of vectors as optimal transport, by the inexact proximal point method.

    min over T >= 0 of <T, C>,   T 1 = 1/n,  T^T 1 = 1/m,      C_ij = 1 - cos(x_i, y_j)

Xie et al. 2018, "A Fast Proximal Point Method for Computing Exact Wasserstein Distance", algorithm 1 with one inner
step; used for word-region alignment by UNITER (Chen et al. 2020, eq. 6) and word-patch alignment by ViLT (Kim et al.
2021, section 3.2).
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

BETA, ITERATIONS = 0.5, 50
"""As in both papers' code; 50 iterations are within 1e-3 of the optimum."""


def transport_distance(
    x: Tensor, y: Tensor, x_real: Tensor, y_real: Tensor, beta: float = BETA, iterations: int = ITERATIONS
) -> Tensor:
    """[B], <T, C> of each pair of sets; the plan T has no gradient, the costs do.

    x: [B, n, D], y: [B, m, D]; x_real: [B, n] and y_real: [B, m] bool, which rows are vectors of the set. In fp32.
    """
    with torch.autocast(x.device.type, enabled=False):
        cost = costs(x, y)
        plan = transport_plan(cost.detach(), x_real, y_real, beta, iterations)
        return (plan * cost).sum((1, 2))


def costs(x: Tensor, y: Tensor) -> Tensor:
    """1 - cos of every x with every y: [B, n, D], [B, m, D] -> [B, n, m] in at least fp32."""
    exact = torch.promote_types(x.dtype, torch.float32)
    return 1 - normalize(x.to(exact), dim=-1) @ normalize(y.to(exact), dim=-1).transpose(1, 2)


@torch.no_grad()
def transport_plan(
    cost: Tensor, x_real: Tensor, y_real: Tensor, beta: float = BETA, iterations: int = ITERATIONS
) -> Tensor:
    """T, [B, n, m]; 0 where either side is not real. A set without vectors has a plan of zeros."""
    both = x_real[:, :, None] & y_real[:, None, :]
    kernel = torch.exp(-cost / beta) * both  # proximal to the last plan, not to uniform: no bias by beta
    plan = both.to(cost.dtype)
    rows, columns = x_real.sum(1)[:, None].to(cost.dtype), y_real.sum(1)[:, None].to(cost.dtype)  # n and m, [B, 1]
    left = x_real / rows.clamp(min=1)  # [B, n]
    for _ in range(iterations):
        scaled = kernel * plan
        right = _inverse(columns * torch.einsum("bnm,bn->bm", scaled, left), y_real)
        left = _inverse(rows * torch.einsum("bnm,bm->bn", scaled, right), x_real)
        plan = left[:, :, None] * scaled * right[:, None, :]
    return plan


def _inverse(sums: Tensor, real: Tensor) -> Tensor:
    """1 / sums where there is a vector, 0 elsewhere."""
    usable = real & (sums > 0)
    return torch.where(usable, 1 / torch.where(usable, sums, 1), 0)
