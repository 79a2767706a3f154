"""Each step of the augmentation against Pillow, colorsys and scipy, one image at a time."""

import colorsys
from itertools import permutations

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter
from scipy import ndimage
from torch import Tensor

from mmpt.ops import augment as under_test
from mmpt.ops.augment import (
    BLUR_SIGMA,
    BRIGHTNESS,
    CONTRAST,
    FLIP,
    GRAYSCALE,
    HUE,
    ORDER,
    ORDERS,
    PARAMETERS,
    SATURATION,
    augment,
)

NEUTRAL = {BRIGHTNESS: 1.0, CONTRAST: 1.0, SATURATION: 1.0, ORDER: -1.0}


def pictures(count: int, height: int = 20, width: int = 26, seed: int = 0) -> Tensor:
    """uint8 [count, 3, height, width], smooth, with pure grey and pure colours among the pixels."""
    random = np.random.default_rng(seed)
    images = []
    for _ in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        pixels = np.array(coarse.resize((width, height), Image.Resampling.BICUBIC))
        pixels[0, :4] = [[0, 0, 0], [255, 255, 255], [90, 90, 90], [255, 0, 0]]
        pixels[1, :4] = [[0, 255, 0], [0, 0, 255], [255, 255, 0], [7, 200, 200]]
        images.append(pixels.transpose(2, 0, 1))
    return torch.from_numpy(np.stack(images))


def rows(*changes: dict[int, float]) -> Tensor:
    table = torch.zeros(len(changes), PARAMETERS)
    for row, change in zip(table, changes, strict=True):
        for column, value in (NEUTRAL | change).items():
            row[column] = value
    return table


def reference(image: np.ndarray, row: np.ndarray) -> np.ndarray:
    """One image, fp64 [3, H, W] in 0 to 1, written out from the definitions."""
    x = image.astype(np.float64) / 255

    def luma(x: np.ndarray) -> np.ndarray:
        return np.tensordot([0.299, 0.587, 0.114], x, 1)

    def turned(x: np.ndarray) -> np.ndarray:
        out = np.empty_like(x)
        for y, z in np.ndindex(x.shape[1:]):
            h, s, v = colorsys.rgb_to_hsv(*x[:, y, z])
            out[:, y, z] = colorsys.hsv_to_rgb((h + row[HUE]) % 1, s, v)
        return out

    steps = {
        BRIGHTNESS: lambda x: np.clip(x * row[BRIGHTNESS], 0, 1),
        CONTRAST: lambda x: np.clip(x * row[CONTRAST] + luma(x).mean() * (1 - row[CONTRAST]), 0, 1),
        SATURATION: lambda x: np.clip(x * row[SATURATION] + luma(x) * (1 - row[SATURATION]), 0, 1),
        HUE: turned,
    }
    if row[ORDER] >= 0:
        for column in ORDERS[int(row[ORDER])]:
            x = steps[column](x)
    if row[GRAYSCALE]:
        x = np.broadcast_to(luma(x), x.shape)
    if row[BLUR_SIGMA]:
        x = np.stack([ndimage.gaussian_filter(c, row[BLUR_SIGMA], mode="nearest", radius=11) for c in x])
    return x[..., ::-1] if row[FLIP] else x


def test_every_combination_is_the_written_out_one():
    random = np.random.default_rng(1)
    images = pictures(64)
    table = rows(*[
        {
            BRIGHTNESS: random.uniform(0.6, 1.4), CONTRAST: random.uniform(0.6, 1.4),
            SATURATION: random.uniform(0.6, 1.4), HUE: random.uniform(-0.1, 0.1) * (1 if i % 3 else 5),
            ORDER: i % 25 - 1, GRAYSCALE: i % 5 == 0, BLUR_SIGMA: random.uniform(0.1, 2) * (i % 2), FLIP: i % 4 == 1,
        }
        for i in range(64)
    ])  # fmt: skip
    made = augment(images, table)
    assert made.dtype == torch.uint8 and made.shape == images.shape
    for image, row, got in zip(images.numpy(), table.numpy().astype(np.float64), made.numpy(), strict=True):
        assert np.abs(got - 255 * reference(image, row)).max() <= 0.5 + 1e-3  # rounded once, at the end


def test_nothing_asked_is_nothing_done():
    images = pictures(3)
    assert augment(images, rows({}, {}, {})).equal(images)
    neutral = [{ORDER: order} for order in range(24)]
    assert augment(images[:1].expand(24, -1, -1, -1), rows(*neutral)).equal(images[:1].expand(24, -1, -1, -1))


@pytest.mark.parametrize(
    ("column", "enhance"),
    [(BRIGHTNESS, ImageEnhance.Brightness), (CONTRAST, ImageEnhance.Contrast), (SATURATION, ImageEnhance.Color)],
)
@pytest.mark.parametrize("factor", [0.6, 0.9, 1.0, 1.4])
def test_factors_are_pillows(column: int, enhance: type, factor: float):
    images = pictures(2)
    made = augment(images, rows({column: factor, ORDER: 0}, {column: factor, ORDER: 17}))
    for image, got in zip(images, made, strict=True):
        expected = np.asarray(enhance(Image.fromarray(image.permute(1, 2, 0).numpy())).enhance(factor))
        assert np.abs(got.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 2  # its luma is in 8 bits


def test_grayscale_and_flip_are_pillows():
    images = pictures(2)
    made = augment(images, rows({GRAYSCALE: 1}, {FLIP: 1}))
    grey = np.asarray(Image.fromarray(images[0].permute(1, 2, 0).numpy()).convert("L"))
    assert np.abs(made[0].numpy().astype(int) - grey).max() <= 1
    assert made[1].equal(images[1].flip(-1))


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur_is_about_pillows(sigma: float):
    """Pillow makes its blur of three box blurs, so near is all that can be asked."""
    (image,) = pictures(1, 48, 48)
    (made,) = augment(image[None], rows({BLUR_SIGMA: sigma}))
    blurred = Image.fromarray(image.permute(1, 2, 0).numpy()).filter(ImageFilter.GaussianBlur(sigma))
    difference = np.abs(made.permute(1, 2, 0).numpy().astype(int) - np.asarray(blurred))
    assert difference.mean() < 0.8
    assert made.shape == image.shape and (sigma > 0.1 or made.equal(image))


def test_an_image_smaller_than_the_blur():
    images = pictures(1, 2, 5)[..., :2, :5]
    (made,) = augment(images, rows({BLUR_SIGMA: 2.0}))
    expected = 255 * reference(images[0].numpy(), rows({BLUR_SIGMA: 2.0})[0].numpy())
    assert np.abs(made.numpy() - expected).max() <= 0.501


def test_the_company_an_image_keeps_changes_nothing():
    images = pictures(12)
    random = np.random.default_rng(2)
    table = rows(*[
        {BRIGHTNESS: random.uniform(0.6, 1.4), SATURATION: random.uniform(0.6, 1.4), HUE: random.uniform(-0.1, 0.1),
         CONTRAST: random.uniform(0.6, 1.4), ORDER: int(random.integers(24)), BLUR_SIGMA: random.uniform(0.1, 2)}
        for _ in range(12)
    ])  # fmt: skip
    together = augment(images, table)
    parts = [augment(images[i : i + n], table[i : i + n]) for i, n in ((0, 1), (1, 4), (5, 7))]
    assert (together.int() - torch.cat(parts).int()).abs().max() <= 1
    assert (together == torch.cat(parts)).float().mean() > 0.999


def test_parameters_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"2 images want \[2, 8\] parameters on the host, got \[1, 8\]"):
        augment(pictures(2), rows({}))


def test_all_orders_are_there_once():
    assert sorted(ORDERS) == sorted(permutations(under_test.CHANGES)) and len(set(ORDERS)) == 24
