"""InfoNCE over a global batch of which each rank scores its own images against all texts."""

from collections.abc import Callable

import torch
from torch import Tensor


def one_sided_info_nce(
    logits_i2t: Tensor, logits_t2i: Tensor, first: int, logsumexp_over_ranks: Callable[[Tensor], Tensor]
) -> Tensor:
    """The local sum of the symmetric contrastive loss, a scalar; over all ranks it adds up to

        1/2 sum_i [ log sum_j exp(a_ij) - a_ii ]  +  1/2 sum_j [ log sum_i exp(b_ij) - b_jj ]

    logits_i2t, logits_t2i: a and b, [B, N], scores of this rank's B images with the texts of all ranks, times the scale.
    For CLIP they are one tensor; FILIP's two directions differ. first: the column of our first image's own text.
    logsumexp_over_ranks: puts together [N] column sums from the ranks' pieces; only that vector ever travels.
    Source: van den Oord et al. 2018, eq. 4, in both directions as in CLIP (Radford et al. 2021, figure 3).
    """
    rows = torch.arange(len(logits_i2t), device=logits_i2t.device)
    own = first + rows
    row_sums = logits_i2t.logsumexp(dim=1)  # [B]
    column_sums = logsumexp_over_ranks(logits_t2i.logsumexp(dim=0))[own]  # [N] -> [B]
    return (row_sums - logits_i2t[rows, own] + column_sums - logits_t2i[rows, own]).sum() / 2


def correct_matches(
    logits_i2t: Tensor, logits_t2i: Tensor, first: int, max_over_ranks: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """How many of this rank's pairs score highest among all, image to text and text to image: two scalars, no gradient."""
    a, b = logits_i2t.detach(), logits_t2i.detach()
    rows = torch.arange(len(a), device=a.device)
    own = first + rows
    i2t = (a[rows, own] >= a.amax(dim=1)).sum()
    t2i = (b[rows, own] >= max_over_ranks(b.amax(dim=0))[own]).sum()
    return i2t.float(), t2i.float()
