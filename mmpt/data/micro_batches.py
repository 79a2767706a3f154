"""Cutting a batch by tokens: micro-batches of unlike numbers of pairs that need alike amounts of memory.

Captions, whole images and regions differ in length, and what a step holds grows with the tokens, not with the pairs.
"""

from dataclasses import dataclass

import numpy as np

from mmpt.batch import Batch, Pictures


@dataclass(frozen=True)
class TokenBudget:
    """tokens: the most, of text and picture together, that a micro-batch of more than one pair may have.
    square_tokens: what a picture of pixels counts for where the batch does not tell (patches that are all kept)."""

    tokens: int
    square_tokens: int = 0

    def __post_init__(self):
        if self.tokens < 1:
            raise ValueError(f"a budget of {self.tokens} tokens per micro-batch holds no pair: give 1 or more")


def tokens_per_pair(batch: Batch, square_tokens: int = 0) -> np.ndarray:
    """[B] int64: tokens of text and picture. Where a text is also shown a partner's picture, the longer one counts.
    Call on the host: it reads offsets."""
    pictures = tokens_per_picture(batch.pictures, square_tokens)
    if batch.partners is not None:
        pictures = np.maximum(pictures, tokens_per_picture(batch.partners.pictures, square_tokens))
    return batch.text.lengths().numpy().astype(np.int64) + pictures


def tokens_per_picture(pictures: Pictures, square_tokens: int) -> np.ndarray:
    """[B] int64."""
    packed = pictures.patches if pictures.regions is None else pictures.regions.features
    if packed is not None:
        return packed.lengths().numpy().astype(np.int64)
    kept = square_tokens if pictures.kept_patches is None else pictures.kept_patches.shape[1]
    return np.full(len(pictures), kept, dtype=np.int64)


def micro_batches_for(batch: Batch, budget: TokenBudget) -> int:
    """The fewest contiguous parts of the batch of which each fits the budget or is a single pair."""
    return len(ends_within(tokens_per_pair(batch, budget.square_tokens), budget.tokens))


def split_by_tokens(batch: Batch, parts: int, square_tokens: int = 0) -> list[Batch]:
    """Cut into this many parts, in order, none of them empty; of those with more than one pair the largest has as few
    tokens as any such cut can give it. So with `micro_batches_for` parts or more, each fits the budget.

    Raises ValueError for more parts than pairs.
    """
    if not 1 <= parts <= len(batch):
        raise ValueError(f"cannot cut a batch of {len(batch)} pairs into {parts} micro-batches")
    if parts == 1:
        return [batch]
    ends = even_ends(tokens_per_pair(batch, square_tokens), parts)
    return [batch.part(first, last) for first, last in zip([0, *ends], ends)]


def even_ends(tokens: np.ndarray, parts: int) -> list[int]:
    """Where each part ends. tokens: [B] int64, of each pair.

    Bisects the least capacity for which filling from the left (which makes the fewest parts) makes no more than asked.
    """
    low, high = -1, int(tokens.sum())
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if len(ends_within(tokens, middle)) <= parts else (middle, high)
    ends, sums = ends_within(tokens, high), np.append(0, tokens.cumsum())
    while len(ends) < parts:  # the largest part that can be cut is cut in half
        starts = [0, *ends[:-1]]
        sizes = [sums[b] - sums[a] if b - a > 1 else -1 for a, b in zip(starts, ends)]
        first, last = starts[int(np.argmax(sizes))], ends[int(np.argmax(sizes))]
        cuts = np.arange(first + 1, last)
        larger = np.maximum(sums[cuts] - sums[first], sums[last] - sums[cuts])
        ends = sorted([*ends, int(cuts[larger.argmin()])])
    return ends


def ends_within(tokens: np.ndarray, capacity: int) -> list[int]:
    """Where parts end that are filled from the left up to a capacity; a pair that exceeds it is a part by itself."""
    sums, ends = np.append(0, tokens.cumsum()), [0]
    while ends[-1] < len(tokens):
        fitting = int(np.searchsorted(sums, sums[ends[-1]] + capacity, side="right")) - 1
        ends.append(max(ends[-1] + 1, fitting))
    return ends[1:]
