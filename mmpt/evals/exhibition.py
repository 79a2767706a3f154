"""What is shown of one data set: its pictures, some retrievals and some word maps, by a page or by TensorBoard."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmpt.batch import Tokens, to_device
from mmpt.evals.exhibits import Retrieval, WordMap, evenly, image_queries, text_queries, words_on_image
from mmpt.evals.features import join
from mmpt.evals.fused import PairScorer, scorer_of
from mmpt.evals.retrieval import Truth, find_truth
from mmpt.evals.suite import Rank, caption_list, what_is_said
from mmpt.ops.features import Features


@dataclass(frozen=True)
class Exhibition:
    """The first A images of a data set and what was found among them.

    pixels: [A, 3, S, S] uint8. words: an image's place, the caption and its words' maps; empty for methods that score
    no word with a patch.
    """

    pixels: Tensor
    known: list[dict]
    captions: list[str]
    truth: Truth
    by_text: list[Retrieval]
    by_image: list[Retrieval]
    words: list[tuple[int, str, list[WordMap]]]


@torch.no_grad()
def exhibit(rank: Rank, method: Any, folder: str, images: int, queries: int) -> Exhibition:
    """Of `images` images or a few more, with evenly spaced queries, chosen before their results are known."""
    pixels, features, known = _first_images(rank, folder, images)
    method = scorer_of(method, rank.call)
    owner, captions = caption_list(known)
    text = rank.encode_texts(captions)
    truth = find_truth(len(known), owner, what_is_said(known, rank.config))
    by_text = text_queries(method, features, text, truth, evenly(len(captions), queries))
    by_image = image_queries(method, features, text, truth, evenly(len(known), queries))
    words = []
    if isinstance(features, Tokens) and isinstance(text, Tokens) and not isinstance(method, PairScorer):
        for query in evenly(len(known), queries):
            place, caption = owner.index(query), captions[owner.index(query)]
            maps = words_on_image(features, query, text, place, caption, rank.spans(caption), known[query])
            words.append((query, caption, maps))
    return Exhibition(pixels, known, captions, truth, by_text, by_image, words)


def _first_images(rank: Rank, folder: str, images: int) -> tuple[Tensor, Features, list[dict]]:
    """Pixels and features of the first `images` or a few more, and what is known of each."""
    pixels, features, known = [], [], []
    for (batch, samples), (seen, _) in zip(rank.batches(folder), rank.pixels(folder), strict=True):
        pixels.append(seen)
        features.append(rank.call("encode_image", to_device(batch.pictures, rank.device)))
        known += samples
        if len(known) >= images:
            break
    return torch.cat(pixels), join(features), known
