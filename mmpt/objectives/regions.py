"""What is asked about masked regions: UNITER (Chen et al. 2020, section 3.2, "Masked Region Modeling").

The paper sums over the numbers of a vector and the classes of a distribution; the released code takes the mean over
them too, which is what the published models were trained with and what is done here.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div


def feature_regression(guesses: Tensor, features: Tensor) -> Tensor:
    """Sum over regions of the mean square of guess - feature: [M, F] each; a scalar in at least fp32."""
    exact = torch.promote_types(guesses.dtype, torch.float32)
    return (guesses.to(exact) - features.to(exact)).square().mean(1).sum()


def region_classes(distributions: Tensor) -> Tensor:
    """[M] int64, the likeliest class that is not the background, class 0: distributions [M, C]."""
    return distributions[:, 1:].argmax(1) + 1


def class_divergence(logits: Tensor, distributions: Tensor) -> Tensor:
    """Sum over regions of the mean over classes of d log(d / softmax(logits)): [M, C] each; a scalar."""
    exact = torch.promote_types(logits.dtype, torch.float32)
    each = kl_div(logits.to(exact).log_softmax(1), distributions.to(exact), reduction="none")
    return each.mean(1).sum()


def class_regression(logits: Tensor, distributions: Tensor) -> Tensor:
    """Sum over regions of the cross entropy of the likeliest class: [M, C] each; a scalar."""
    exact = torch.promote_types(logits.dtype, torch.float32)
    return cross_entropy(logits.to(exact), region_classes(distributions), reduction="sum")
