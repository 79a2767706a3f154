"""Random chains of simple operations on a picture, as published with ALBEF, with ViLT, and for ImageNet.

    albef         RandAugment (Cubuk et al. 2020) of 2 operations at strength 7 of 10, each done half the time; none of
                  them changes colours (Li et al. 2021). What is uncovered becomes grey, values between are bilinear.
    vilt          RandAugment of 2 operations at strength 9 of 30, without inversion and cutout (Kim et al. 2021).
                  Black, nearest. ViLT's code does it before it resizes the picture, here it is done after: its shifts
                  by 30 pixels are then pixels of the result.
    auto_augment  AutoAugment's policy for ImageNet (Cubuk et al. 2019, table 9), which FILIP uses (Yao et al. 2022).
                  Grey, nearest. Of magnitude 0 a factor is 1, as torchvision reads the table.

Strengths are those of the published code where the papers leave them open.
"""

from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageEnhance, ImageOps

Augmentation = Literal["none", "albef", "vilt", "auto_augment"]
Colour = tuple[int, int, int]
GREY, BLACK = (128, 128, 128), (0, 0, 0)
STEPS = 2


class Operation(NamedTuple):
    """strength: a factor (brightness, contrast, colour, sharpness), a share of the other coordinate (shear), pixels
    (translate), degrees (rotate), bits (posterize), levels (solarize, solarize_add). either_way: its sign is drawn,
    or, of a factor, that of its distance from 1."""

    name: str
    strength: float = 0.0
    either_way: bool = False
    probability: float = 1.0


class Style(NamedTuple):
    """How a geometric operation fills what it uncovers, and how it finds values between pixels."""

    fill: Colour
    resample: Image.Resampling


STYLES = {
    "albef": Style(GREY, Image.Resampling.BILINEAR),
    "vilt": Style(BLACK, Image.Resampling.NEAREST),
    "auto_augment": Style(GREY, Image.Resampling.NEAREST),
}
ALBEF = tuple(
    Operation(name, strength, either_way, 0.5)
    for name, strength, either_way in (
        ("identity", 0, False), ("auto_contrast", 0, False), ("equalize", 0, False), ("brightness", 1.36, False),
        ("sharpness", 1.36, False), ("shear_x", 0.21, True), ("shear_y", 0.21, True), ("translate_x", 7, True),
        ("translate_y", 7, True), ("rotate", 21, True),
    )
)  # fmt: skip
VILT = (
    Operation("auto_contrast"), Operation("equalize"), Operation("rotate", 9, True), Operation("posterize", 1),
    Operation("solarize", 76.8), Operation("solarize_add", 33), Operation("colour", 0.64), Operation("contrast", 0.64),
    Operation("brightness", 0.64), Operation("sharpness", 0.64), Operation("shear_x", 0.09, True),
    Operation("shear_y", 0.09, True), Operation("translate_x", 30, True), Operation("translate_y", 30, True),
)  # fmt: skip

# Table 9, row by row: (operation, probability in tenths, magnitude from 0 to 9 where it has one), twice.
IMAGENET = (
    ("posterize", 4, 8, "rotate", 6, 9), ("solarize", 6, 5, "auto_contrast", 6, 0),
    ("equalize", 8, 0, "equalize", 6, 0), ("posterize", 6, 7, "posterize", 6, 6), ("equalize", 4, 0, "solarize", 2, 4),
    ("equalize", 4, 0, "rotate", 8, 8), ("solarize", 6, 3, "equalize", 6, 0), ("posterize", 8, 5, "equalize", 10, 0),
    ("rotate", 2, 3, "solarize", 6, 8), ("equalize", 6, 0, "posterize", 4, 6), ("rotate", 8, 8, "colour", 4, 0),
    ("rotate", 4, 9, "equalize", 6, 0), ("equalize", 0, 0, "equalize", 8, 0), ("invert", 6, 0, "equalize", 10, 0),
    ("colour", 6, 4, "contrast", 10, 8), ("rotate", 8, 8, "colour", 10, 2), ("colour", 8, 8, "solarize", 8, 7),
    ("sharpness", 4, 7, "invert", 6, 0), ("shear_x", 6, 5, "equalize", 10, 0), ("colour", 4, 0, "equalize", 6, 0),
    ("equalize", 4, 0, "solarize", 2, 4), ("solarize", 6, 5, "auto_contrast", 6, 0),
    ("invert", 6, 0, "equalize", 10, 0), ("colour", 6, 4, "contrast", 10, 8), ("equalize", 8, 0, "equalize", 6, 0),
)  # fmt: skip


def augment(pixels: np.ndarray, augmentation: Augmentation, random: np.random.Generator) -> np.ndarray:
    """Pixels [H, W, 3] uint8 after the chain that is drawn. Draws the same count of random numbers every time."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    style = STYLES[augmentation]
    for operation, backwards in chain(augmentation, random.random((STEPS, 3))):
        image = apply(image, operation, backwards, style)
    return np.asarray(image)


def chain(augmentation: Augmentation, draws: np.ndarray) -> list[tuple[Operation, bool]]:
    """The operations that are done, one after another, and whether each goes the other way.

    draws: [2, 3], uniform in [0, 1): which, whether, which way. AutoAugment draws a pair of operations by the first.
    """
    if augmentation == "auto_augment":
        chosen = list(of_imagenet(*IMAGENET[int(draws[0, 0] * len(IMAGENET))]))
    else:
        operations = ALBEF if augmentation == "albef" else VILT
        chosen = [operations[int(draw * len(operations))] for draw in draws[:, 0]]
    return [
        (operation, operation.either_way and bool(way < 0.5))
        for operation, (_, whether, way) in zip(chosen, draws.tolist(), strict=True)
        if whether < operation.probability
    ]


def of_imagenet(*row: str | int) -> tuple[Operation, Operation]:
    """A row of the table. The ten magnitudes of an operation lie evenly on its range: 0 to 0.3 (shear) and 30 degrees,
    8 to 4 bits, 255 to 0 (solarize), and 1 to 1.9 or, the other way, 0.1 (factors)."""
    made = []
    for name, tenths, magnitude in (row[:3], row[3:]):
        share = int(magnitude) / 9
        strength, either_way = {
            "shear_x": (0.3 * share, True), "rotate": (30 * share, True), "posterize": (8 - round(4 * share), False),
            "solarize": (255 * (1 - share), False), "colour": (1 + 0.9 * share, True),
            "contrast": (1 + 0.9 * share, True), "sharpness": (1 + 0.9 * share, True),
        }.get(str(name), (0.0, False))  # fmt: skip
        made.append(Operation(str(name), strength, either_way, int(tenths) / 10))
    return made[0], made[1]


def apply(image: Image.Image, operation: Operation, backwards: bool, style: Style) -> Image.Image:
    """One operation on an RGB image."""
    name, strength = operation.name, operation.strength
    if name in ("brightness", "contrast", "colour", "sharpness"):
        enhancers = {
            "brightness": ImageEnhance.Brightness, "contrast": ImageEnhance.Contrast, "colour": ImageEnhance.Color,
            "sharpness": ImageEnhance.Sharpness,
        }  # fmt: skip
        return enhancers[name](image).enhance(2 - strength if backwards else strength)
    if name in ("shear_x", "shear_y", "translate_x", "translate_y", "rotate"):
        return _moved(image, name, -strength if backwards else strength, style)
    if name == "posterize":
        return ImageOps.posterize(image, int(strength))
    if name == "solarize":
        return ImageOps.solarize(image, strength)  # type: ignore[arg-type]  # it compares levels with it
    if name == "solarize_add":
        return ImageOps.solarize(ImageChops.add(image, Image.new("RGB", image.size, (int(strength),) * 3)), 128)
    whole = {"auto_contrast": ImageOps.autocontrast, "equalize": ImageOps.equalize, "invert": ImageOps.invert}
    return whole[name](image) if name != "identity" else image


def _moved(image: Image.Image, name: str, by: float, style: Style) -> Image.Image:
    if name == "rotate":
        return image.rotate(by, style.resample, fillcolor=style.fill)
    source = {  # where pixel (x, y) of the result comes from: (a x + b y + c, d x + e y + f)
        "shear_x": (1, by, 0, 0, 1, 0), "shear_y": (1, 0, 0, by, 1, 0),
        "translate_x": (1, 0, by, 0, 1, 0), "translate_y": (1, 0, 0, 0, 1, by),
    }  # fmt: skip
    return image.transform(image.size, Image.Transform.AFFINE, source[name], style.resample, fillcolor=style.fill)
