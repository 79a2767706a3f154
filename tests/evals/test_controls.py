"""The controls are real: each learns what it can see, and cannot know what it does not."""

import json
from io import BytesIO
from math import exp

import numpy as np
import pytest
import torch
from PIL import Image

from data_tools.scenes import make_sample
from mmpt.evals.controls import (
    BINS,
    colour_histograms,
    fit_bag_of_words,
    fit_bigrams,
    text_only_twins,
)
from mmpt.evals.retrieval import Pairs, retrieval


def drawn(split: str, count: int) -> tuple[torch.Tensor, list[dict]]:
    samples = [make_sample(0, split, 64, i) for i in range(count)]  # type: ignore[arg-type]
    images = [np.asarray(Image.open(BytesIO(sample["png"]))).transpose(2, 0, 1) for sample in samples]
    return torch.from_numpy(np.stack(images)), [json.loads(sample["json"]) for sample in samples]


def test_histograms_count_pixels():
    image = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    image[0, :, 0, 0] = 255
    image[0, 0, 0, 1] = 33  # the second bin of red
    found = colour_histograms(image)[0] ** 2
    assert found[0] == pytest.approx(0.5) and found[-1] == pytest.approx(0.25)
    assert found[BINS * BINS] == pytest.approx(0.25) and found.sum() == pytest.approx(1.0)


def test_the_bag_of_words_finds_captions_by_their_colours_and_not_by_shapes():
    images, known = drawn("train", 1200)
    control = fit_bag_of_words(colour_histograms(images), [scene["caption"] for scene in known])
    held_images, held = drawn("held_out", 100)
    captions = [scene["caption"] for scene in held]
    image, text = control.encode_image(colour_histograms(held_images)), control.encode_text(captions)
    found = dict(retrieval(control, Pairs(image, text, list(range(100)), [scene["says"] for scene in held])))
    assert found["image_to_text_R@10"] > 3 * found["image_to_text_R@10_chance"]
    assert found["text_to_image_R@10"] > 3 * found["text_to_image_R@10_chance"]
    twins = control.encode_text([scene["twin"]["caption"] for scene in held])
    scores, twin_scores = (control.score(image, t)[0].diagonal() for t in (text, twins))
    articles = torch.tensor(
        [scene["caption"].count(" an ") == scene["twin"]["caption"].count(" an ") for scene in held]
    )
    assert torch.allclose(scores[articles], twin_scores[articles])  # the same words


def test_bigram_chances_sum_to_one():
    model = fit_bigrams(["a red star", "a blue star", "a red ring"])
    kinds = [*model.words, "unknown"]
    prefix = {word: model.pairs["red", word] for word in kinds}
    alone = {word: (model.words[word] + 1) / (sum(model.words.values()) + len(model.words) + 1) for word in kinds}
    assert sum(alone.values()) == pytest.approx(1.0)
    assert sum((prefix[w] + alone[w]) / (model.words["red"] + 1) for w in kinds) == pytest.approx(1.0)
    expected = 1.0
    for before, word in (("<", "a"), ("a", "red"), ("red", "ring"), ("ring", ">")):
        expected *= (model.pairs[before, word] + alone[word]) / (model.words[before] + 1)
    assert exp(model.log_likelihood("A red ring")) == pytest.approx(expected)


def test_text_alone_prefers_what_it_has_read_and_cannot_tell_our_twins():
    model = fit_bigrams(["a red star and a blue ring"] * 5)
    assert text_only_twins(model, ["a red star"], ["a blue star"]) == 1.0
    assert text_only_twins(model, ["a blue star"], ["a red star"]) == 0.0
    assert text_only_twins(model, ["a red star"], ["a red star"]) == 0.5
    read = fit_bigrams([json.loads(make_sample(0, "train", 16, i)["json"])["caption"] for i in range(3000)])
    held = [json.loads(make_sample(0, "held_out", 16, i)["json"]) for i in range(400)]
    share = text_only_twins(read, [s["caption"] for s in held], [s["twin"]["caption"] for s in held])
    assert 0.4 < share < 0.6
