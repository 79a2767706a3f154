"""For image-text matching: which texts keep their own picture, and whose picture the others are shown.

Partners come from the whole data set, by the same closed-form order under a second seed: the text at position p may be
shown the picture of the sample that the second order has at position p. So within an epoch each sample is a partner at
one position, uniformly drawn, read as sequentially as the samples themselves, and known from (seed, position) alone.
Of weighted sources a text and its partner come from the same one, as in ViLT's code (Kim et al. 2021).

Of the positions 2k and 2k + 1, one keeps its own picture: which, a coin keyed by k says. A global batch that is even
and begins at an even position is therefore half matches, half not, exactly, as ViLT's code makes each worker's batch;
here it holds for the global batch, whatever the number of ranks.

A partner that turns out to be the sample itself, once in N times, counts as a match, for that is what it is. (ViLT's
code labels it a mismatch.)
"""

from typing import NamedTuple

import numpy as np

from mmpt.data.mixture import Mixture, place_of
from mmpt.data.permutation import hash_key
from mmpt.data.randomness import generator

PARTNER = 6  # what the key of a seed is for; stream.py has 5


class PartnerPlaces(NamedTuple):
    """For each of B texts: whether its own picture is shown, [B] bool; else where the one lies that is, [B] int64."""

    own: np.ndarray
    chunks: np.ndarray
    indices: np.ndarray


def partner_seed(seed: int) -> int:
    """The seed of the order that partners come in."""
    return int(hash_key(seed, PARTNER)[0] >> np.uint64(1))


def partner_places(second: Mixture, seed: int, positions: np.ndarray) -> PartnerPlaces:
    """Whose pictures the texts at these positions are shown. second: the order under `partner_seed`."""
    place = place_of(second, positions)
    return PartnerPlaces(keep_own(seed, positions), place.chunks, place.indices)


def keep_own(seed: int, positions: np.ndarray) -> np.ndarray:
    """[B] bool, true at one of the positions 2k and 2k + 1 for every k. positions: [B] int64."""
    pairs, pair = np.unique(positions // 2, return_inverse=True)
    heads = np.array([generator(seed, "match", 0, k).random() < 0.5 for k in pairs.tolist()])
    return heads[pair] == (positions % 2 == 0)
