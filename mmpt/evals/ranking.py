"""How often something right is among the K best, counting ties fairly."""

from collections.abc import Sequence

import torch
from torch import Tensor


def expected_hits(scores: Tensor, right: Sequence[Sequence[int]], ks: Sequence[int]) -> Tensor:
    """Chance that at least one right column is among the K highest of each row, when ties are broken at random.

    With s the best score of a right column, a the number of wrong columns above s, and m columns equal to s of which p
    are right, the K - a places left are filled from the m by drawing without replacement:

        hit@K = 1 - C(m - p, k) / C(m, k)    with k = clamp(K - a, 0, m)

    So a model that scores everything alike gets exactly chance, and no order of the data changes a result.

    scores [R, C] real; right: for each row its right columns, at least one; ks: each K >= 1. A score that is not a
    number counts against the model. Returns [R, len(ks)] float64.
    """
    mask = _mask(right, scores.shape, scores.device)
    best = scores.masked_fill(~mask, -torch.inf).amax(1, keepdim=True)  # [R, 1]; not a number if a right one is
    above = (~(scores <= best) & ~mask).sum(1, dtype=torch.float64)  # wrong columns above, or not a number
    tied = scores == best
    return _hits(above, tied.sum(1).double(), (tied & mask).sum(1).double(), ks)


def chance_hits(right: Sequence[Sequence[int]], columns: int, ks: Sequence[int]) -> Tensor:
    """`expected_hits` of a model that scores all columns alike: [R, len(ks)] float64."""
    p = torch.tensor([len(set(row)) for row in right], dtype=torch.float64)
    return _hits(torch.zeros_like(p), torch.full_like(p, columns), p, ks)


def _mask(right: Sequence[Sequence[int]], shape: torch.Size, device: torch.device) -> Tensor:
    mask = torch.zeros(shape, dtype=torch.bool)
    for row, columns in enumerate(right):
        mask[row, list(columns)] = True
    return mask.to(device)


def _hits(above: Tensor, m: Tensor, p: Tensor, ks: Sequence[int]) -> Tensor:
    out = []
    for k_wanted in ks:
        k = torch.minimum((k_wanted - above).clamp(min=0), m)
        wrong = m - p
        log_miss = _log_choose(wrong, torch.minimum(k, wrong)) - _log_choose(m, k)
        miss = torch.where(k > wrong, torch.zeros_like(m), log_miss.exp())
        out.append(torch.where(p > 0, 1 - miss, torch.zeros_like(m)))
    return torch.stack(out, 1)


def _log_choose(n: Tensor, k: Tensor) -> Tensor:
    return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
