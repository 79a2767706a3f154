"""Pictures for TensorBoard after an evaluation: what some queries found, and which patches some words matched."""

import textwrap
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from mmpt import dist
from mmpt.data.loader import DataConfig
from mmpt.data.text import load_tokenizer
from mmpt.evals.exhibition import Exhibition, exhibit
from mmpt.evals.exhibits import WordMap, veil
from mmpt.evals.features import Call
from mmpt.evals.suite import EvalConfig, Rank, prefix
from mmpt.inputs import InputSpec

SEARCHED_IMAGES, SHOWN_QUERIES = 64, 4
SIDE, GAP, TEXT_HEIGHT = 96, 6, 30
"""Pixels: of a picture, between pictures, and of two lines of text."""
CAPTION_WIDTH = 420
CELLS = 8
"""Pictures side by side in a word map."""
INK, RIGHT, PAPER = (30, 30, 30), (0, 140, 60), (255, 255, 255)


@torch.no_grad()
def boards(
    config: EvalConfig, data: DataConfig, inputs: InputSpec, call: Call, method: Any, device: torch.device | str
) -> dict[str, np.ndarray]:
    """Pictures by name, [H, W, 3] uint8, of each folder of `config.retrieval`; on rank 0, nothing on the others.

    Every rank encodes the same few images, so that sharded parameters are gathered by all. Collective. Nothing for
    methods that see regions: their shards need not hold pictures.
    """
    out: dict[str, np.ndarray] = {}
    if not config.retrieval or inputs.regions is not None:
        return out
    few = replace(config, batch=min(config.batch, SEARCHED_IMAGES))
    rank = Rank(few, replace(data, workers=0), inputs, call, device, load_tokenizer(data.tokenizer), alone=True)
    for folder in config.retrieval:
        found = exhibit(rank, method, folder, SEARCHED_IMAGES, SHOWN_QUERIES)
        if dist.rank() == 0:
            name = prefix(folder)
            out[f"{name}caption_to_image"] = caption_to_image(found)
            out[f"{name}image_to_caption"] = image_to_caption(found)
            if found.words:
                out[f"{name}words_on_patches"] = words_on_patches(found)
    return out


def caption_to_image(found: Exhibition) -> np.ndarray:
    """A row per caption: the images it found, best first, the right ones framed in green."""
    rows = []
    for query in found.by_text:
        row, draw = _row(len(query.answers) * (SIDE + GAP), SIDE + TEXT_HEIGHT + GAP)
        _write(draw, 0, found.captions[query.query], row.width, INK)
        for i, (image, right) in enumerate(query.answers):
            row.paste(_picture(found.pixels[image], right), (i * (SIDE + GAP), TEXT_HEIGHT))
        rows.append(row)
    return _stacked(rows)


def image_to_caption(found: Exhibition) -> np.ndarray:
    """A row per image: the captions it found, best first, the right ones in green."""
    rows = []
    for query in found.by_image:
        row, draw = _row(SIDE + GAP + CAPTION_WIDTH, max(SIDE, TEXT_HEIGHT * len(query.answers)) + GAP)
        row.paste(_picture(found.pixels[query.query], False), (0, 0))
        for i, (text, right) in enumerate(query.answers):
            said = f"{i + 1}. {found.captions[text]}"
            _write(draw, i * TEXT_HEIGHT, said, CAPTION_WIDTH, RIGHT if right else INK, SIDE + GAP)
        rows.append(row)
    return _stacked(rows)


def words_on_patches(found: Exhibition) -> np.ndarray:
    """A row per image: itself, then for each word of its caption the image, lit where the word's map is high."""
    rows = []
    for image, caption, words in found.words:
        cells = [("", _picture(found.pixels[image], False)), *_lit(found.pixels[image], words)]
        title, draw = _row(CELLS * (SIDE + GAP), TEXT_HEIGHT)
        _write(draw, 0, caption, title.width, INK)
        rows.append(title)
        for first in range(0, len(cells), CELLS):
            row, draw = _row(CELLS * (SIDE + GAP), SIDE + TEXT_HEIGHT)
            for i, (word, picture) in enumerate(cells[first : first + CELLS]):
                row.paste(picture, (i * (SIDE + GAP), 0))
                _write(draw, SIDE, word, SIDE, INK, i * (SIDE + GAP))
            rows.append(row)
    return _stacked(rows)


def _lit(image: Tensor, words: list[WordMap]) -> Iterator[tuple[str, Image.Image]]:
    for word in words:
        shade = Image.fromarray(veil(word.heat)).resize((SIDE, SIDE), Image.Resampling.NEAREST)
        yield word.word, Image.composite(Image.new("RGB", (SIDE, SIDE)), _picture(image, False), shade)


def _row(width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    row = Image.new("RGB", (width, height), PAPER)
    return row, ImageDraw.Draw(row)


def _write(draw: ImageDraw.ImageDraw, top: int, text: str, width: int, colour: tuple[int, int, int], left: int = 0):
    """At most two lines; what does not fit is cut."""
    lines = textwrap.wrap(text, max(8, width // 6), max_lines=2, placeholder=" ...")
    draw.text((left + 2, top + 2), "\n".join(lines), colour, font_size=11)


def _picture(image: Tensor, right: bool) -> Image.Image:
    picture = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy())).resize((SIDE, SIDE))
    if right:
        ImageDraw.Draw(picture).rectangle((0, 0, SIDE - 1, SIDE - 1), outline=RIGHT, width=4)
    return picture


def _stacked(rows: list[Image.Image]) -> np.ndarray:
    """Rows one below the other, filled up with paper to the widest."""
    width = max(row.width for row in rows)
    arrays = [np.asarray(row) for row in rows]
    padded = [np.pad(a, ((0, 0), (0, width - a.shape[1]), (0, 0)), constant_values=255) for a in arrays]
    return np.concatenate(padded)
