"""What the report shows rather than counts: some retrievals, and which patches some words matched."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmpt.batch import Tokens, unpack
from mmpt.evals.alignment import Span, kept_spans, object_at, patch_grid, tokens_of, word_maps, word_spans
from mmpt.evals.features import Features, slices
from mmpt.evals.retrieval import Truth

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


@torch.no_grad()
def text_queries(method: Any, image: Features, text: Features, truth: Truth, queries: Sequence[int]) -> list[Retrieval]:
    """For each of these texts, the images that score highest by s_t2i."""
    found = []
    chosen = [list(slices(text, 1))[query] for query in queries]
    for query, one in zip(queries, chosen, strict=True):
        scores = torch.cat([method.score(part, one)[1][:, 0] for part in slices(image, 256)])
        best = scores.topk(min(SHOWN_ANSWERS, len(scores))).indices.tolist()
        found.append(Retrieval(query, tuple((i, i in truth.images_of_text[query]) for i in best)))
    return found


@torch.no_grad()
def image_queries(
    method: Any, image: Features, text: Features, truth: Truth, queries: Sequence[int]
) -> list[Retrieval]:
    """For each of these images, the texts that score highest by s_i2t."""
    found = []
    chosen = [list(slices(image, 1))[query] for query in queries]
    for query, one in zip(queries, chosen, strict=True):
        scores = torch.cat([method.score(one, part)[0][0] for part in slices(text, 256)])
        best = scores.topk(min(SHOWN_ANSWERS, len(scores))).indices.tolist()
        found.append(Retrieval(query, tuple((t, t in truth.texts_of_image[query]) for t in best)))
    return found


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
