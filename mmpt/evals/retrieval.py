"""Image-text retrieval: recall at K both ways, several captions per image, shared by all ranks.

Image-to-text ranks texts by s_i2t, text-to-image ranks images by s_t2i (for FILIP these differ). A query counts as
answered at K when any of its right answers is among the K best; ties by expected value (ranking.py).
"""

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmpt import dist
from mmpt.evals.features import gather_features, in_step, none_of
from mmpt.evals.fused import Shortlist
from mmpt.evals.ranking import chance_hits, expected_hits
from mmpt.ops.features import Features, cut, sequences, values
from mmpt.ops.search import Score

KS = (1, 5, 10)
QUERIES_AT_ONCE = 256
"""Queries scored together; the scores held at any time are this many rows of all answers."""
ANSWERS_AT_ONCE = 1024


class Pairs(NamedTuple):
    """One rank's share of a data set, encoded. Images are numbered over all ranks, in rank order.

    image:  features of A images.
    text:   features of C texts.
    owner:  [C] for each text, the place of its image among this rank's images.
    says:   [C] what each text says; texts that say the same are right for each other's images.
    """

    image: Features
    text: Features
    owner: list[int]
    says: list[Hashable]


class Truth(NamedTuple):
    """What is right over all ranks: texts of each image, images of each text, as indices in rank order."""

    texts_of_image: list[list[int]]
    images_of_text: list[list[int]]


def find_truth(images: int, owner: Sequence[int], says: Sequence[Hashable]) -> Truth:
    """Text t is right for image i when some text that describes i says what t says (t itself, to begin with)."""
    texts_saying, images_saying = defaultdict(list), defaultdict(set)
    said_of_image: list[set[Hashable]] = [set() for _ in range(images)]
    for text, (image, said) in enumerate(zip(owner, says, strict=True)):
        texts_saying[said].append(text)
        images_saying[said].add(image)
        said_of_image[image].add(said)
    return Truth(
        [sorted(text for said in saids for text in texts_saying[said]) for saids in said_of_image],
        [sorted(images_saying[said]) for said in says],
    )


@torch.no_grad()
def retrieval(method: Any, pairs: Pairs) -> Iterator[tuple[str, float]]:
    """Yield (name, value in [0, 1]): R@1, R@5, R@10 both ways, each with its chance; the same on all ranks. Collective.

    method: has `score(image_features, text_features) -> (s_i2t [A, C], s_t2i [A, C])`; all ranks call it equally often.
    Memory: the other side's features of the whole data set, and QUERIES_AT_ONCE rows of scores. ValueError for an image
    without a text.
    """
    truth, own_images, own_texts = truth_over_ranks(pairs)
    i2t = _hits(from_images(method), pairs.image, gather_features(pairs.text), truth.texts_of_image[own_images])
    t2i = _hits(from_texts(method), pairs.text, gather_features(pairs.image), truth.images_of_text[own_texts])
    yield from _recalls(i2t, t2i, truth, values(pairs.image).device)


@torch.no_grad()
def reranked(shortlist: Shortlist, pairs: Pairs, vectors: tuple[Tensor, Tensor]) -> Iterator[tuple[str, float]]:
    """As `retrieval`, of answers ranked by vectors ([A, E] of our images, [C, E] of our texts) and then again by the
    fused model. Collective."""
    truth, own_images, own_texts = truth_over_ranks(pairs)
    image, text = (gather_features(vector) for vector in vectors)
    assert isinstance(image, Tensor) and isinstance(text, Tensor)
    hits = []
    for queries, answers, own, theirs, right in (
        (pairs.image, pairs.text, vectors[0], text, truth.texts_of_image[own_images]),
        (pairs.text, pairs.image, vectors[1], image, truth.images_of_text[own_texts]),
    ):
        everything, total = gather_features(answers), torch.zeros(len(KS), dtype=torch.float64)
        for item in in_step(cut(queries, QUERIES_AT_ONCE), values(queries).device):
            chunk, places = (none_of(queries), slice(0, 0)) if item is None else item[:2]
            scores = shortlist.scores(chunk, everything, (own[places], theirs), queries is pairs.image)
            total += expected_hits(scores, right[places], KS).sum(0).cpu()
        hits.append(total)
    yield from _recalls(hits[0], hits[1], truth, values(pairs.image).device)


def truth_over_ranks(pairs: Pairs) -> tuple[Truth, slice, slice]:
    """What is right, and where our images and our texts lie among those of all ranks. Collective.

    ValueError for an image without a text.
    """
    shares = dist.gather_objects((sequences(pairs.image), pairs.owner, pairs.says))
    first_image = [sum(share[0] for share in shares[:r]) for r in range(len(shares))]
    first_text = [sum(len(share[1]) for share in shares[:r]) for r in range(len(shares))]
    owner = [image + first for (_, owners, _), first in zip(shares, first_image) for image in owners]
    truth = find_truth(sum(share[0] for share in shares), owner, [said for share in shares for said in share[2]])
    if not all(truth.texts_of_image):
        raise ValueError("an image without a text cannot be part of a retrieval test")
    image, text = first_image[dist.rank()], first_text[dist.rank()]
    return truth, slice(image, image + sequences(pairs.image)), slice(text, text + sequences(pairs.text))


def _recalls(i2t: Tensor, t2i: Tensor, truth: Truth, device: torch.device | str) -> Iterator[tuple[str, float]]:
    images, texts = len(truth.texts_of_image), len(truth.images_of_text)
    hits = dist.sum_over_ranks(torch.stack([i2t, t2i]).to(device)).cpu() / torch.tensor([[images], [texts]])
    yield from _named("image_to_text", hits[0], chance_hits(truth.texts_of_image, texts, KS))
    yield from _named("text_to_image", hits[1], chance_hits(truth.images_of_text, images, KS))


def _named(direction: str, recall: Tensor, chance: Tensor) -> Iterator[tuple[str, float]]:
    for k, value, by_chance in zip(KS, recall.tolist(), chance.mean(0).tolist()):
        yield f"{direction}_R@{k}", value
        yield f"{direction}_R@{k}_chance", by_chance


def from_images(method: Any) -> Score:
    """s_i2t of images as queries and texts as answers."""
    return lambda images, texts: method.score(images, texts)[0]


def from_texts(method: Any) -> Score:
    """s_t2i of texts as queries and images as answers."""
    return lambda texts, images: method.score(images, texts)[1].T


def _hits(score: Score, queries: Features, answers: Features, right: list[list[int]]) -> Tensor:
    """[len(KS)] float64: hits summed over our queries, of which `right` holds the right answers, one list each."""
    total = torch.zeros(len(KS), dtype=torch.float64)
    for item in in_step(cut(queries, QUERIES_AT_ONCE), values(queries).device):
        chunk, places = (none_of(queries), slice(0, 0)) if item is None else item[:2]
        scores = torch.cat([score(chunk, part) for part, _, _ in cut(answers, ANSWERS_AT_ONCE)], 1)  # [Q, C]
        total += expected_hits(scores, right[places], KS).sum(0).cpu()
    return total
