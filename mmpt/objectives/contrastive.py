"""InfoNCE over a global batch of which each rank scores its own images against all texts."""

from collections.abc import Callable

import torch
from torch import Tensor

OverRanks = Callable[[Tensor], Tensor]


def one_sided_info_nce(logits_i2t: Tensor, logits_t2i: Tensor, first: int, logsumexp_over_ranks: OverRanks) -> Tensor:
    """The local sum of the symmetric contrastive loss, a scalar; over all ranks it adds up to

        1/2 sum_i [ log sum_j exp(a_ij) - a_ii ]  +  1/2 sum_j [ log sum_i exp(b_ij) - b_jj ]

    logits_i2t, logits_t2i: a and b, [B, N], scores of this rank's B images with the texts of all ranks, times the
    scale. For CLIP they are one tensor; FILIP's two differ. first: the column of our first image's own text.
    logsumexp_over_ranks: puts together [N] column sums from the ranks' pieces; only that vector ever travels.
    Source: van den Oord et al. 2018, eq. 4, in both directions as in CLIP (Radford et al. 2021, figure 3).
    """
    rows, own = _own_pairs(logits_i2t, first)
    row_sums = logits_i2t.logsumexp(dim=1)  # [B]
    column_sums = logsumexp_over_ranks(logits_t2i.logsumexp(dim=0))[own]  # [N] -> [B]
    return (row_sums - logits_i2t[rows, own] + column_sums - logits_t2i[rows, own]).sum() / 2


@torch.no_grad()
def correct_matches(
    logits_i2t: Tensor, logits_t2i: Tensor, first: int, max_over_ranks: OverRanks, sum_over_ranks: OverRanks
) -> tuple[Tensor, Tensor]:
    """How many of this rank's pairs score highest among all, image to text and text to image: two scalars.

    A pair that shares the highest score with k - 1 others counts 1/k, as if one were drawn: a model that gives every
    pair the same score is at chance, not at 100 %. Shapes as in `one_sided_info_nce`.
    """
    rows, own = _own_pairs(logits_i2t, first)
    best_text = logits_i2t.amax(dim=1)  # [B]
    sharing = (logits_i2t == best_text[:, None]).sum(1)
    i2t = (logits_i2t[rows, own] == best_text) / sharing.clamp(min=1)
    best_image = max_over_ranks(logits_t2i.amax(dim=0))  # [N]
    sharing = sum_over_ranks((logits_t2i == best_image).sum(0))
    t2i = (logits_t2i[rows, own] == best_image[own]) / sharing[own].clamp(min=1)
    return i2t.float().sum(), t2i.float().sum()


def _own_pairs(logits: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Row and column of each image with its own text: [B], [B]."""
    rows = torch.arange(len(logits), device=logits.device)
    return rows, first + rows
