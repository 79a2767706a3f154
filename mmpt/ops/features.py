"""Features of either kind, one vector per sequence (CLIP) or packed tokens (FILIP), handled alike."""

from collections.abc import Iterator

import torch
from torch import Tensor

from mmpt import dist
from mmpt.batch import Tokens

Features = Tensor | Tokens
"""[B, D], or Tokens of B sequences."""


def values(features: Features) -> Tensor:
    """[B, D] or [T, D]."""
    return features.x if isinstance(features, Tokens) else features


def with_values(features: Features, x: Tensor) -> Features:
    """The same sequences with other vectors."""
    return features.with_x(x) if isinstance(features, Tokens) else x


def sequences(features: Features) -> int:
    """B."""
    return len(features.offsets) - 1 if isinstance(features, Tokens) else len(features)


def gather(features: Features) -> Features:
    """Those of all ranks, rank-major, with gradient."""
    return dist.gather_tokens(features) if isinstance(features, Tokens) else dist.gather(features)


def travelling(features: Features) -> Features:
    """In the type that they travel and meet in: the compute type of the run, which autocast knows where it is on."""
    x = values(features)
    if x.dtype != torch.float32 or not torch.is_autocast_enabled(x.device.type):
        return features
    return with_values(features, x.to(torch.get_autocast_dtype(x.device.type)))


def cut(features: Features, each: int) -> Iterator[tuple[Features, slice, slice]]:
    """Runs of up to `each` sequences as (features, sequences, rows of their values).

    Waits for the device only where the sequences are tokens and differ in length.
    """
    count, ends = sequences(features), _ends(features)
    for first in range(0, count, each):
        last = min(first + each, count)
        rows = slice(ends[first], ends[last])
        part = values(features)[rows]
        if isinstance(features, Tokens):
            offsets = features.offsets[first : last + 1]
            yield Tokens(part, offsets - offsets[0], features.longest), slice(first, last), rows
        else:
            yield part, slice(first, last), rows


def _ends(features: Features) -> range | list[int]:
    if not isinstance(features, Tokens):
        return range(len(features) + 1)
    count, longest = len(features.offsets) - 1, features.longest
    if count * longest == len(features.x):
        return range(0, (count + 1) * longest, max(1, longest))
    return features.offsets.tolist()
