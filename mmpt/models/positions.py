"""One learned grid of positions for images of any shape."""

import torch
from torch import Tensor
from torch.nn.functional import interpolate


def positions_of_whole_images(table: Tensor, grids: Tensor, places: Tensor, image: Tensor) -> Tensor:
    """[T, D], the position of each patch in its own image: the table stretched to that image's grid, bilinear, corner
    on corner (Kim et al. 2021, ViLT, released code).

    table: [G * G, D], a square grid row by row. grids: [B, 2] rows and columns of each image, on the host. places: [T]
    int64, the patch's place in its own grid, row by row. image: [T] int64, which image the patch belongs to.
    """
    side = round(len(table) ** 0.5)
    square = table.T.unflatten(1, (side, side))[None]  # [1, D, G, G]
    shapes = [tuple(shape) for shape in grids.tolist()]
    first_row: dict[tuple[int, ...], int] = {}
    stretched, rows = [], 0
    for shape in dict.fromkeys(shapes):  # each shape once
        first_row[shape] = rows
        rows += shape[0] * shape[1]
        stretched.append(_stretched(square, shape))
    start = torch.tensor([first_row[shape] for shape in shapes], device=places.device)  # [B]
    return torch.cat(stretched)[start[image] + places]


def _stretched(square: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[rows * columns, D]"""
    if square.shape[2:] != shape:
        exact = torch.promote_types(square.dtype, torch.float32)
        square = interpolate(square.to(exact), size=shape, mode="bilinear", align_corners=True).to(square.dtype)
    return square[0].flatten(1).T
