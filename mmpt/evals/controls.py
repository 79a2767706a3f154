"""What can be had without understanding, fitted on the training split, to print beside a model's numbers.

bag of words    a linear map from an image's colour histogram to the words of its caption: it sees which colours
                there are and reads which words there are, not what belongs to what
text only       a bigram model of captions, which sees no image: how often it finds a caption likelier than its twin
"""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmpt.evals.ranking import expected_hits
from mmpt.evals.retrieval import find_truth

BINS = 8
"""Histogram bins along each of red, green and blue."""
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Ridge penalties tried, relative to the mean variance of the histogram's features."""
VALIDATION_SHARE = 0.1
MOST_WORDS = 2000
"""The vocabulary is this many words, the most frequent ones."""


def colour_histograms(images: Tensor) -> Tensor:
    """[A, 3, H, W] uint8 -> [A, BINS**3] float64: square roots of the shares of pixels of each colour."""
    binned = (images.long() * BINS) // 256  # [A, 3, H, W]
    colour = ((binned[:, 0] * BINS + binned[:, 1]) * BINS + binned[:, 2]).flatten(1)  # [A, H * W]
    counts = torch.zeros(len(images), BINS**3, dtype=torch.float64)
    counts.scatter_add_(1, colour, torch.ones_like(colour, dtype=torch.float64))
    return (counts / colour.shape[1]).sqrt()


class BagOfWords(NamedTuple):
    """A fitted control. Its features of an image and of a text are directions in the space of words.

    vocabulary: word -> column; word_mean [V], word_scale [V]; histogram_mean [F]; weight [F, V].
    """

    vocabulary: dict[str, int]
    word_mean: Tensor
    word_scale: Tensor
    histogram_mean: Tensor
    weight: Tensor

    def encode_text(self, captions: Sequence[str]) -> Tensor:
        """[C, V] unit vectors: which words a caption has, each centred and scaled to unit variance."""
        return normalize((_word_counts(captions, self.vocabulary) - self.word_mean) / self.word_scale, dim=1)

    def encode_image(self, histograms: Tensor) -> Tensor:
        """[A, V] unit vectors: the words that each histogram [A, BINS**3] predicts."""
        return normalize((histograms - self.histogram_mean) @ self.weight, dim=1)

    def score(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines, the same both ways."""
        cosines = image @ text.T
        return cosines, cosines


def fit_bag_of_words(histograms: Tensor, captions: Sequence[str]) -> BagOfWords:
    """Ridge regression from colour histograms to caption words, all in float64.

    histograms [A, BINS**3] of images, one caption each. The penalty is the one of RIDGES with the best R@10, both
    ways, on the last VALIDATION_SHARE of the data, which then joins the rest for the final fit.
    """
    held = max(1, int(len(captions) * VALIDATION_SHARE))
    fitted = {ridge: _fit(histograms[:-held], captions[:-held], ridge) for ridge in RIDGES}
    best = max(RIDGES, key=lambda ridge: _recall(fitted[ridge], histograms[-held:], captions[-held:]))
    return _fit(histograms, captions, best)


def _fit(histograms: Tensor, captions: Sequence[str], ridge: float) -> BagOfWords:
    frequent = Counter(word for text in captions for word in _words(text)).most_common(MOST_WORDS)
    vocabulary = {word: i for i, (word, _) in enumerate(sorted(frequent))}
    words = _word_counts(captions, vocabulary)
    word_mean, word_scale = words.mean(0), words.std(0).clamp(min=1e-3)
    histogram_mean = histograms.mean(0)
    x, y = histograms - histogram_mean, (words - word_mean) / word_scale
    gram = x.T @ x
    penalty = ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return BagOfWords(vocabulary, word_mean, word_scale, histogram_mean, torch.linalg.solve(gram + penalty, x.T @ y))


def _recall(control: BagOfWords, histograms: Tensor, captions: Sequence[str]) -> float:
    scores = control.score(control.encode_image(histograms), control.encode_text(captions))[0]
    truth = find_truth(len(captions), range(len(captions)), captions)
    both = expected_hits(scores, truth.texts_of_image, (10,)), expected_hits(scores.T, truth.images_of_text, (10,))
    return float(torch.cat(both).mean())


def _words(text: str) -> list[str]:
    return [word.strip(".,;:!?\"'()") for word in text.lower().split()]


def _word_counts(captions: Sequence[str], vocabulary: dict[str, int]) -> Tensor:
    """[C, V] float64; words beyond the vocabulary are passed over."""
    counts = np.zeros((len(captions), len(vocabulary)))
    for row, text in enumerate(captions):
        for word in _words(text):
            if word in vocabulary:
                counts[row, vocabulary[word]] += 1
    return torch.from_numpy(counts)


class Bigrams(NamedTuple):
    """Counts of words and of pairs of neighbours, with a mark before the first and after the last word."""

    words: Counter[str]
    pairs: Counter[tuple[str, str]]

    def log_likelihood(self, text: str) -> float:
        """Natural logarithm of the chance of the text; each word's chance leans on its overall frequency,

        P(w | v) = (count(v w) + P(w)) / (count(v) + 1)    P(w) = (count(w) + 1) / (all words + kinds of words + 1)
        """
        total, kinds = sum(self.words.values()), len(self.words)
        chance = 0.0
        for before, word in pairwise(["<", *_words(text), ">"]):
            alone = (self.words[word] + 1) / (total + kinds + 1)
            chance += np.log((self.pairs[before, word] + alone) / (self.words[before] + 1))
        return float(chance)


def fit_bigrams(captions: Sequence[str]) -> Bigrams:
    """Count the words and neighbours of training captions."""
    sequences = [["<", *_words(text), ">"] for text in captions]
    return Bigrams(
        Counter(word for words in sequences for word in words),
        Counter(pair for words in sequences for pair in pairwise(words)),
    )


def text_only_twins(model: Bigrams, captions: Sequence[str], twins: Sequence[str]) -> float:
    """How often a caption is likelier than its twin; equal counts one half."""
    differences = [model.log_likelihood(a) - model.log_likelihood(b) for a, b in zip(captions, twins, strict=True)]
    return sum(1.0 if d > 1e-9 else 0.5 if d > -1e-9 else 0.0 for d in differences) / len(differences)
