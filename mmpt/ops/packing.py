"""Packed sequences joined in pairs, and chosen by index."""

from typing import NamedTuple

import torch
from torch import Tensor

from mmpt.batch import Tokens


class Joined(NamedTuple):
    """B sequences, each one of `first` followed by one of `second`."""

    tokens: Tokens
    first_rows: Tensor
    """[T_1] int64, where each token of `first` lies now."""
    second_rows: Tensor
    """[T_2] int64."""


def join(first: Tokens, second: Tokens) -> Joined:
    """Sequence i of `first` and sequence i of `second` one after the other, for every i: single-stream models' input.

    Raises ValueError where they are not equally many.
    """
    if len(first.offsets) != len(second.offsets):
        raise ValueError(f"cannot join {len(first.offsets) - 1} sequences with {len(second.offsets) - 1}")
    offsets = first.offsets + second.offsets
    of_first, of_second = first.sequence_index(), second.sequence_index()
    first_rows = offsets[of_first].long() + first.position()
    second_rows = (offsets[of_second] + first.lengths()[of_second]).long() + second.position()
    x = first.x.new_empty(len(first.x) + len(second.x), *first.x.shape[1:])
    x = x.index_copy(0, first_rows, first.x).index_copy(0, second_rows, second.x.to(first.x.dtype))
    return Joined(Tokens(x, offsets, first.longest + second.longest), first_rows, second_rows)


def take(tokens: Tokens, index: Tensor) -> Tokens:
    """The sequences with these numbers, in this order, each as often as it is named: index [M] int64.

    Waits for the device where sequences differ in length, because the number of tokens is then not known before.
    """
    lengths = tokens.lengths()[index]
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0, dtype=lengths.dtype)])
    equal = (len(tokens.offsets) - 1) * tokens.longest == len(tokens.x)
    total = len(index) * tokens.longest if equal else int(offsets[-1])
    shift = (tokens.offsets[index] - offsets[:-1]).long()
    rows = torch.arange(total, device=index.device)
    rows = rows + torch.repeat_interleave(shift, lengths.long(), output_size=total)
    longest = tokens.longest if equal or not total else int(lengths.max())
    return Tokens(tokens.x[rows], offsets, longest)


def padded(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """[B, L, D] with zeros after the end of each shorter sequence, and [B, L] bool, where there is a token.

    For what is dense by nature, such as a transport plan between two sequences.
    """
    count, longest = len(tokens.offsets) - 1, tokens.longest
    real = torch.arange(longest, device=tokens.x.device) < tokens.lengths()[:, None]
    rows = tokens.sequence_index() * longest + tokens.position()
    x = tokens.x.new_zeros(count * longest, *tokens.x.shape[1:]).index_copy(0, rows, tokens.x)
    return x.unflatten(0, (count, longest)), real
