"""SigLIP's loss: every pair is a question of its own, answered yes or no."""

import torch
from torch import Tensor
from torch.nn.functional import softplus


def pairwise_sigmoid(logits: Tensor, first: int) -> Tensor:
    """The local sum over this rank's images i and all texts j of  -log sigmoid(z_ij l_ij),  a scalar.

    z is 1 for an image with its own text and -1 elsewhere. logits: l, [B, N], scale and bias included; first: the
    column of our first image's own text. Divided by the number of images, it is the loss of Zhai et al. 2023, eq. 1.
    """
    rows = torch.arange(len(logits), device=logits.device)
    sign = torch.full_like(logits, -1.0)
    sign[rows, first + rows] = 1.0
    return softplus(-sign * logits).sum()
