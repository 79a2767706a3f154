"""What a momentum copy believes: its words for a masked word, and its texts for an image.

These are the soft targets of momentum distillation, as ALBEF shows them (Li et al. 2021, figures 2 and 3): answers that
fit the image though the caption has another.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mmpt.batch import Batch, pack, to_device
from mmpt.evals.suite import Rank, caption_list
from mmpt.methods.albef import ALBEF
from mmpt.ops.packing import take
from mmpt.ops.similarity import similarity

GALLERY = 256
"""Samples among which texts are looked for, the first ones."""


@dataclass(frozen=True)
class Believed:
    """answers: (text, probability), likeliest first; of: the word that was masked, or the image's key; own: its place
    among all answers, from 1."""

    caption: str
    of: str
    own: int
    answers: tuple[tuple[str, float], ...]


@torch.no_grad()
def believed_words(rank: Rank, method: ALBEF, folder: str, samples: int, top: int) -> Iterator[Believed]:
    """For each token of the first captions but the special ones: what the copy says when it is masked."""
    for batch, known in _first(rank, folder, samples):
        with method.teaching() as copy:
            images = copy.image(to_device(batch.pictures, rank.device))
            for i, sample in enumerate(known):
                ids = batch.part(i, i + 1).text.x.to(rank.device)
                masked = ids.repeat(len(ids) - 2, 1)  # [L - 2, L]
                places = torch.arange(1, len(ids) - 1, device=ids.device)
                masked[places - 1, places] = rank.tokenizer.mask_token_id
                texts = pack(list(masked))
                image = take(images, places.new_full((len(places),), i))
                logits = copy.guess(copy.text(texts), image, texts.offsets[:-1].long() + places)  # [L - 2, V]
                known_words = logits[:, : len(rank.tokenizer)]  # the embedding may have more rows than there are words
                for row, word in zip(known_words.float().softmax(1), ids[1:-1].tolist(), strict=True):
                    name = rank.tokenizer.convert_ids_to_tokens
                    yield _believed(sample["captions"][0], name(word), row, word, top, name)


@torch.no_grad()
def believed_texts(rank: Rank, method: ALBEF, folder: str, samples: int, top: int) -> Iterator[Believed]:
    """For each of the first images: the captions of the first GALLERY samples that the copy puts first."""
    parts, known = [], []
    for batch, more in _first(rank, folder, GALLERY):
        with method.teaching() as copy:
            parts.append(copy.image_vector(copy.image(to_device(batch.pictures, rank.device))))
        known += more
    owner, captions = caption_list(known)
    with method.teaching() as copy:
        texts = torch.cat([copy.text_vector(copy.text(ids.to(rank.device))) for ids in rank.ids(captions)])
    probabilities = (method.temperature() * similarity(torch.cat(parts), texts)).softmax(1)  # [A, C]
    for i, sample in enumerate(known[:samples]):
        own = owner.index(i)
        yield _believed(captions[own], sample["key"], probabilities[i], own, top, captions.__getitem__)


def _first(rank: Rank, folder: str, samples: int) -> Iterator[tuple[Batch, list[dict]]]:
    """Batches until there are enough samples; ValueError for a tokenizer without a mask token."""
    if rank.tokenizer.mask_token_id is None:
        raise ValueError("the tokenizer has no mask token; the words of a copy cannot be asked for")
    taken = 0
    for batch, known in rank.batches(folder):
        wanted = min(len(batch), samples - taken)
        yield batch.part(0, wanted), known[:wanted]
        taken += wanted
        if taken >= samples:
            return


def _believed(caption: str, of: str, probabilities: Tensor, own: int, top: int, name: Callable[[int], str]) -> Believed:
    """probabilities: [n], of answers that `name` puts into words."""
    best = probabilities.topk(min(top, len(probabilities)))
    answers = tuple((name(place), value) for place, value in zip(best.indices.tolist(), best.values.tolist()))
    rank_of_own = int((probabilities > probabilities[own]).sum()) + 1
    return Believed(caption, of, rank_of_own, answers)


def check_copy(method: object) -> ALBEF:
    """ValueError for a method without a momentum copy that answers."""
    if not isinstance(method, ALBEF):
        raise ValueError(f"explain asks the momentum copy of ALBEF; this run is of {type(method).__name__}")
    assert method.teacher is not None
    method.teacher.eval()  # its answers, without dropout
    return method
