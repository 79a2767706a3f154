"""From the bytes of an image file to the uint8 pixels that a tower wants.

The crop is chosen from the header alone; the file is then decoded no larger than that crop needs, and only the small
result is turned, mirrored and jittered.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial

import numpy as np
from PIL import Image, ImageEnhance

from mmpt.data.crop import dct_factor, random_crop_box, resized_crop
from mmpt.data.decode import Box, Header, decode_pixels, read_header
from mmpt.data.rand_augment import Augmentation, augment
from mmpt.data.randomness import Random
from mmpt.data.views import ViewConfig

Shape = int | Callable[[int, int], tuple[int, int]]


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
    augment: Augmentation = "none"
    """A random chain of simple operations, after all other changes: RandAugment as `albef` or `vilt` publish it, or
    AutoAugment's policy for ImageNet, which FILIP uses."""
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


def training_image(data: bytes, size: int, config: ImageConfig, random: Random) -> np.ndarray:
    """A random resized crop of an image file, perhaps mirrored and jittered: uint8 [3, size, size].

    random: gives the stream for a purpose; each choice has its own, so that switching one on leaves the others alone.
    Raises ImageError for what cannot be decoded or is over a limit.
    """
    return training_images(data, size, config, random)[0]


def training_images(
    data: bytes,
    shape: Shape,
    config: ImageConfig,
    random: Random,
    extra_views: int = 0,
    view_size: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """`training_image`, and V extra crops that are neither jittered nor mirrored yet: [V, 3, view_size, view_size].

    shape: S, for square crops; or what gives the (height, width) that the whole image is resized to, from the width and
    height that it has: the image is then uint8 [3, height, width], and crop_scale does not matter.
    """
    header = read_header(data, config.max_pixels, config.max_bytes)
    decoded = cache(lambda factor: decode_pixels(data, header, factor, config.background))
    resized = partial(resized_crop, decoded, header, gap=config.decode_gap)
    width, height = header.upright_size
    if isinstance(shape, int):
        box = random_crop_box(width, height, config.crop_scale, config.crop_ratio, random("crop"))
        image = resized(box, (shape, shape))
    else:
        image = resized((0, 0, width, height), shape(width, height))
    views = []
    for view in range(extra_views):
        scale, purpose = config.views.crop_scale, f"view {view} crop"
        box = random_crop_box(width, height, scale, config.crop_ratio, random(purpose))
        views.append(resized(box, (view_size, view_size)).transpose(2, 0, 1))
    return vary(image, config, random), np.array(views, dtype=np.uint8)


def evaluation_image(data: bytes, size: int, config: ImageConfig) -> np.ndarray:
    """The centre crop of the image resized so that its shorter side is `size`: uint8 [3, size, size].

    Crop and resize are one antialiased bicubic step on the square in the very middle, fractions of a pixel kept.
    Raises ImageError for what cannot be decoded or is over a limit.
    """
    header = read_header(data, config.max_pixels, config.max_bytes)
    width, height = header.upright_size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return _precisely_resized(data, header, (left, top, left + side, top + side), (size, size), config)


def whole_evaluation_image(
    data: bytes, shape: Callable[[int, int], tuple[int, int]], config: ImageConfig
) -> np.ndarray:
    """The whole image resized in one antialiased bicubic step: uint8 [3, height, width].

    shape: gives (height, width) of the result, from the width and height of the image.
    """
    header = read_header(data, config.max_pixels, config.max_bytes)
    width, height = header.upright_size
    return _precisely_resized(data, header, (0, 0, width, height), shape(width, height), config)


def _precisely_resized(data: bytes, header: Header, box: Box, size: tuple[int, int], config: ImageConfig) -> np.ndarray:
    factor = dct_factor(header, box, size, config.decode_gap)
    pixels = decode_pixels(data, header, factor, config.background)
    left, top, right, bottom = (edge / factor for edge in header.as_stored(box))
    width, height = size if header.turn[0] else (size[1], size[0])  # as stored
    resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC, box=(left, top, right, bottom))
    return _channels_first(header.upright(np.asarray(resized)))


def vary(pixels: np.ndarray, config: ImageConfig, random: Random) -> np.ndarray:
    """Pixels [H, W, 3] jittered, mirrored and augmented as the configuration asks: uint8 [3, H, W]."""
    if config.colour_jitter:
        image = Image.fromarray(np.ascontiguousarray(pixels))
        pixels = np.asarray(jitter(image, config.colour_jitter, random("jitter")))
    if config.flip_probability and random("flip").random() < config.flip_probability:
        pixels = pixels[:, ::-1]
    if config.augment != "none":
        pixels = augment(pixels, config.augment, random("augment"))
    return _channels_first(pixels)


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
