"""Search against sorting all scores, for vectors and tokens, with ties and scores that are not numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmpt.batch import Tokens, pack
from mmpt.ops.features import Features
from mmpt.ops.late_interaction.op import late_interaction
from mmpt.ops.search import search
from mmpt.ops.similarity import similarity


def max_sim(queries: Features, answers: Features) -> Tensor:
    assert isinstance(queries, Tokens) and isinstance(answers, Tokens)
    return late_interaction(queries, answers)[0]


def by_vectors(queries: Features, answers: Features) -> Tensor:
    assert isinstance(queries, Tensor) and isinstance(answers, Tensor)
    return similarity(queries, answers)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9), st.integers(0, 20), st.integers(1, 25), st.integers(1, 8), st.integers(0, 99))
def test_equals_sorting_all_scores(queries: int, answers: int, k: int, at_once: int, seed: int) -> None:
    """Whole numbers, so that scores tie all the time and no block rounds differently."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(-2, 3, (queries, 3), generator=generator).float()
    a = torch.randint(-2, 3, (answers, 3), generator=generator).float()
    everything = q @ a.T
    order = [sorted(range(answers), key=lambda j: (-float(row[j]), j))[:k] for row in everything]
    found = search(by_vectors, q, a, k, at_once, at_once)
    assert found.places.shape == (queries, min(k, answers)) and found.places.tolist() == order
    torch.testing.assert_close(found.scores, everything.gather(1, found.places))


def test_tokens_by_max_sim() -> None:
    generator = torch.Generator().manual_seed(0)
    queries = [torch.randn(n, 8, generator=generator) for n in (3, 1, 5)]
    answers = [torch.randn(n, 8, generator=generator) for n in (4, 9, 2, 6, 6, 1, 3)]
    everything = torch.tensor([[float((q @ a.T).amax(1).mean()) for a in answers] for q in queries])
    found = search(max_sim, pack(queries), pack(answers), 3, 2, 2)
    best = everything.topk(3, 1)
    assert torch.equal(found.places, best.indices)
    torch.testing.assert_close(found.scores, best.values)


def test_what_is_not_a_number_comes_last() -> None:
    answers = torch.tensor([[float("nan")], [1.0], [float("inf")], [-1.0]])
    found = search(by_vectors, torch.ones(1, 1), answers, 4, answers_at_once=3)
    assert found.places.tolist() == [[2, 1, 3, 0]] and found.scores[0, 3] == float("-inf")


def test_no_answers_wanted() -> None:
    with pytest.raises(ValueError, match="at least one answer, got k=0"):
        search(by_vectors, torch.ones(1, 1), torch.ones(2, 1), 0)
