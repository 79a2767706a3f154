"""Single operations against plain formulas; which are drawn, how often and how strong, against the published lists."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage, stats

from mmpt.data.image import ImageConfig, training_image
from mmpt.data.loader import DataConfig
from mmpt.data.rand_augment import IMAGENET, STYLES, Operation, apply, augment, chain, of_imagenet
from mmpt.data.randomness import generator, streams
from mmpt.inputs import InputSpec
from tests.data.batches import VARIED, assert_same, global_batches
from tests.data.shards import picture

RANDOM = np.random.default_rng(0)
COARSE = RANDOM.integers(20, 230, (5, 7, 3), dtype=np.uint8)
PIXELS = np.asarray(Image.fromarray(COARSE).resize((60, 44), Image.Resampling.BICUBIC))
GREY = np.array([0.299, 0.587, 0.114])


def done(name: str, strength: float = 0.0, backwards: bool = False, style: str = "albef") -> np.ndarray:
    image = apply(Image.fromarray(PIXELS), Operation(name, strength, True), backwards, STYLES[style])
    made = np.asarray(image)
    assert made.shape == PIXELS.shape and made.dtype == np.uint8
    return made.astype(int)


def assert_close(made: np.ndarray, expected: np.ndarray, most: float = 1.0) -> None:
    assert np.abs(made - np.clip(expected, 0, 255)).max() <= most


def test_factors_are_blends_with_what_lacks_the_quality():
    x = PIXELS.astype(float)
    luma = (x @ GREY).round()[..., None]
    for factor, backwards in ((1.36, False), (0.64, False), (1.3, True)):
        f = 2 - factor if backwards else factor
        assert_close(done("brightness", factor, backwards), f * x)
        assert_close(done("contrast", factor, backwards), f * x + (1 - f) * luma.mean().round(), 1.5)
        assert_close(done("colour", factor, backwards), f * x + (1 - f) * luma, 1.5)
        smooth = ndimage.correlate(x, np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]])[..., None] / 13)
        inside = np.s_[1:-1, 1:-1]
        assert_close(done("sharpness", factor, backwards)[inside], (f * x + (1 - f) * smooth)[inside], 1.5)


def test_operations_on_levels():
    x = PIXELS.astype(int)
    assert np.array_equal(done("identity"), x)
    assert np.array_equal(done("invert"), 255 - x)
    assert np.array_equal(done("posterize", 3), x // 32 * 32)
    assert np.array_equal(done("solarize", 76.8), np.where(x < 76.8, x, 255 - x))
    brighter = np.minimum(x + 33, 255)
    assert np.array_equal(done("solarize_add", 33), np.where(brighter < 128, brighter, 255 - brighter))
    low, high = x.min((0, 1)), x.max((0, 1))
    assert_close(done("auto_contrast"), (x - low) * 255 / (high - low))
    equal = done("equalize")
    for channel in range(3):  # a monotone map whose levels are about evenly filled
        order = np.argsort(x[..., channel].ravel(), kind="stable")
        assert (np.diff(equal[..., channel].ravel()[order]) >= 0).all()
        counts = np.histogram(equal[..., channel], 8, (0, 256))[0]
        assert counts.min() > 0.6 * counts.mean() and counts.max() < 1.4 * counts.mean()


@pytest.mark.parametrize("style", ["albef", "vilt", "auto_augment"])
@pytest.mark.parametrize("backwards", [False, True])
def test_geometry_is_a_map_of_coordinates(style: str, backwards: bool):
    fill, order = {"albef": (128, 1), "vilt": (0, 0), "auto_augment": (128, 0)}[style]
    sign = -1 if backwards else 1
    angle = np.deg2rad(21 * sign)
    height, width = PIXELS.shape[:2]
    y, x = np.mgrid[:height, :width] + 0.5
    dx, dy = x - width / 2, y - height / 2
    sources = {
        ("shear_x", 0.21): (x + 0.21 * sign * y, y), ("shear_y", 0.21): (x, y + 0.21 * sign * x),
        ("translate_x", 7): (x + 7 * sign, y), ("translate_y", 30): (x, y + 30 * sign),
        ("rotate", 21): (  # anticlockwise, as seen, where y grows downwards
            dx * np.cos(angle) - dy * np.sin(angle) + width / 2, dx * np.sin(angle) + dy * np.cos(angle) + height / 2
        ),
    }  # fmt: skip
    for (name, strength), (from_x, from_y) in sources.items():
        made = done(name, strength, backwards, style)
        expected = np.stack([
            ndimage.map_coordinates(PIXELS[..., c].astype(float), [from_y - 0.5, from_x - 0.5], order=order,
                                    mode="constant", cval=fill) for c in range(3)
        ], axis=-1)  # fmt: skip
        inside = (from_x > 1) & (from_x < width - 1) & (from_y > 1) & (from_y < height - 1)
        outside = (from_x < -1) | (from_x > width + 1) | (from_y < -1) | (from_y > height + 1)
        difference = np.abs(made - expected)[inside]
        assert np.quantile(difference, 0.97) <= (1.5 if order else 0), name  # which neighbour is nearest may be a tie
        assert outside.any() and (made[outside] == fill).all(), name


def drawn(augmentation: str, count: int) -> Counter:
    found: Counter = Counter()
    for i in range(count):
        for operation, backwards in chain(augmentation, generator(0, "augment", 0, i).random((2, 3))):  # type: ignore[arg-type]
            found[operation.name, round(operation.strength, 6), backwards] += 1
    return found


def test_albef_does_each_of_its_ten_half_the_time():
    found = drawn("albef", 4000)
    published = {  # level 7 of 10: 0.7 * 1.8 + 0.1, 0.7 * 0.3, 0.7 * 10 pixels, 0.7 * 30 degrees
        "identity": 0, "auto_contrast": 0, "equalize": 0, "brightness": 1.36, "sharpness": 1.36,
        "shear_x": 0.21, "shear_y": 0.21, "translate_x": 7, "translate_y": 7, "rotate": 21,
    }  # fmt: skip
    assert {name: strength for name, strength, _ in found} == published
    per_name = [sum(n for (other, _, _), n in found.items() if other == name) for name in published]
    assert stats.chisquare(per_name).pvalue > 1e-3 and stats.binomtest(sum(per_name), 8000, 0.5).pvalue > 1e-3
    both = [(found[name, strength, False], found[name, strength, True]) for name, strength in published.items()]
    for name, (forwards, backwards) in zip(published, both, strict=True):
        moves = name.startswith(("shear", "translate", "rotate"))
        assert stats.binomtest(forwards, forwards + backwards, 0.5).pvalue > 1e-3 if moves else backwards == 0


def test_vilt_always_does_two_of_its_fourteen():
    found = drawn("vilt", 3000)
    share = 9 / 30
    published = {
        "auto_contrast": 0, "equalize": 0, "rotate": 30 * share, "posterize": int(4 * share), "solarize": 256 * share,
        "solarize_add": 110 * share, "colour": 0.1 + 1.8 * share, "contrast": 0.1 + 1.8 * share,
        "brightness": 0.1 + 1.8 * share, "sharpness": 0.1 + 1.8 * share, "shear_x": 0.3 * share,
        "shear_y": 0.3 * share, "translate_x": 100 * share, "translate_y": 100 * share,
    }  # fmt: skip
    assert {name: strength for name, strength, _ in found} == {n: round(v, 6) for n, v in published.items()}
    per_name = [sum(n for (other, _, _), n in found.items() if other == name) for name in published]
    assert sum(per_name) == 6000 and stats.chisquare(per_name).pvalue > 1e-3
    assert not any("invert" in name or "cutout" in name for name, _, _ in found)


TABLE = """
Posterize 0.4 8 Rotate 0.6 9|Solarize 0.6 5 AutoContrast 0.6 -|Equalize 0.8 - Equalize 0.6 -
Posterize 0.6 7 Posterize 0.6 6|Equalize 0.4 - Solarize 0.2 4|Equalize 0.4 - Rotate 0.8 8|Solarize 0.6 3 Equalize 0.6 -
Posterize 0.8 5 Equalize 1.0 -|Rotate 0.2 3 Solarize 0.6 8|Equalize 0.6 - Posterize 0.4 6|Rotate 0.8 8 Color 0.4 0
Rotate 0.4 9 Equalize 0.6 -|Equalize 0.0 - Equalize 0.8 -|Invert 0.6 - Equalize 1.0 -|Color 0.6 4 Contrast 1.0 8
Rotate 0.8 8 Color 1.0 2|Color 0.8 8 Solarize 0.8 7|Sharpness 0.4 7 Invert 0.6 -|ShearX 0.6 5 Equalize 1.0 -
Color 0.4 0 Equalize 0.6 -|Equalize 0.4 - Solarize 0.2 4|Solarize 0.6 5 AutoContrast 0.6 -|Invert 0.6 - Equalize 1.0 -
Color 0.6 4 Contrast 1.0 8|Equalize 0.8 - Equalize 0.6 -
"""
OUR_NAMES = {"AutoContrast": "auto_contrast", "ShearX": "shear_x", "Color": "colour"}
RANGES = {  # ten magnitudes each
    "shear_x": np.linspace(0, 0.3, 10), "rotate": np.linspace(0, 30, 10), "posterize": np.linspace(8, 4, 10).round(),
    "solarize": np.linspace(255, 0, 10), "colour": 1 + np.linspace(0, 0.9, 10),
    "contrast": 1 + np.linspace(0, 0.9, 10), "sharpness": 1 + np.linspace(0, 0.9, 10),
}  # fmt: skip


def test_auto_augment_is_the_table_of_its_paper():
    rows = [row.split() for row in TABLE.replace("\n", "|").split("|") if row]
    assert len(rows) == 25
    for row, ours in zip(rows, IMAGENET, strict=True):
        for (name, probability, magnitude), made in zip((row[:3], row[3:]), of_imagenet(*ours), strict=True):
            assert made.name == OUR_NAMES.get(name, name.lower()) and made.probability == float(probability)
            assert made.either_way == (made.name in ("shear_x", "rotate", "colour", "contrast", "sharpness"))
            if magnitude != "-":
                assert made.strength == pytest.approx(RANGES[made.name][int(magnitude)])
    found = drawn("auto_augment", 5000)
    invert = sum(n for (name, _, _), n in found.items() if name == "invert")
    assert stats.binomtest(invert, 5000, 3 * 0.6 / 25).pvalue > 1e-3


@pytest.mark.parametrize("augmentation", ["albef", "vilt", "auto_augment"])
def test_bytes_in_bytes_out_the_same_every_time(augmentation: str):
    changed = 0
    for i in range(60):
        once, again = (augment(PIXELS, augmentation, generator(1, "augment", 0, i)) for _ in range(2))  # type: ignore[arg-type]
        assert once.dtype == np.uint8 and once.shape == PIXELS.shape and np.array_equal(once, again)
        changed += not np.array_equal(once, PIXELS)
    assert changed > 30


def test_it_follows_the_crop_and_leaves_other_choices_alone():
    config, data = replace(VARIED, augment="albef"), picture(8, "jpg", (120, 90))
    for i in range(12):
        plain = training_image(data, 32, VARIED, streams(3, 0, i))
        augmented = training_image(data, 32, config, streams(3, 0, i))
        expected = augment(plain.transpose(1, 2, 0), "albef", streams(3, 0, i)("augment"))
        assert np.array_equal(augmented, expected.transpose(2, 0, 1))


def test_batches_are_the_same_for_any_world_size(shards: str, tokenizer: str, inputs: InputSpec):
    config = DataConfig(shards, tokenizer, workers=0, lanes=6, image=ImageConfig(augment="vilt"))
    whole = replace(
        inputs, patches=0, kept_patches=0, image_resize="shorter_side", longest_side=40, patch_size=4, partners=True
    )
    for asked in (inputs, whole):
        (a,), (b,) = global_batches(config, asked, 1), global_batches(config, asked, 1, 4)
        assert_same(a, b)
