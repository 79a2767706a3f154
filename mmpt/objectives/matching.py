"""Image-text matching: is this the text of this image?"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def matching_loss(logits: Tensor, matches: Tensor) -> Tensor:
    """The sum over pairs of the cross entropy of [no match, match]: logits [B, 2], matches [B] bool; a scalar."""
    return cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), matches.long(), reduction="sum")


def matching_score(logits: Tensor) -> Tensor:
    """[B], the log odds of a match."""
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return exact[:, 1] - exact[:, 0]


def hard_negatives(similarity: Tensor, own: Tensor, draws: Tensor) -> Tensor:
    """[B] int64: for each row one column that is not its own, drawn by the softmax of its similarities.

    similarity: [B, C] logits; own: [B, C] bool, columns that are positives; draws: [B] uniform in [0, 1), which choose
    by the inverse of the cumulated probabilities, so that a choice depends on no generator's state. Positives are taken
    out before the softmax: afterwards a row could be all zero (Li et al. 2021, ALBEF, section 3.2; its code sets them
    to zero afterwards, and draws fail at low temperatures). Without gradient. ValueError for a row of positives only.
    """
    if similarity.device.type == "cpu" and bool(own.all(1).any()):
        raise ValueError("a hard negative wants another pair, and this one has none: use a batch of two pairs or more")
    logits = similarity.detach().double().masked_fill(own, -torch.inf)
    cumulated = logits.softmax(1).cumsum(1)
    wanted = draws.to(cumulated)[:, None] * cumulated[:, -1:]
    return (cumulated <= wanted).sum(1).clamp(max=similarity.shape[1] - 1)
