"""What the report shows rather than counts: some retrievals, and which patches some words matched."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from mmpt.batch import Tokens, unpack
from mmpt.evals.alignment import Span, kept_spans, object_at, patch_grid, tokens_of, word_maps, word_spans
from mmpt.evals.features import select
from mmpt.evals.retrieval import Truth, from_images, from_texts
from mmpt.ops.features import Features
from mmpt.ops.search import Best, search

SHOWN_ANSWERS = 5


@dataclass(frozen=True)
class Retrieval:
    """One query and its best answers, best first, each with whether it is right. Indices into the data set."""

    query: int
    answers: tuple[tuple[int, bool], ...]


@dataclass(frozen=True)
class WordMap:
    """A word of a caption, its map over the patches [grid, grid], and where that is highest."""

    word: str
    heat: Tensor
    row: int
    column: int
    of: int | None
    """The object that the word speaks of, where the data knows."""
    on: int | None
    """The object on which the match landed."""


def evenly(total: int, wanted: int) -> list[int]:
    """`wanted` indices spread evenly over 0 .. total - 1: chosen before any result is known."""
    wanted = min(total, wanted)
    return [(2 * i + 1) * total // (2 * wanted) for i in range(wanted)]


def text_queries(method: Any, image: Features, text: Features, truth: Truth, queries: list[int]) -> list[Retrieval]:
    """For each of these texts, the images that score highest by s_t2i."""
    best = search(from_texts(method), select(text, queries), image, SHOWN_ANSWERS)
    return _judged(best, queries, truth.images_of_text)


def image_queries(method: Any, image: Features, text: Features, truth: Truth, queries: list[int]) -> list[Retrieval]:
    """For each of these images, the texts that score highest by s_i2t."""
    best = search(from_images(method), select(image, queries), text, SHOWN_ANSWERS)
    return _judged(best, queries, truth.texts_of_image)


def _judged(best: Best, queries: list[int], right: list[list[int]]) -> list[Retrieval]:
    answers = zip(queries, best.places.tolist(), strict=True)
    return [Retrieval(query, tuple((place, place in right[query]) for place in places)) for query, places in answers]


def words_on_image(
    image: Tokens, index: int, text: Tokens, place: int, caption: str, spans: list[Span], known: dict
) -> list[WordMap]:
    """The map of every word of a caption over the patches of its image, special tokens left out.

    index, place: of the image and the caption in `image` and `text`; known: the image's metadata, with `objects` and
    `words` for scenes, without for other data.
    """
    patches, tokens = unpack(image)[index].cpu(), unpack(text)[place].cpu()
    spans = kept_spans(spans, len(tokens))
    words = [word for word in word_spans(caption) if tokens_of(word, spans)]
    grid = patch_grid(len(patches))
    speaks_of = {(word["start"], word["end"]): word["object"] for word in known.get("words", [])}
    boxes = [thing["box"] for thing in known.get("objects", [])]
    out = []
    for word, heat in zip(words, word_maps(patches, tokens, spans, words), strict=True):
        best = int(heat.argmax())
        on = object_at(best, grid, known["width"], boxes) if boxes else None
        of = speaks_of.get(word)
        out.append(WordMap(caption[slice(*word)], heat.view(grid, grid), *divmod(best, grid), of, on))
    return out


def veil(heat: Tensor) -> np.ndarray:
    """How dark each patch of a map [grid, grid] is to be shown, uint8: 0 at the highest value, 215 at the lowest."""
    scaled = (heat - heat.min()) / (heat.max() - heat.min()).clamp(min=1e-12)
    return np.rint(215 * (1 - scaled.float().numpy()) ** 0.8).astype(np.uint8)
