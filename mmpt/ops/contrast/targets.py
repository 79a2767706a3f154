"""What each image and each text of a contrastive loss should find."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mmpt import dist


@dataclass(frozen=True)
class Targets:
    """y as distributions: rows of y_i2t [B, N] and columns of y_t2i [B, N] sum to 1 over all N."""

    group: Tensor
    """[N] int64: pairs of one group are each other's positives."""
    size: Tensor
    """[N], how many pairs a pair's group has: each positive is wanted to 1/size."""
    first: int
    """The column of our first image's own text."""
    smoothing: float
    """Share of each distribution that is spread evenly over all N."""
    soft: tuple[Tensor, Tensor] | None
    """y_i2t and y_t2i themselves, where they are not as above."""

    def positive(self, rows: slice, columns: slice) -> Tensor:
        """[r, c] bool, for `rows` of our images and `columns` of all texts."""
        return self.group[self.first :][rows, None] == self.group[columns]

    def distributions(self, positive: Tensor, rows: slice, columns: slice, exact: torch.dtype) -> tuple[Tensor, Tensor]:
        """y_i2t and y_t2i of a block, [r, c] each."""
        if self.soft is not None:
            return self.soft[0][rows, columns].to(exact), self.soft[1][rows, columns].to(exact)
        sure, evenly = (1 - self.smoothing) * positive.to(exact), self.smoothing / len(self.group)
        size = self.size.to(exact)
        return sure / size[self.first :][rows, None] + evenly, sure / size[columns] + evenly


def targets_of(
    pairs: int, group: Tensor | None, smoothing: float, soft: tuple[Tensor, Tensor] | None, device: torch.device
) -> Targets:
    """Of this rank's `pairs`, each alone with its positive where there is no group [B]. Collective.

    Raises ValueError for soft targets that are not [B, N] or that come with smoothing or groups.
    """
    first, count = dist.rank() * pairs, dist.world_size() * pairs
    if soft is not None:
        if smoothing or group is not None:
            raise ValueError("soft targets say all: give them without label smoothing and without groups")
        for y in soft:
            if y.shape != (pairs, count):
                raise ValueError(f"soft targets are [B, N] = [{pairs}, {count}], got {list(y.shape)}")
    if group is None:
        return Targets(torch.arange(count, device=device), torch.ones(count, device=device), first, smoothing, soft)
    if group.shape != (pairs,):
        raise ValueError(f"a group for each of {pairs} pairs, got {list(group.shape)}")
    everyone = dist.gather(group)
    _, place, size = torch.unique(everyone, return_inverse=True, return_counts=True)
    return Targets(everyone, size[place], first, smoothing, soft)
