"""Momentum distillation: a slowly moving copy of the model softens the targets (Li et al. 2021, ALBEF, section 3.3)."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mmpt.ops.similarity import similarity

Sides = tuple[Tensor, Tensor]
"""Of images and of texts."""


class Contrasted(NamedTuple):
    """i2t, t2i [B, N]: logits of our images with all texts, of our texts with all images; loss, right_i2t, right_t2i:
    scalars, summed over our pairs."""

    i2t: Tensor
    t2i: Tensor
    loss: Tensor
    right_i2t: Tensor
    right_t2i: Tensor


def distilled_contrast(
    ours: Sides, by_copy: Sides, candidates: Sides, own: Tensor, scale: Tensor, alpha: Tensor
) -> Contrasted:
    """Equation 6, of B pairs among N candidates that the copy has encoded:

        y_i2t = alpha softmax(scale v' T'^T) + (1 - alpha) own        likewise y_t2i
        loss  = 1/2 sum_i [ H(y_i2t, softmax(scale v T'^T)) + H(y_t2i, softmax(scale t V'^T)) ]

    ours (v, t) and by_copy (v', t'): [B, E] each; candidates (V', T'): [N, E] each, without gradient; own: [B, N] bool,
    which candidate is the pair's own; scale [1] = 1 / tau; alpha: a scalar.
    """
    (images, texts), onehot = candidates, torch.zeros(own.shape, dtype=scale.dtype, device=own.device)
    onehot = onehot.masked_fill_(own, 1.0)
    i2t, t2i = scale * similarity(ours[0], texts), scale * similarity(ours[1], images)
    with torch.no_grad():
        soft = [(scale * similarity(x, y)).softmax(1) for x, y in ((by_copy[0], texts), (by_copy[1], images))]
        targets = [alpha * each + (1 - alpha) * onehot for each in soft]
    loss = (soft_cross_entropy(i2t, targets[0]) + soft_cross_entropy(t2i, targets[1])).sum() / 2
    right = [(logits.argmax(1) == onehot.argmax(1)).sum() for logits in (i2t.detach(), t2i.detach())]
    return Contrasted(i2t, t2i, loss, right[0], right[1])


def distilled_guesses(logits: Tensor, answers: Tensor, by_copy: Tensor, alpha: Tensor) -> Tensor:
    """[M], (1 - alpha) H(answer, p) + alpha H(p', p) of each masked word, equation 7: logits [M, V], answers [M] int64,
    by_copy [M, V] the copy's distributions."""
    each = (1 - alpha) * cross_entropy(logits.float(), answers, reduction="none")
    return each + alpha * soft_cross_entropy(logits, by_copy)


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """[B], - sum_j targets_j log softmax(logits)_j of each row: logits [B, C], targets [B, C] distributions."""
    exact = torch.promote_types(logits.dtype, torch.float32)
    return -(targets * logits.to(exact).log_softmax(1)).sum(1)
