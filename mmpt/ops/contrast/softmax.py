"""What one softmax of a contrastive loss needs of its logits, taken from them piece by piece."""

import math

import torch
from torch import Tensor

from mmpt import dist


class Softmax:
    """Of n images over all texts, or of n texts over all images, while blocks of [r, c] logits come by.

    log_sum_exp: [n]. best: [n], the highest logit; sharing: [n], how many have it; right: [n], how many of these are
    positives. All in the type of the logits.
    """

    def __init__(self, n: int, over: int, exact: torch.dtype, device: torch.device):
        """over: the dimension of the logits that the sum runs over."""
        self._over = over
        self.log_sum_exp = torch.full((n,), -math.inf, dtype=exact, device=device)
        self.best = self.log_sum_exp.clone()
        self.sharing, self.right = torch.zeros_like(self.best), torch.zeros_like(self.best)

    def add(self, logits: Tensor, positive: Tensor, at: slice) -> None:
        """A block whose kept dimension lies at `at`."""
        self.log_sum_exp[at] = torch.logaddexp(self.log_sum_exp[at], logits.logsumexp(self._over))
        top = logits.amax(self._over)
        highest = logits == top.unsqueeze(self._over)
        best = torch.maximum(self.best[at], top)
        for count, here in ((self.sharing, highest), (self.right, highest & positive)):
            before = count[at] * (self.best[at] == best)
            count[at] = before + here.sum(self._over) * (top == best)
        self.best[at] = best

    def join_ranks(self) -> None:
        """Put the ranks' pieces together: only [n] vectors travel. Collective."""
        self.log_sum_exp = dist.logsumexp_over_ranks(self.log_sum_exp)
        best = dist.max_over_ranks(self.best)
        here = torch.stack([self.sharing, self.right]) * (self.best == best)
        self.sharing, self.right = dist.sum_over_ranks(here)
        self.best = best

    def correct(self, own: slice) -> Tensor:
        """How many of these find a positive at their highest logit, a scalar; where k share that, each counts 1/k."""
        return (self.right[own] / self.sharing[own].clamp(min=1)).sum()
