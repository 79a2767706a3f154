"""From the bytes of an image file to the uint8 pixels that a tower wants: decode, crop, resize, flip, jitter."""

import io
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageEnhance

CROP_TRIES = 10
TRANSPOSE_OF_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
Box = tuple[float, float, float, float]


class ImageError(ValueError):
    """Bytes that are not an image we can or want to decode."""


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


def decode(data: bytes, background: tuple[int, int, int], max_pixels: int) -> Image.Image:
    """A JPEG, PNG or WebP file as an upright RGB image.

    The EXIF orientation is applied; transparency is composed on the background. Raises ImageError for anything else,
    for damage, and for more than max_pixels pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is our own
            image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))  # reads no further than the header
        if image.width * image.height > max_pixels:
            raise ImageError(f"{image.width} x {image.height} pixels are more than max_pixels ({max_pixels})")
        upright = TRANSPOSE_OF_ORIENTATION.get(image.getexif().get(ExifTags.Base.Orientation, 1))
        rgb = _rgb(image, data, background)
        return rgb if upright is None else rgb.transpose(upright)
    except ImageError:
        raise
    except Exception as error:  # on hostile bytes the decoders raise nearly every type there is
        raise ImageError(f"cannot be decoded: {str(error) or type(error).__name__}") from error


def _rgb(image: Image.Image, data: bytes, background: tuple[int, int, int]) -> Image.Image:
    if data[:2] == b"\xff\xd8" and image.mode in ("RGB", "L"):  # CMYK is left to Pillow, which knows Adobe's inversion
        return Image.fromarray(simplejpeg.decode_jpeg(data, "RGB"))
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, (*background, 255))
        return Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip instead of scale
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def training_image(
    image: Image.Image, size: int, config: ImageConfig, random: Callable[[str], np.random.Generator]
) -> np.ndarray:
    """A random resized crop, perhaps mirrored and jittered: uint8 [3, size, size].

    random: gives the stream for a purpose; each choice has its own, so that switching one on leaves the others alone.
    """
    box = random_crop_box(image.width, image.height, config.crop_scale, config.crop_ratio, random("crop"))
    resized = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    if config.colour_jitter:
        resized = jitter(resized, config.colour_jitter, random("jitter"))
    if config.flip_probability and random("flip").random() < config.flip_probability:
        resized = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return _channels_first(resized)


def evaluation_image(image: Image.Image, size: int) -> np.ndarray:
    """The centre crop of the image resized so that its shorter side is `size`: uint8 [3, size, size].

    Crop and resize are one antialiased bicubic step, on the square in the middle of the original.
    """
    side = min(image.width, image.height)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    return _channels_first(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


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


def _channels_first(image: Image.Image) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))  # [H, W, 3] -> [3, H, W]
