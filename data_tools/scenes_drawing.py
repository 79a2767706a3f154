"""Draw a scene: antialiased shapes on a shaded, noisy background."""

import numpy as np
from PIL import Image, ImageDraw

from data_tools.scenes_world import COLOURS, SceneObject

OVERSAMPLING = 4  # shapes are drawn this many times larger, then averaged down
Box = tuple[int, int, int, int]


def draw_scene(
    rng: np.random.Generator, things: tuple[SceneObject, ...], image_size: int
) -> tuple[np.ndarray, list[Box]]:
    """The image, [image_size, image_size, 3] uint8, and the tight box of each object's pixels.

    A box is (left, top, right, bottom) in pixels, right and bottom exclusive; it holds every pixel that the object
    covers in part or whole.
    """
    image = _background(rng, image_size)
    boxes = []
    for thing in things:
        cover = coverage(thing, image_size)
        image += cover[:, :, None] * (_paint(rng, thing.colour) - image)
        boxes.append(_tight_box(cover))
    image += rng.normal(0.0, 5.0, (image_size, image_size, 1)) + rng.normal(0.0, 2.0, image.shape)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8), boxes


def coverage(thing: SceneObject, image_size: int) -> np.ndarray:
    """[image_size, image_size] float32, the share of each pixel that the object covers."""
    large = image_size * OVERSAMPLING
    mask = Image.new("L", (large, large))
    canvas = ImageDraw.Draw(mask)
    for points, ink in _outlines(thing):
        # Points in [-1, 1] fill the object's square; -1 makes the last pixel of a polygon fall inside it.
        corners = (points + 1) / 2 * (thing.side * large - 1) + np.array([thing.x, thing.y]) * large
        canvas.polygon([(float(x), float(y)) for x, y in corners], fill=ink)
    return np.asarray(mask.reduce(OVERSAMPLING), np.float32) / 255.0


def _outlines(thing: SceneObject) -> list[tuple[np.ndarray, int]]:
    """Polygons with points in [-1, 1] (y downwards), each filled with ink 255 or cut out with 0."""
    around = np.linspace(0.0, 2 * np.pi, 64, endpoint=False)
    disc = np.stack([np.cos(around), np.sin(around)], 1)
    if thing.shape == "circle":
        return [(disc, 255)]
    if thing.shape == "ring":
        return [(disc, 255), (disc * 0.52, 0)]
    corners = {"square": _square, "triangle": _triangle, "star": _star, "cross": _cross}[thing.shape]()
    turn = np.deg2rad(thing.turn_degrees)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    turned = corners @ rotation.T
    return [(turned / np.abs(turned).max(), 255)]


def _square() -> np.ndarray:
    return np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], float)


def _triangle() -> np.ndarray:
    return np.array([[0, -1], [1, 0.85], [-1, 0.85]], float)


def _star() -> np.ndarray:
    angle = -np.pi / 2 + np.arange(10) * np.pi / 5
    radius = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)


def _cross() -> np.ndarray:
    arm = np.array([[-0.32, -1], [0.32, -1], [0.32, -0.32]], float)
    turns = [np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]) for a in np.arange(4) * np.pi / 2]
    return np.concatenate([arm @ turn.T for turn in turns])


def _paint(rng: np.random.Generator, colour: str) -> np.ndarray:
    return np.array(COLOURS[colour]) * rng.uniform(0.85, 1.05) + rng.normal(0.0, 6.0, 3)


def _background(rng: np.random.Generator, image_size: int) -> np.ndarray:
    """[image_size, image_size, 3]: a grey of random lightness and slight tint, with a linear shade across it."""
    base = rng.uniform(60.0, 190.0) + rng.normal(0.0, 5.0, 3)
    direction, depth = rng.uniform(0.0, 2 * np.pi), rng.uniform(0.0, 40.0)
    ramp = np.linspace(-0.5, 0.5, image_size)
    shade = depth * (np.cos(direction) * ramp[None, :] + np.sin(direction) * ramp[:, None])
    return base + shade[:, :, None]


def _tight_box(cover: np.ndarray) -> Box:
    rows, columns = np.flatnonzero(cover.any(1)), np.flatnonzero(cover.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
