"""Which patch each word of a caption matches, from a late-interaction model's token features.

A word's map is the mean, over its subword tokens, of the cosine with each patch; its match is the patch where the map
is highest. Special tokens belong to no word and are left out. A match lands on an object when the centre of the patch
lies in the object's box.
"""

from collections.abc import Sequence
from math import isqrt
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

Span = tuple[int, int]
Box = Sequence[float]
"""Left, top, right, bottom, right and bottom exclusive."""


def token_spans(tokenizer: Any, text: str, max_text_tokens: int) -> list[Span]:
    """The characters [start, end) of the text that each token id stands for, without blanks; (0, 0) for a special one.

    ValueError when the tokenizer cannot tell (transformers' tokenizers without the `tokenizers` library cannot).
    """
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer {tokenizer.name_or_path!r} does not know which characters a token stands for")
    found = tokenizer(text, truncation=True, max_length=max_text_tokens, return_offsets_mapping=True)["offset_mapping"]
    return [_without_blanks(text, start, end) for start, end in found]


def _without_blanks(text: str, start: int, end: int) -> Span:
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    return (start, end) if start < end else (0, 0)


def word_spans(text: str) -> list[Span]:
    """The words of a text, parted by blanks, without the punctuation around them."""
    spans, start = [], 0
    for word in text.split():
        start = text.index(word, start)
        bare = word.strip(".,;:!?\"'()")
        if bare:
            first = start + word.index(bare)
            spans.append((first, first + len(bare)))
        start += len(word)
    return spans


def tokens_of(word: Span, spans: Sequence[Span]) -> list[int]:
    """Places of the tokens that share a character with the word; none when the word was cut off."""
    return [i for i, (start, end) in enumerate(spans) if start < word[1] and word[0] < end]


def kept_spans(spans: list[Span], features: int) -> list[Span]:
    """The spans of the tokens that a text's features stand for: all, or all but the special ones.

    ValueError when the number of features is neither, as for a method with one vector per text.
    """
    if len(spans) == features:
        return spans
    words = [span for span in spans if span != (0, 0)]
    if len(words) == features:
        return words
    raise ValueError(f"a text of {len(spans)} tokens, {len(words)} without special ones, has {features} features")


def word_maps(image: Tensor, text: Tensor, spans: Sequence[Span], words: Sequence[Span]) -> Tensor:
    """[len(words), P] float32, each word's mean cosine with each patch; not a number for a word that was cut off.

    image [P, D], text [L, D]: features of one image and one text; spans: what each of the L tokens stands for.
    """
    cosines = normalize(text.float(), dim=-1) @ normalize(image.float(), dim=-1).T  # [L, P]
    return torch.stack([cosines[tokens_of(word, spans)].mean(0) for word in words])


def patch_grid(patches: int) -> int:
    """Patches along a side. ValueError when they do not make a square."""
    side = isqrt(patches)
    if side * side != patches:
        raise ValueError(f"{patches} image tokens are not a square of patches; drop other tokens and keep every patch")
    return side


def grid_centres(rows: int, columns: int) -> Tensor:
    """[rows * columns, 2], the centre (x, y) of each place of a grid, row by row, as shares of the image's sides."""
    y, x = torch.meshgrid((torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], 1)


def object_at(patch: int, grid: int, image_size: float, boxes: Sequence[Box]) -> int | None:
    """The object whose box holds the centre of this patch of a square image, or None. Boxes do not overlap."""
    row, column = divmod(patch, grid)
    return object_around((column + 0.5) * image_size / grid, (row + 0.5) * image_size / grid, boxes)


def object_around(x: float, y: float, boxes: Sequence[Box]) -> int | None:
    """The object whose box holds this point, in the units of the boxes, or None."""
    return next(
        (i for i, (left, top, right, bottom) in enumerate(boxes) if left <= x < right and top <= y < bottom), None
    )


def area_shares(boxes: Sequence[Box]) -> list[float]:
    """Each box's share of the area of all boxes."""
    areas = [(right - left) * (bottom - top) for left, top, right, bottom in boxes]
    return [area / sum(areas) for area in areas]
