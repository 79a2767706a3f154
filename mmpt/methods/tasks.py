"""The pre-training tasks that several fusion models share, as terms of a loss."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mmpt.batch import MaskedRegions, MaskedWords, Tokens
from mmpt.methods.method import Term
from mmpt.objectives.matching import matching_loss
from mmpt.objectives.transport import transport_distance
from mmpt.ops.packing import Joined, padded


def chosen_rows(masked: MaskedWords | MaskedRegions) -> Tensor:
    """[M] int64, where there is something to be guessed. Their number is known on the host: nothing waits."""
    return masked.chosen.nonzero_static(size=masked.count)[:, 0]


def guessing_terms(name: str, logits: Tensor, answers: Tensor) -> dict[str, Term]:
    """Masked words or classes: the cross entropy of each guess, and the share that is right. logits [M, V], answers
    [M] int64."""
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    count = torch.full((), float(len(answers)), device=logits.device)
    right = (logits.detach().argmax(1) == answers).sum()
    return {
        name: Term(cross_entropy(exact, answers, reduction="sum"), count),
        f"accuracy_{name}": Term(right, count, 0.0),
    }


def matching_terms(logits: Tensor, matches: Tensor) -> dict[str, Term]:
    """Whether image and text belong together, and how often that is seen: logits [B, 2], matches [B] bool."""
    count = torch.full((), float(len(matches)), device=logits.device)
    right = (logits.detach().argmax(1) == matches.long()).sum()
    return {
        "matching": Term(matching_loss(logits, matches), count),
        "accuracy_matching": Term(right, count, 0.0),
    }


def alignment_term(distance: Tensor, matches: Tensor, weight: float) -> Term:
    """Word-region (or word-patch) alignment: the mean of +distance over matches and -distance over the others, as both
    UNITER's and ViLT's code have it. distance [B], matches [B] bool."""
    count = torch.full((), float(len(matches)), device=distance.device)
    return Term(torch.where(matches, distance, -distance).sum(), count, weight)


def pair_distance(pairs: Joined, text: Tokens, image: Tokens, text_ends: bool, image_first: bool) -> Tensor:
    """[B], the transport distance between the words and the image tokens of each fused pair, by `pair_sets`."""
    return transport_distance(*pair_sets(pairs, text, image, text_ends, image_first))


def pair_sets(
    pairs: Joined, text: Tokens, image: Tokens, text_ends: bool, image_first: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Words [B, L, D] and image tokens [B, P, D] of fused pairs, and which of them take part, [B, L] and [B, P] bool.

    text, image: how each side is packed; what they hold is not read. text_ends: whether the first and last token of a
    text, [CLS] and [SEP], take part; image_first: whether the image's first token does.
    """
    words, real_words = padded(text.with_x(pairs.tokens.x[pairs.first_rows]))
    places, real_places = padded(image.with_x(pairs.tokens.x[pairs.second_rows]))
    if not text_ends:
        place = torch.arange(words.shape[1], device=words.device)
        real_words = real_words & (place > 0) & (place < text.lengths()[:, None] - 1)
    if not image_first:
        real_places = real_places & (torch.arange(places.shape[1], device=places.device) > 0)
    return words, places, real_words, real_places
