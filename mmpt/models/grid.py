"""Square crops in, and a convolutional network's last grid out as tokens: the pixel form of image features (Pixel-BERT,
Huang et al. 2020)."""

from torch import Tensor

from mmpt.batch import Pictures, Tokens, pack_equal
from mmpt.models.image import normalise


def square_pixels(pictures: Pictures, image_size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """[B, 3, S, S] in fp32, each channel normalised. ValueError for pictures of another form or size."""
    if pictures.pixels is None:
        raise ValueError("a convolutional network takes square crops of pixels, not patches or regions")
    if pictures.pixels.shape[2:] != (image_size, image_size):
        raise ValueError(f"the model wants {image_size}-pixel images, got {tuple(pictures.pixels.shape[2:])}")
    return normalise(pictures.pixels, mean, std)


def grid_tokens(grid: Tensor, kept: Tensor | None) -> Tokens:
    """[B, D, rows, columns] -> Tokens of B sequences, a vector per place of the grid, row by row; of the places in
    kept [B, K] alone where it is given."""
    places = grid.flatten(2).transpose(1, 2)  # [B, P, D]
    if kept is not None:
        places = places.gather(1, kept[..., None].expand(-1, -1, places.shape[-1]))  # [B, K, D]
    return pack_equal(places)
