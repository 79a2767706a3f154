"""Colour jitter, grayscale, Gaussian blur and flip of a batch of images, on its own device.

What SLIP (Mu et al. 2022, arXiv 2112.12750, section 4 and its code, main.py) does to its two extra views, in its order:
jitter, grayscale, blur, flip. There Pillow rounds to 8 bits after every step; here the steps are fp32 and the result is
rounded once.

The parameters are drawn by the loader, one row per image, and stay on the host: images are grouped by what is done to
them without waiting for the device.
"""

from collections.abc import Callable
from itertools import permutations

import torch
from torch import Tensor

PARAMETERS = 8
BRIGHTNESS, CONTRAST, SATURATION, HUE, ORDER, GRAYSCALE, BLUR_SIGMA, FLIP = range(PARAMETERS)
"""Columns of the parameters [M, 8] fp32: three factors, 1 to leave the image alone; the turn of the hue as a share of
the circle; the row of ORDERS, -1 for no jitter at all; 1 for grayscale; sigma in pixels, 0 for no blur; 1 for a mirror
image."""
ORDERS = tuple(permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE)))
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's "L"
BLUR_REACH = 11
"""Pixels to either side: SimCLR's 23-pixel kernel at 224 pixels (Chen et al. 2020, appendix A)."""
LARGEST_SIGMA = BLUR_REACH / 3


@torch.no_grad()
def augment(images: Tensor, parameters: Tensor) -> Tensor:
    """Each image [3, H, W] varied as its row says: uint8 [M, 3, H, W] -> the same shape, uint8.

    parameters: fp32 [M, 8] on the host; see the columns above.
    """
    if parameters.shape != (len(images), PARAMETERS) or parameters.device.type != "cpu":
        raise ValueError(
            f"{len(images)} images want [{len(images)}, {PARAMETERS}] parameters on the host, "
            f"got {list(parameters.shape)} on {parameters.device}"
        )
    x = images.float() / 255
    order = parameters[:, ORDER].long()
    orders = torch.tensor(ORDERS)[order.clamp(min=0)]  # [M, 4]
    for turn in range(4):
        for column, change in CHANGES.items():
            x = _on_rows(x, orders[:, turn].eq(column) & (order >= 0), parameters[:, column], change)
    for column, change in ((GRAYSCALE, grayscale), (BLUR_SIGMA, blur), (FLIP, flip)):
        x = _on_rows(x, parameters[:, column] > 0, parameters[:, column], change)
    return (x * 255).round().to(torch.uint8)


def _on_rows(x: Tensor, chosen: Tensor, values: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """x with change(image, value) in place of each chosen image; chosen and values [M], on the host."""
    rows = chosen.nonzero()[:, 0]
    if not len(rows):
        return x
    there, values = rows.to(x.device, non_blocking=True), values[rows].to(x.device, non_blocking=True)
    return x.index_copy(0, there, change(x[there], values[:, None, None, None]))


def luma(x: Tensor) -> Tensor:
    """The brightness that the eye sees: [M, 3, H, W] -> [M, 1, H, W]."""
    return (LUMA[0] * x[:, 0] + LUMA[1] * x[:, 1] + LUMA[2] * x[:, 2])[:, None]


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    """clip(factor * x)"""
    return (factor * x).clamp(0, 1)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """clip(m + factor * (x - m)), m the mean luma of the image"""
    return torch.lerp(luma(x).mean((2, 3), keepdim=True), x, factor).clamp(0, 1)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    """clip(l + factor * (x - l)), l the luma of the pixel"""
    return torch.lerp(luma(x), x, factor).clamp(0, 1)


def hue(x: Tensor, turn: Tensor) -> Tensor:
    """The hue of HSV turned by this share of the circle, saturation and value left as they are.

    A channel of hue h, saturation s and value v is v - v s max(0, min(k, 4 - k, 1)), k = (n + 6 h) mod 6, with n = 5,
    3, 1 for red, green, blue (the closed form of the usual table of sextants).
    """
    value, smallest = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    chroma = value - smallest
    red, green, blue = x.split(1, dim=1)
    by_red = (green - blue) % (6 * chroma)  # the hue in sextants, times the chroma
    by_green, by_blue = blue - red + 2 * chroma, red - green + 4 * chroma
    sextants = torch.where(value == red, by_red, torch.where(value == green, by_green, by_blue))
    sextants = sextants / torch.where(chroma > 0, chroma, 1.0)
    sextants = torch.where(chroma > 0, sextants, 0.0) + 6 * turn
    k = torch.cat([(n + sextants) % 6 for n in (5, 3, 1)], dim=1)
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def grayscale(x: Tensor, _: Tensor) -> Tensor:
    """Every channel the luma."""
    return luma(x).expand(-1, 3, -1, -1)


def flip(x: Tensor, _: Tensor) -> Tensor:
    """Left to right."""
    return x.flip(-1)


def blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur, sigma in pixels, cut at BLUR_REACH; beyond its edge an image goes on as its last pixel.

    A sum of shifted images instead of a convolution: the same bits whichever images share the batch.
    """
    away = torch.arange(-BLUR_REACH, BLUR_REACH + 1, device=x.device)
    weights = torch.exp(-0.5 * (away / sigma) ** 2)  # [M, 1, 1, 2 * BLUR_REACH + 1]
    weights = (weights / weights.sum(-1, keepdim=True)).unbind(-1)
    height, width = x.shape[2:]
    padded = torch.nn.functional.pad(x, (BLUR_REACH, BLUR_REACH, 0, 0), mode="replicate")
    x = torch.zeros_like(x)
    for i, weight in enumerate(weights):
        x = torch.addcmul(x, weight[..., None], padded[..., i : i + width])
    padded = torch.nn.functional.pad(x, (0, 0, BLUR_REACH, BLUR_REACH), mode="replicate")
    x = torch.zeros_like(x)
    for i, weight in enumerate(weights):
        x = torch.addcmul(x, weight[..., None], padded[..., i : i + height, :])
    return x


CHANGES = {BRIGHTNESS: brightness, CONTRAST: contrast, SATURATION: saturation, HUE: hue}
