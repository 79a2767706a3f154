"""The K best answers of every query, by any score, without the scores of all answers in memory at once.

With `late_interaction(query, answer)[0]` as the score this is ColBERT's search by MaxSim (Khattab and Zaharia 2020,
section 3.3), as a mean over the query's tokens; with `similarity` it is a search by vectors.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mmpt.ops.features import Features, cut, sequences, values

Score = Callable[[Features, Features], Tensor]
"""Of Q queries and A answers: [Q, A], higher is better."""


class Best(NamedTuple):
    """K answers of each query, best first; of answers that score alike, the one that comes first."""

    scores: Tensor
    """[Q, K] fp32; what is not a number comes as -inf, and last."""
    places: Tensor
    """[Q, K] int64, which answers."""


@torch.no_grad()
def search(
    score: Score, queries: Features, answers: Features, k: int, queries_at_once: int = 256, answers_at_once: int = 1024
) -> Best:
    """The K = min(k, A) best of A answers for each query. ValueError for k below 1.

    Scores held at a time: queries_at_once rows of answers_at_once + k.
    """
    if k < 1:
        raise ValueError(f"a search is for at least one answer, got k={k}")
    device = values(queries).device
    none = torch.empty(0, min(k, sequences(answers)), device=device)
    found = [_best_of_block(score, block, answers, k, answers_at_once) for block, _, _ in cut(queries, queries_at_once)]
    scores, places = zip(*found) if found else ((none,), (none.long(),))
    return Best(torch.cat(scores), torch.cat(places))


def _best_of_block(score: Score, queries: Features, answers: Features, k: int, at_once: int) -> Best:
    device, count = values(queries).device, sequences(queries)
    best = Best(torch.empty(count, 0, device=device), torch.empty(count, 0, dtype=torch.int64, device=device))
    for part, span, _ in cut(answers, at_once):
        new = score(queries, part).float().nan_to_num(float("-inf"), float("inf"), float("-inf"))
        places = torch.arange(span.start, span.stop, device=device).expand(count, -1)
        scores = torch.cat([best.scores, new], 1)
        order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]  # stable: earlier answers stand first
        best = Best(scores.gather(1, order), torch.cat([best.places, places], 1).gather(1, order))
    return best
