"""SimCLR's loss: of all other views in the batch, which is of the same image? (Chen et al. 2020)"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mmpt.ops.similarity import similarity


class TwoViews(NamedTuple):
    loss: Tensor
    """Scalar, the local sum over pairs of views."""
    correct: Tensor
    """Scalar without gradient, how many first views are closest to their second."""


def two_views(a: Tensor, b: Tensor, every_a: Tensor, every_b: Tensor, first: int, temperature: float = 0.1) -> TwoViews:
    """The local sum over images i of  (l(a_i, b_i) + l(b_i, a_i)) / 2  with

        l(u, v) = -log( exp(u.v / temperature) / sum_w exp(u.w / temperature) ),

    w over all 2 N views of the global batch but u itself. Divided by the number of images it is NT-Xent (Chen et al.
    2020, eq. 1 and algorithm 1; temperature 0.1 as in SLIP, Mu et al. 2022).

    a, b: [B, D], this rank's first and second views, each row of length 1. every_a, every_b: [N, D], those of all ranks
    gathered with gradient. first: the row of our first image in them.
    """
    own = first + torch.arange(len(a), device=a.device)
    logits_a = _logits(a, every_b, every_a, own, temperature)
    logits_b = _logits(b, every_a, every_b, own, temperature)
    loss = (cross_entropy(logits_a, own, reduction="sum") + cross_entropy(logits_b, own, reduction="sum")) / 2
    return TwoViews(loss, (logits_a.argmax(1) == own).sum().to(loss.dtype))


def _logits(views: Tensor, others: Tensor, same: Tensor, own: Tensor, temperature: float) -> Tensor:
    """[B, 2 N]: with the other views of all images, then with the same views, where a view does not meet itself."""
    logits = similarity(views, torch.cat([others, same])) / temperature
    itself = torch.zeros_like(logits, dtype=torch.bool).scatter(1, (len(others) + own)[:, None], True)
    return logits.masked_fill(itself, -torch.inf)
