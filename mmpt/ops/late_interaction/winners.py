"""Where each maximum of a late interaction was found: the layout that all backends share.

    word:   [B_t, T_i], for each text and each packed patch, the place in that text of the patch's best word
    patch:  [B_i, T_t], for each image and each packed text token, the place in that image of the token's best patch

Places count from 0 within their sequence and take a byte where no sequence is longer than 256, two elsewhere.
"""

import torch
from torch import Tensor

from mmpt.batch import Tokens


def index_type(longest: int) -> torch.dtype:
    """The type of a place in a sequence of up to `longest` tokens."""
    return torch.uint8 if longest <= 256 else torch.uint16


def winner_bytes(image: Tokens, text: Tokens) -> int:
    """Bytes that all winners take."""
    texts, images = len(text.offsets) - 1, len(image.offsets) - 1
    of_patches = texts * len(image.x) * index_type(text.longest).itemsize
    return of_patches + images * len(text.x) * index_type(image.longest).itemsize


def indexable(winners: Tensor) -> Tensor:
    """A view that torch can index: it does not know how to for uint16, but for int16."""
    return winners if winners.dtype == torch.uint8 else winners.view(torch.int16)


def to_indices(place: Tensor, index: torch.dtype) -> Tensor:
    """Places in the type of an `indexable` view; those from 32,768 on become negative."""
    return place.to(torch.uint8 if index == torch.uint8 else torch.int16)


def as_places(indices: Tensor) -> Tensor:
    """What was read through an `indexable` view, as int64."""
    return indices.long() if indices.dtype == torch.uint8 else indices.long() & 0xFFFF
