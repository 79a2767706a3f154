"""What is drawn for SLIP's extra views: crops are made here, colours are changed later, on the accelerator."""

from dataclasses import dataclass

import numpy as np

from mmpt.data.randomness import Random
from mmpt.ops.augment import (
    BLUR_SIGMA,
    BRIGHTNESS,
    CONTRAST,
    FLIP,
    GRAYSCALE,
    HUE,
    LARGEST_SIGMA,
    ORDER,
    ORDERS,
    PARAMETERS,
    SATURATION,
)


@dataclass(frozen=True)
class ViewConfig:
    """How the extra views of an image vary, for methods that want some; as SLIP published it, after MoCo v2."""

    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Least and greatest share of the image's area that a view covers."""
    jitter_probability: float = 0.8
    """Share of views whose brightness, contrast, saturation and hue are changed, in random order."""
    brightness: float = 0.4
    """The factor lies within 1 - this and 1 + this."""
    contrast: float = 0.4
    """The factor lies within 1 - this and 1 + this."""
    saturation: float = 0.4
    """The factor lies within 1 - this and 1 + this."""
    hue: float = 0.1
    """The hue turns by at most this share of the circle, either way."""
    grayscale_probability: float = 0.2
    """Share of views without colour."""
    blur_probability: float = 0.5
    """Share of views that are blurred."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Least and greatest standard deviation of the blur, in pixels."""
    flip_probability: float = 0.5
    """Share of views mirrored left to right."""

    def __post_init__(self):
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale of views wants 0 < least <= greatest <= 1, got {self.crop_scale}")
        if not 0 < self.blur_sigma[0] <= self.blur_sigma[1] <= LARGEST_SIGMA:
            raise ValueError(f"blur_sigma wants 0 < least <= greatest <= {LARGEST_SIGMA:.2f}, got {self.blur_sigma}")
        for name in ("brightness", "contrast", "saturation", "jitter_probability", "grayscale_probability",
                     "blur_probability", "flip_probability"):  # fmt: skip
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} of views must be between 0 and 1, got {getattr(self, name)}")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"hue of views must be between 0 and 0.5, got {self.hue}")


def draw_views(config: ViewConfig, random: Random, views: int) -> np.ndarray:
    """A row of parameters for each view, [V, 8] fp32: what `mmpt.ops.augment.augment` will do to it.

    random: gives the stream for a purpose; the view's number is part of the purpose.
    """
    rows = [_draw_view(config, random(f"view {view} colours").random(10)) for view in range(views)]
    return np.array(rows, dtype=np.float32).reshape(views, PARAMETERS)


def _draw_view(config: ViewConfig, draws: np.ndarray) -> np.ndarray:
    row = np.zeros(PARAMETERS, dtype=np.float32)
    row[[BRIGHTNESS, CONTRAST, SATURATION]] = 1
    row[ORDER] = -1
    if draws[0] < config.jitter_probability:
        spread = np.array([config.brightness, config.contrast, config.saturation])
        row[[BRIGHTNESS, CONTRAST, SATURATION]] = 1 + spread * (2 * draws[1:4] - 1)
        row[HUE] = config.hue * (2 * draws[4] - 1)
        row[ORDER] = int(draws[5] * len(ORDERS))
    row[GRAYSCALE] = draws[6] < config.grayscale_probability
    if draws[7] < config.blur_probability:
        row[BLUR_SIGMA] = config.blur_sigma[0] + draws[8] * (config.blur_sigma[1] - config.blur_sigma[0])
    row[FLIP] = draws[9] < config.flip_probability
    return row
