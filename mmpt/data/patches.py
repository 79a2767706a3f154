"""Images of any size as packed patches: what size each becomes, and its patches one after another."""

from collections.abc import Sequence

import numpy as np
import torch

from mmpt.batch import Tokens, pack
from mmpt.inputs import InputSpec


def whole_size(width: int, height: int, inputs: InputSpec) -> tuple[int, int]:
    """(height, width) in pixels that a whole image is resized to: multiples of the patch size, at least one patch.

    `shorter_side`: the shorter side becomes image_size, unless the longer would exceed longest_side, which it then
    becomes (Kim et al. 2021, ViLT, section 3; 384 and 639 in its code, which leaves at most 608 pixels). `native`: as
    it is, unless a side exceeds longest_side. Both sides are then rounded, and cut down to whole patches; the image is
    resized once, to just that.
    """
    scale = 1.0 if inputs.image_resize == "native" else inputs.image_size / min(width, height)
    if scale * max(width, height) > inputs.longest_side:
        scale = inputs.longest_side / max(width, height)
    patch = inputs.patch_size
    rows, columns = (max(1, int(scale * side + 0.5) // patch) for side in (height, width))
    return rows * patch, columns * patch


def pack_patches(
    images: Sequence[np.ndarray], patch_size: int, kept: Sequence[np.ndarray | None]
) -> tuple[Tokens, torch.Tensor, torch.Tensor]:
    """Images [3, H, W] uint8 as sequences of patches, row by row; the place of each in its grid, [T] int64; and the
    grid (rows, columns) of each image, [B, 2] int64.

    A patch is its pixels in the order (channel, row, column), as a convolution's weights have them: x is uint8
    [T, 3 * patch_size * patch_size]. Sides must be multiples of patch_size.
    kept: the places of each image's patches that stay, ascending, or None for all.
    """
    grids = [(image.shape[1] // patch_size, image.shape[2] // patch_size) for image in images]
    sequences, places = [], []
    for image, (rows, columns), own in zip(images, grids, kept, strict=True):
        cut = image.reshape(3, rows, patch_size, columns, patch_size).transpose(1, 3, 0, 2, 4)  # [gy, gx, 3, S, S]
        patches = cut.reshape(rows * columns, -1)
        sequences.append(torch.from_numpy(patches if own is None else patches[own]))
        places.append(torch.arange(rows * columns) if own is None else torch.from_numpy(own))
    return pack(sequences), torch.cat(places), torch.tensor(grids)
