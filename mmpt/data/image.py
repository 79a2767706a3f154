"""From the bytes of an image file to the uint8 pixels that a tower wants.

The crop is chosen from the header alone; the file is then decoded no larger than that crop needs, and only the small
result is turned, mirrored and jittered.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from PIL import Image, ImageEnhance

from mmpt.data.decode import DCT_FACTORS, Box, Header, decode_pixels, read_header
from mmpt.data.decode import ImageError as ImageError
from mmpt.data.views import ViewConfig

CROP_TRIES = 10


@dataclass(frozen=True)
class ImageConfig:
    """How images are decoded and varied in training. Normalisation is the image tower's, on its own device."""

    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Least and greatest share of the image's area that a random crop covers."""
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    """Least and greatest width of a random crop divided by its height."""
    flip_probability: float = 0.0
    """Share of training images mirrored left to right; 0 where captions say left and right."""
    colour_jitter: float = 0.0
    """Brightness, contrast and saturation are each scaled by a factor within 1 - this and 1 + this."""
    background: tuple[int, int, int] = (255, 255, 255)
    """Colour (red, green, blue; 0 to 255) put behind transparent images."""
    max_pixels: int = 100_000_000
    """Images of more pixels are refused by their header, before any memory is taken."""
    max_bytes: int = 100_000_000
    """Image files of more bytes are refused unread."""
    decode_gap: float = 1.5
    """JPEGs are decoded at 1/2, 1/4 or 1/8 of their size where the crop then still has this many times the wanted
    pixels in both directions. Worst of 400 photographs against full decoding: 29 dB at 1, 35 at 1.5, 41 at 2."""
    views: ViewConfig = field(default_factory=ViewConfig)
    """The extra views, for methods that want some."""

    def __post_init__(self):
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale wants 0 < least <= greatest <= 1, got {self.crop_scale}")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"crop_ratio wants 0 < least <= greatest, got {self.crop_ratio}")
        if not 0 <= self.flip_probability <= 1 or not 0 <= self.colour_jitter < 1:
            raise ValueError(
                f"flip_probability {self.flip_probability} or colour_jitter {self.colour_jitter} is out of range"
            )
        if len(self.background) != 3 or not all(0 <= value <= 255 for value in self.background):
            raise ValueError(f"background wants three values from 0 to 255, got {self.background}")
        if self.decode_gap < 1 or self.max_pixels < 1 or self.max_bytes < 1:
            raise ValueError(
                f"decode_gap ({self.decode_gap}), max_pixels ({self.max_pixels}) and max_bytes ({self.max_bytes}) "
                "must each be 1 or more"
            )


def decode(data: bytes, background: tuple[int, int, int], max_pixels: int) -> Image.Image:
    """A JPEG, PNG or WebP file as an upright RGB image, in full.

    The EXIF orientation is applied; transparency is composed on the background. Raises ImageError for anything else,
    for damage, and for more than max_pixels pixels.
    """
    header = read_header(data, max_pixels, max_bytes=len(data))
    return Image.fromarray(header.upright(decode_pixels(data, header, 1, background)))


def training_image(
    data: bytes, size: int, config: ImageConfig, random: Callable[[str], np.random.Generator]
) -> np.ndarray:
    """A random resized crop of an image file, perhaps mirrored and jittered: uint8 [3, size, size].

    random: gives the stream for a purpose; each choice has its own, so that switching one on leaves the others alone.
    Raises ImageError for what cannot be decoded or is over a limit.
    """
    return training_images(data, size, config, random, extra_views=0)[0]


def training_images(
    data: bytes, size: int, config: ImageConfig, random: Callable[[str], np.random.Generator], extra_views: int
) -> tuple[np.ndarray, np.ndarray]:
    """`training_image`, and V extra crops that are neither jittered nor mirrored yet: uint8 [V, 3, size, size]."""
    header = read_header(data, config.max_pixels, config.max_bytes)
    decoded = cache(lambda factor: decode_pixels(data, header, factor, config.background))

    def crop(scale: tuple[float, float], purpose: str) -> np.ndarray:
        box = random_crop_box(*header.upright_size, scale, config.crop_ratio, random(purpose))
        return resized_crop(decoded, header, box, size, config.decode_gap)

    image = vary(crop(config.crop_scale, "crop"), config, random)
    views = np.empty((extra_views, 3, size, size), dtype=np.uint8)
    for view in range(extra_views):
        views[view] = crop(config.views.crop_scale, f"view {view} crop").transpose(2, 0, 1)
    return image, views


def resized_crop(decoded: Callable[[int], np.ndarray], header: Header, box: Box, size: int, gap: float) -> np.ndarray:
    """The box of the upright image, resized: uint8 [size, size, 3], upright.

    decoded: gives the pixels as stored, decoded a factor smaller; see `decode_pixels`.

    The box snaps to whole pixels of the image as decoded, at most half a pixel of 1 / gap of the result's, as
    torchvision's crop snaps to those of the full image: for boxes of whole pixels torch has an antialiased bicubic
    resize in integers, four to five times as fast as Pillow's and equal to it within rounding.
    """
    factor = dct_factor(header, box, size, gap)
    left, top, right, bottom = snapped(header, box, factor)
    pixels = np.ascontiguousarray(decoded(factor)[top:bottom, left:right])
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]  # [1, 3, H, W], channels last
    resized = torch.nn.functional.interpolate(planes, (size, size), mode="bicubic", antialias=True)
    return header.upright(resized[0].permute(1, 2, 0).numpy())


def dct_factor(header: Header, box: Box, size: int, gap: float) -> int:
    """How many times smaller the image may be decoded so that the box keeps gap * size pixels in both directions."""
    shorter = min(box[2] - box[0], box[3] - box[1])
    if header.dct:
        for factor in DCT_FACTORS:
            if shorter >= factor * gap * size:
                return factor
    return 1


def snapped(header: Header, box: Box, factor: int) -> tuple[int, int, int, int]:
    """The box, of the upright image, in whole pixels of the stored image decoded `factor` times smaller."""
    ends = []
    stored = [edge / factor for edge in header.as_stored(box)]
    for first, last, length in ((stored[0], stored[2], header.width), (stored[1], stored[3], header.height)):
        whole = max(1, length // factor)  # a last pixel that is not all image is left out
        extent = min(max(1, round(last - first)), whole)
        start = min(round(first), whole - extent)
        ends.append((start, start + extent))
    (left, right), (top, bottom) = ends
    return left, top, right, bottom


def evaluation_image(data: bytes, size: int, config: ImageConfig) -> np.ndarray:
    """The centre crop of the image resized so that its shorter side is `size`: uint8 [3, size, size].

    Crop and resize are one antialiased bicubic step on the square in the very middle, fractions of a pixel kept.
    Raises ImageError for what cannot be decoded or is over a limit.
    """
    header = read_header(data, config.max_pixels, config.max_bytes)
    side = min(header.width, header.height)
    left, top = (header.width - side) / 2, (header.height - side) / 2
    box = (left, top, left + side, top + side)
    factor = dct_factor(header, box, size, config.decode_gap)
    pixels = decode_pixels(data, header, factor, config.background)
    left, top, right, bottom = (edge / factor for edge in box)
    square = Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC, box=(left, top, right, bottom))
    return _channels_first(header.upright(np.asarray(square)))


def vary(pixels: np.ndarray, config: ImageConfig, random: Callable[[str], np.random.Generator]) -> np.ndarray:
    """Pixels [H, W, 3] jittered and mirrored as the configuration asks: uint8 [3, H, W]."""
    if config.colour_jitter:
        image = Image.fromarray(np.ascontiguousarray(pixels))
        pixels = np.asarray(jitter(image, config.colour_jitter, random("jitter")))
    if config.flip_probability and random("flip").random() < config.flip_probability:
        pixels = pixels[:, ::-1]
    return _channels_first(pixels)


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


def jitter(image: Image.Image, strength: float, random: np.random.Generator) -> Image.Image:
    """Brightness, contrast and saturation scaled, in that order, by factors uniform in [1 - strength, 1 + strength]."""
    factors = 1 + strength * (2 * random.random(3) - 1)
    for enhance, factor in zip(
        (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), factors.tolist(), strict=True
    ):
        image = enhance(image).enhance(factor)
    return image


def _channels_first(pixels: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))  # [H, W, 3] -> [3, H, W]
