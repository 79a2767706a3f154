"""Learned positions of another size: stretched as the checkpoint's own code stretches them."""

from math import isqrt
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate


class Stretch(NamedTuple):
    """How a grid of positions is brought to another size."""

    mode: Literal["bicubic", "bilinear"]
    align_corners: bool
    antialias: bool

    def __str__(self) -> str:
        return f"{self.mode}, align_corners={self.align_corners}{', antialias' * self.antialias}"


OPEN_CLIP = Stretch("bicubic", align_corners=False, antialias=True)
"""open_clip's resize_pos_embed and timm's resample_abs_pos_embed."""
DEIT = Stretch("bicubic", align_corners=False, antialias=False)
"""DeiT's and ALBEF's interpolate_pos_embed, and transformers' interpolate_pos_encoding of ViT and CLIP."""
VILT = Stretch("bilinear", align_corners=True, antialias=False)
"""ViLT's per-image positions; and SigLIP's, which big_vision stretches with scipy's zoom of order 1."""


def stretched_grid(positions: Tensor, rows: int, how: Stretch) -> Tensor:
    """[1 + g * g, D] or [g * g, D] -> [rows, D]: the square grid in another size, the position of [CLS] as it is.

    ValueError where one of them is no square grid, or only one of them has a position for [CLS].
    """
    old, new = _grid(len(positions)), _grid(rows)
    if old is None or new is None or old[0] != new[0]:
        raise ValueError(f"{len(positions)} positions cannot be stretched to {rows}: not two square grids alike")
    first, side = old
    square = positions[first:].T.unflatten(1, (side, side))[None]  # [1, D, g, g]
    size = (new[1], new[1])
    square = interpolate(square, size, mode=how.mode, align_corners=how.align_corners, antialias=how.antialias)
    return torch.cat([positions[:first], square[0].flatten(1).T])


def _grid(rows: int) -> tuple[int, int] | None:
    """(positions before the grid, side of the grid)."""
    return next(((first, isqrt(rows - first)) for first in (1, 0) if isqrt(rows - first) ** 2 == rows - first), None)
