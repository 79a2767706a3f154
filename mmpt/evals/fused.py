"""Methods whose image and text meet inside the model, scored as if they were dual towers: pair by pair.

With sharded parameters every call is a collective, so all ranks make equally many: a rank that has run out of pairs
scores a blank one and forgets it.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from mmpt.batch import Tokens, pack_equal
from mmpt.evals.features import Call, in_step
from mmpt.ops.features import Features, sequences, values
from mmpt.ops.packing import take
from mmpt.ops.similarity import similarity

PAIRS_AT_ONCE = 256


class PairScorer:
    """`score` and `score_pairs` of a method that fuses, through `call` (the engine or the plain method). Collective."""

    ensemble: Literal["similarities"] = "similarities"

    def __init__(self, call: Call):
        self._call = call

    def score(self, image: Features, text: Features) -> tuple[Tensor, Tensor]:
        """Log odds of every image with every text, [A, C], the same in both directions."""
        images, texts = sequences(image), sequences(text)
        every = torch.arange(images * texts, device=values(image).device)
        scores = self.score_pairs(image, text, every // max(1, texts), every % max(1, texts)).view(images, texts)
        return scores, scores

    def score_pairs(self, image: Features, text: Features, i: Tensor, j: Tensor) -> Tensor:
        """[M], of image i[m] with text j[m]."""
        assert isinstance(image, Tokens) and isinstance(text, Tokens)
        parts = [values(image).new_zeros(0, dtype=torch.float32)]
        groups = zip(i.split(PAIRS_AT_ONCE), j.split(PAIRS_AT_ONCE), strict=True)
        for group in in_step(groups if len(i) else iter(()), values(image).device):
            if group is None:
                self._call("score_pairs", *(pack_equal(x.x.new_zeros(1, 2, x.x.shape[1])) for x in (image, text)))
            else:
                parts.append(self._call("score_pairs", take(image, group[0]), take(text, group[1])).float())
        return torch.cat(parts)


def scorer_of(method: Any, call: Call) -> Any:
    """What scores features of this method: itself, or a PairScorer."""
    return PairScorer(call) if method.fuses else method


def paired_scores(scorer: Any, image: Features, text: Features) -> tuple[Tensor, Tensor]:
    """(s_i2t, s_t2i) of each image with its own text, [B] each."""
    if isinstance(scorer, PairScorer):
        each = torch.arange(sequences(image), device=values(image).device)
        scores = scorer.score_pairs(image, text, each, each)
        return scores, scores
    i2t, t2i = scorer.score(image, text)
    return i2t.diagonal(), t2i.diagonal()


class Shortlist:
    """Answers are ranked by the cosine of vectors first, and the K best of each query again by the fused model.

    Li et al. 2021, ALBEF, section 5: K = 128 for Flickr30k, 256 for COCO.
    """

    def __init__(self, scorer: PairScorer, k: int):
        self._scorer, self._k = scorer, k

    def scores(
        self, queries: Features, answers: Features, vectors: tuple[Tensor, Tensor], queries_are_images: bool
    ) -> Tensor:
        """[Q, C]: log odds of the K best; below them all, by their cosines, the others. vectors: [Q, E] and [C, E]."""
        cosines = similarity(*vectors)  # [Q, C]
        best = cosines.topk(min(self._k, cosines.shape[1]), dim=1).indices  # [Q, K]
        q = torch.arange(len(best), device=best.device)[:, None].expand_as(best).flatten()
        sides = (queries, answers, q, best.flatten()) if queries_are_images else (answers, queries, best.flatten(), q)
        odds = self._scorer.score_pairs(*sides).view(best.shape)
        lowest = odds.amin(1, keepdim=True) if best.shape[1] else odds
        return (lowest + cosines - 2).scatter(1, best, odds)
