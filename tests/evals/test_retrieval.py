"""Recall at K against a plain loop, with several captions per image, equal captions, ties, and shares on ranks."""

import random
from collections.abc import Hashable
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpt import dist
from mmpt.batch import Tokens, pack, unpack
from mmpt.evals import retrieval as under_test
from mmpt.evals.features import gather_features, in_step, join, none_of, select
from mmpt.evals.ranking import chance_hits, expected_hits
from mmpt.evals.retrieval import KS, Pairs, find_truth, retrieval
from mmpt.ops.features import Features, cut, sequences
from tests.ranks import run


class Vectors:
    """Cosine-like scores that differ between the directions, so that mixing them up shows."""

    def score(self, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return image @ text.T, image @ text.flip(1).T


class LateInteraction:
    """FILIP's two scores (Yao et al. 2021, equations 4 and 5) by a plain loop."""

    def score(self, image: Tokens, text: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
        pairs = [[a @ b.T for b in unpack(text)] for a in unpack(image)]
        shape = len(pairs), sequences(text)  # there may be no image
        i2t = torch.tensor([[s.amax(1).mean() for s in row] for row in pairs]).view(shape)
        t2i = torch.tensor([[s.amax(0).mean() for s in row] for row in pairs]).view(shape)
        return i2t, t2i


def hit_by_enumeration(scores: list[float], right: list[int], k: int) -> float:
    """The share of all orders of the columns, sorted stably by score, that have a right one among the first k."""
    hits = total = 0
    for order in permutations(range(len(scores))):
        ranked = sorted(order, key=lambda column: -scores[column])
        hits += any(column in right for column in ranked[:k])
        total += 1
    return hits / total


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_hits_are_the_mean_over_all_ways_to_break_ties(data: st.DataObject):
    columns = data.draw(st.integers(1, 6))
    scores = data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=columns, max_size=columns))
    right = sorted(data.draw(st.sets(st.integers(0, columns - 1), min_size=1)))
    ks = (1, 2, 5)
    got = expected_hits(torch.tensor([scores]), [right], ks)[0].tolist()
    assert got == pytest.approx([hit_by_enumeration(scores, right, k) for k in ks], abs=1e-12)
    chance = chance_hits([right], columns, ks)[0].tolist()
    assert chance == pytest.approx([hit_by_enumeration([0.0] * columns, right, k) for k in ks], abs=1e-12)


def test_a_score_that_is_not_a_number_never_helps():
    nan = float("nan")
    hits = expected_hits(torch.tensor([[nan, 0.0], [1.0, nan], [nan, nan], [1.0, 0.0]]), [[0]] * 4, (1,))
    assert hits[:, 0].tolist() == [0.0, 0.0, 0.0, 1.0]


def plain_recall(scores: torch.Tensor, right: list[list[int]], k: int) -> float:
    """For scores without ties: any right answer among the first k."""
    order = scores.argsort(dim=1, descending=True).tolist()
    return sum(any(column in right[row] for column in order[row][:k]) for row in range(len(right))) / len(right)


def some_pairs(images: int, tokens: bool, seed: int) -> Pairs:
    """Images with 1 to 3 captions each, some of which say the same, also across images."""
    chooser, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    owner = [image for image in range(images) for _ in range(chooser.randint(1, 3))]
    says: list[Hashable] = [chooser.choice(["this", "that", *map(str, range(30))]) for _ in owner]

    def features(total: int) -> Features:
        if not tokens:
            return torch.randn(total, 6, generator=generator)
        return pack([torch.randn(chooser.randint(1, 5), 6, generator=generator) for _ in range(total)])

    return Pairs(features(images), features(len(owner)), owner, says)


@pytest.mark.parametrize("tokens", [False, True])
def test_against_a_plain_loop(tokens: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(under_test, "QUERIES_AT_ONCE", 7)
    monkeypatch.setattr(under_test, "ANSWERS_AT_ONCE", 5)
    method = LateInteraction() if tokens else Vectors()
    pairs = some_pairs(25, tokens, seed=1)
    i2t, t2i = method.score(pairs.image, pairs.text)  # type: ignore[arg-type]
    said_of = [{said for said, owner in zip(pairs.says, pairs.owner) if owner == image} for image in range(25)]
    texts = [[t for t, said in enumerate(pairs.says) if said in said_of[image]] for image in range(25)]
    images = [[i for i in range(25) if t in texts[i]] for t in range(len(pairs.owner))]
    found = dict(retrieval(method, pairs))
    for k in KS:
        assert found[f"image_to_text_R@{k}"] == pytest.approx(plain_recall(i2t, texts, k))
        assert found[f"text_to_image_R@{k}"] == pytest.approx(plain_recall(t2i.T, images, k))
    assert len({len(row) for row in texts}) > 1 and max(map(len, images)) > 1


def test_equal_captions_are_right_for_each_other_only_when_they_say_the_same():
    truth = find_truth(3, owner=[0, 0, 1, 2], says=["a", "b", "a", "c"])
    assert truth.texts_of_image == [[0, 1, 2], [0, 2], [3]]
    assert truth.images_of_text == [[0, 1], [0], [0, 1], [2]]
    apart = find_truth(3, owner=[0, 0, 1, 2], says=[0, 1, 2, 3])
    assert apart.texts_of_image == [[0, 1], [2], [3]] and apart.images_of_text == [[0], [0], [1], [2]]


def test_a_model_that_tells_nothing_apart_gets_exactly_chance():
    pairs = some_pairs(30, tokens=False, seed=2)
    found = dict(retrieval(Vectors(), pairs._replace(image=torch.zeros(30, 6))))
    for direction in ("image_to_text", "text_to_image"):
        for k in KS:
            assert found[f"{direction}_R@{k}"] == pytest.approx(found[f"{direction}_R@{k}_chance"])
    unique = dict(retrieval(Vectors(), Pairs(torch.zeros(20, 6), torch.ones(20, 6), list(range(20)), list(range(20)))))
    assert unique["image_to_text_R@1_chance"] == pytest.approx(1 / 20)
    assert unique["image_to_text_R@10"] == pytest.approx(10 / 20)


def test_an_image_without_a_text_is_an_error():
    with pytest.raises(ValueError, match="without a text"):
        list(retrieval(Vectors(), Pairs(torch.zeros(2, 3), torch.zeros(1, 3), [0], ["a"])))


def share(pairs: Pairs, rank: int, bounds: list[int]) -> Pairs:
    """The images from bounds[rank] to bounds[rank + 1] and their texts."""
    first, last = bounds[rank], bounds[rank + 1]
    texts = [t for t, image in enumerate(pairs.owner) if first <= image < last]
    return Pairs(
        select(pairs.image, list(range(first, last))) if last > first else none_of(pairs.image),
        select(pairs.text, texts) if texts else none_of(pairs.text),
        [pairs.owner[t] - first for t in texts],
        [pairs.says[t] for t in texts],
    )


def on_ranks(rank: int, world_size: int, tokens: bool, bounds: list[int]) -> dict[str, float]:
    method = LateInteraction() if tokens else Vectors()
    ours = share(some_pairs(13, tokens, seed=3), rank, bounds)
    gathered = gather_features(ours.image)
    assert sequences(gathered) == 13
    return dict(retrieval(method, ours))


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("bounds", [[0, 7, 13], [0, 13, 13], [0, 1, 13]])
def test_shares_on_two_ranks_give_what_one_process_gives(tokens: bool, bounds: list[int]):
    alone = dict(retrieval(LateInteraction() if tokens else Vectors(), some_pairs(13, tokens, seed=3)))
    for found in run(on_ranks, 2, tokens, bounds):
        assert found == pytest.approx(alone, abs=1e-12)


def steps_taken(rank: int, world_size: int) -> int:
    return len(list(in_step(iter(range(rank * 3)), "cpu")))


@pytest.mark.slow
def test_all_ranks_take_as_many_steps_as_the_one_with_the_most():
    assert run(steps_taken, 3) == [6, 6, 6]


def test_slices_and_joins_are_inverse():
    for features in (some_pairs(9, True, 0).image, some_pairs(9, False, 0).image):
        parts = [part for part, _, _ in cut(features, 4)]
        assert [sequences(part) for part in parts] == [4, 4, 1]
        again = join(parts)
        if isinstance(features, Tokens) and isinstance(again, Tokens):
            assert torch.equal(again.x, features.x) and torch.equal(again.offsets, features.offsets)
            assert again.longest == features.longest
        else:
            assert torch.equal(again, features)  # type: ignore[arg-type]
        assert list(cut(none_of(features), 4)) == []
    assert dist.world_size() == 1
