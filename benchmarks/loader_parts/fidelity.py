"""How far the loader's images are from full decoding and Pillow's antialiased bicubic resize of the same box."""

import math
from functools import partial

import numpy as np
import simplejpeg
from PIL import Image

from mmpt.data.crop import dct_factor, random_crop_box, snapped
from mmpt.data.decode import read_header
from mmpt.data.image import ImageConfig, evaluation_image, training_image
from mmpt.data.randomness import generator

MANY = 10**9


def training_decibels(data: bytes, size: int, config: ImageConfig, position: int) -> float:
    random = partial(generator, 0, epoch=0, position=position)
    header = read_header(data, MANY, MANY)
    box = random_crop_box(*header.upright_size, config.crop_scale, config.crop_ratio, random("crop"))
    factor = dct_factor(header, box, (size, size), config.decode_gap)
    left, top, right, bottom = (edge * factor for edge in snapped(header, box, factor))
    full = Image.fromarray(simplejpeg.decode_jpeg(data, "RGB"))
    expected = full.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, right, bottom))
    return decibels(training_image(data, size, config, random), header.upright(np.asarray(expected)))


def evaluation_decibels(data: bytes, size: int, config: ImageConfig) -> float:
    header = read_header(data, MANY, MANY)
    full = Image.fromarray(header.upright(simplejpeg.decode_jpeg(data, "RGB")))
    side = min(full.size)
    left, top = (full.width - side) / 2, (full.height - side) / 2
    expected = full.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return decibels(evaluation_image(data, size, config), np.asarray(expected))


def decibels(made: np.ndarray, expected: np.ndarray) -> float:
    """Peak signal to noise ratio of [3, H, W] against [H, W, 3]; 99 where they are equal."""
    error = float(((made.transpose(1, 2, 0).astype(float) - expected) ** 2).mean())
    return 99.0 if error == 0 else 10 * math.log10(255**2 / error)
