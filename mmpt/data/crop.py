"""Where a crop lies and how it is cut out: chosen from the header, decoded no larger than needed, resized."""

import math
from collections.abc import Callable

import numpy as np
import torch

from mmpt.data.decode import DCT_FACTORS, Box, Header

CROP_TRIES = 10


def random_crop_box(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float], random: np.random.Generator
) -> Box:
    """(left, top, right, bottom) in pixels, fractions kept, from the image's size alone: no pixel need be decoded yet.

    A uniform share of the area within `scale` and a log-uniform width / height within `ratio` (Szegedy et al. 2015,
    "Going deeper with convolutions", section 6, in the form every CLIP uses). After ten that do not fit, the largest
    centred crop whose ratio is allowed. Draws the same count of random numbers every time.
    """
    draws = random.random((CROP_TRIES, 4))
    for share, aspect, across, down in draws.tolist():
        area = width * height * (scale[0] + share * (scale[1] - scale[0]))
        wanted = math.exp(math.log(ratio[0]) + aspect * (math.log(ratio[1]) - math.log(ratio[0])))
        crop_width, crop_height = math.sqrt(area * wanted), math.sqrt(area / wanted)
        if crop_width <= width and crop_height <= height:
            left, top = across * (width - crop_width), down * (height - crop_height)
            return left, top, min(left + crop_width, width), min(top + crop_height, height)
    crop_width, crop_height = min(width, height * ratio[1]), min(height, width / ratio[0])
    left, top = (width - crop_width) / 2, (height - crop_height) / 2
    return left, top, left + crop_width, top + crop_height


def resized_crop(
    decoded: Callable[[int], np.ndarray], header: Header, box: Box, size: tuple[int, int], gap: float
) -> np.ndarray:
    """The box of the upright image, resized to size = (height, width): uint8 [height, width, 3], upright.

    decoded: gives the pixels as stored, decoded a factor smaller; see `decode_pixels`.

    The box's corner snaps to a whole pixel of the image as decoded, so by at most half a pixel of 1 / gap of the
    result's: then torch's antialiased bicubic resize in integers can do it, which is four to five times as fast as
    Pillow's and equal to it within rounding. It takes a scale, and so a fractional extent, but no fractional corner.
    """
    factor = dct_factor(header, box, size, gap)
    left, top, right, bottom = snapped(header, box, factor)
    pixels = decoded(factor)[int(top) : math.ceil(bottom), int(left) : math.ceil(right)]
    height, width = (size[1], size[0]) if header.turn[0] else size  # as stored
    scales = (height / (bottom - top) * (1 + 1e-9), width / (right - left) * (1 + 1e-9))  # or floor may lose a row
    planes = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]  # [1, 3, H, W], channels last
    resized = torch.nn.functional.interpolate(planes, scale_factor=scales, mode="bicubic", antialias=True)
    return header.upright(resized[0, :, :height, :width].permute(1, 2, 0).numpy())


def dct_factor(header: Header, box: Box, size: tuple[int, int], gap: float) -> int:
    """How many times smaller the image may be decoded so that the box keeps gap times the pixels of size.

    size: (height, width) of what the box is resized to.
    """
    spare = min((box[2] - box[0]) / size[1], (box[3] - box[1]) / size[0])
    if header.dct:
        for factor in DCT_FACTORS:
            if spare >= factor * gap:
                return factor
    return 1


def snapped(header: Header, box: Box, factor: int) -> Box:
    """The box, of the upright image, in pixels of the stored image decoded `factor` times smaller; left and top whole.

    Its extent stays where factor > 1, and is rounded, as torchvision's is, where factor = 1: torch leaves out a
    direction in which as many pixels come out as go in, whatever the scale.
    """
    ends = []
    left, top, right, bottom = (edge / factor for edge in header.as_stored(box))
    for first, last, length in ((left, right, header.width), (top, bottom, header.height)):
        extent = max(1, round(last - first)) if factor == 1 else last - first
        start = min(round(first), int(length / factor - extent))
        ends.append((start, start + extent))
    (left, right), (top, bottom) = ends
    return left, top, right, bottom
